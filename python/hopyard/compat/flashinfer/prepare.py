# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `prepare_*` helpers: BF16 expert weights in the layouts that its operations read.

Weights come as [experts, rows, K] in BF16, GEMM1's rows up first, then gate; the results are the
arguments of the operations by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from hopyard import formats
from hopyard.arrays import Array, is_torch
from hopyard.compat.flashinfer import checks, layouts, ops
from hopyard.compat.flashinfer.enums import (
    ActivationType,
    QuantVariant,
    is_gated_activation,
    member,
)
from hopyard.compat.flashinfer.quantize import block_scales, fp4_quantize, mxfp8_quantize

Prepared = dict[str, Array]


@dataclass(frozen=True)
class _Shape:
    """Sizes of the experts, and whether GEMM1 has a gate."""

    experts: int
    hidden: int
    inter: int
    gated: bool

    @property
    def rows(self) -> int:
        return (2 if self.gated else 1) * self.inter


def _activation(given: Any) -> ActivationType:
    """The type of an activation: None is SwiGLU; an object is named by its `type` or class."""
    if given is None:
        return ActivationType.Swiglu
    if isinstance(given, (int, Enum)):
        return member(ActivationType, given, "activation")
    kind = getattr(given, "type", None) or getattr(given, "activation_type", None)
    if isinstance(kind, (int, Enum)):
        return member(ActivationType, kind, "activation")
    wanted = type(given).__name__.lower()
    for known in ActivationType:
        if known.name.lower() == wanted:
            return known
    raise ValueError(f"activation is {given!r}, wanted an ActivationType")


def _variant(given: Any, known: tuple[QuantVariant, ...]) -> QuantVariant:
    """The variant by identity, or by name for an enumeration of FlashInfer's own."""
    for variant in known:
        if given is variant or getattr(given, "name", given) == variant.name:
            return variant
    names = ", ".join(f"QuantVariant.{v.name}" for v in known)
    raise ValueError(f"variant is {given!r}, wanted one of {names}")


def _check_weights(w1: Array, w2: Array, name: str, shape: _Shape) -> None:
    for array, argument in ((w1, "w1_bf16"), (w2, "w2_bf16")):
        checks.require_memory(array, f"{name}: {argument}", ValueError)
        if not ops.is_type(array, "bfloat16"):
            raise ValueError(f"{name}: {argument} is {ops.type_of(array)}, wanted bfloat16")
    wanted1 = (shape.experts, shape.rows, shape.hidden)
    wanted2 = (shape.experts, shape.hidden, shape.inter)
    for array, argument, wanted in ((w1, "w1_bf16", wanted1), (w2, "w2_bf16", wanted2)):
        if ops.shape_of(array) != wanted:
            raise ValueError(
                f"{name}: {argument} has shape {list(ops.shape_of(array))}, wanted {list(wanted)}"
            )


def _check_multiple(name: str, shape: _Shape, multiple: int) -> None:
    for field, size in (
        ("hidden_size", shape.hidden),
        ("intermediate_size", shape.inter),
    ):
        if size % multiple:
            raise ValueError(f"{name}: {field} is {size}, wanted a multiple of {multiple}")


def _move(array: Array, device: Any) -> Array:
    moved = array.to(device) if is_torch(array) and device is not None else array
    return ops.contiguous(moved)


def _rows1(matrix: Array, shape: _Shape, cache: layouts.IndexCache, vec: int | None) -> Array:
    index = layouts._maybe_get_cached_w3_w1_permute_indices(cache, matrix, 128, vec, shape.gated)
    return ops.take_rows(matrix, index)


def _rows2(matrix: Array, shape: _Shape, cache: layouts.IndexCache, vec: int | None) -> Array:
    index = layouts.get_w2_permute_indices_with_cache(cache, matrix, 128, vec, shape.gated)
    return ops.take_rows(matrix, index)


def _shuffled(
    experts: list[Array],
    rows: Callable[..., Array],
    shape: _Shape,
    cache: layouts.IndexCache,
    block_k: int | None = None,
) -> Array:
    """Codes of all experts, rows in the prepared order, K in blocks of `block_k` bytes."""
    result = []
    for codes in experts:
        stored = rows(ops.as_bytes(codes), shape, cache, None)
        result.append(
            stored if block_k is None else layouts.convert_to_block_layout(stored, block_k)
        )
    return ops.stack(result)


def _scales(
    experts: list[Array],
    rows: Callable[..., Array],
    shape: _Shape,
    cache: layouts.IndexCache,
    vec: int,
) -> Array:
    """Block scales of all experts, rows in the prepared order, 128x4."""
    stored = [
        layouts.block_scale_interleave(rows(scales, shape, cache, vec)).reshape(scales.shape)
        for scales in experts
    ]
    return ops.stack(stored)


def _each(weights: Array, quantize: Callable[[Array], tuple[Array, Array]]) -> tuple[list, list]:
    pairs = [quantize(weights[e]) for e in range(ops.shape_of(weights)[0])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def prepare_trtllm_fp4_weights(
    w1_bf16: Array,
    w2_bf16: Array,
    *,
    variant: Any = None,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Any = None,
    device: Any = None,
    permute_cache: layouts.IndexCache | None = None,
) -> Prepared:
    """NVFP4 (default), MXFP4 or W4A16 weights of `trtllm_fp4_block_scale_moe`.

    The global scales are 1, and so are the three scalars that are returned.

    Raises:
        ValueError: variant, type, shape, or sizes that are no multiple of the scale tiles.
    """
    name = "prepare_trtllm_fp4_weights"
    known = (QuantVariant.NVFP4, QuantVariant.MXFP4, QuantVariant.W4A16)
    mx = _variant(QuantVariant.NVFP4 if variant is None else variant, known) is not known[0]
    gated = is_gated_activation(_activation(activation))
    shape = _Shape(num_local_experts, hidden_size, intermediate_size, gated)
    vec = 32 if mx else 16
    _check_weights(w1_bf16, w2_bf16, name, shape)
    _check_multiple(name, shape, 128 if mx else 16)
    for field, rows in (("GEMM1's rows", shape.rows), ("hidden_size", shape.hidden)):
        if rows % 128:
            raise ValueError(f"{name}: {field} are {rows}, wanted a multiple of 128")
    for field, cols in (("hidden_size", shape.hidden), ("intermediate_size", shape.inter)):
        if cols % (4 * vec):
            raise ValueError(f"{name}: {field} is {cols}, wanted a multiple of {4 * vec}")
    cache = {} if permute_cache is None else permute_cache

    def quantize(matrix: Array) -> tuple[Array, Array]:
        return fp4_quantize(matrix, None, vec, mx, is_sf_swizzled_layout=False)

    codes1, scales1 = _each(_move(w1_bf16, device), quantize)
    codes2, scales2 = _each(_move(w2_bf16, device), quantize)
    ones = ops.full(codes1[0], (num_local_experts,), 1.0)
    result = {
        "gemm1_weights": _shuffled(codes1, _rows1, shape, cache),
        "gemm1_weights_scale": ops.view_as(
            _scales(scales1, _rows1, shape, cache, vec), "float8_e4m3fn"
        ),
        "gemm2_weights": _shuffled(codes2, _rows2, shape, cache),
        "gemm2_weights_scale": ops.view_as(
            _scales(scales2, _rows2, shape, cache, vec), "float8_e4m3fn"
        ),
        "output1_scale_scalar": ones,
        "output1_scale_gate_scalar": ones,
        "output2_scale_scalar": ones,
    }
    if not mx and _activation(activation) in (ActivationType.Swiglu, ActivationType.Situ):
        result["gemm1_alpha"] = ones
    return result


def prepare_trtllm_fp4_activations(
    hidden_states_bf16: Array, *, variant: Any
) -> tuple[Array, Array | None]:
    """Hidden states of an FP4 variant: BF16 as they are (W4A16), MXFP8 (MXFP4), or NVFP4 with a
    global scale of 1; linear scales.

    Raises:
        ValueError: variant, dimensions or columns.
        TypeError: not bfloat16.
    """
    checks.require_memory(hidden_states_bf16, "hidden_states_bf16", ValueError)
    shape = ops.shape_of(hidden_states_bf16)
    if len(shape) != 2:
        raise ValueError(f"hidden_states_bf16 has shape {list(shape)}, wanted [tokens, hidden]")
    if not ops.is_type(hidden_states_bf16, "bfloat16"):
        raise TypeError(f"hidden_states_bf16 is {ops.type_of(hidden_states_bf16)}, wanted bfloat16")
    known = (QuantVariant.NVFP4, QuantVariant.MXFP4, QuantVariant.W4A16)
    chosen = _variant(variant, known)
    if chosen is QuantVariant.W4A16:
        return hidden_states_bf16, None
    if chosen is QuantVariant.MXFP4:
        codes, scales = mxfp8_quantize(hidden_states_bf16, False)
    else:
        codes, scales = fp4_quantize(hidden_states_bf16, None, is_sf_swizzled_layout=False)
    block = 32 if chosen is QuantVariant.MXFP4 else 16
    return codes, ops.view_as(scales.reshape(shape[0], shape[1] // block), "float8_e4m3fn")


def prepare_trtllm_fp8_block_weights(
    w1_bf16: Array,
    w2_bf16: Array,
    *,
    variant: Any,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Any = None,
    device: Any = None,
) -> Prepared:
    """FP8 weights of `trtllm_fp8_block_scale_moe`: 128x128 blocks as they are, or MXFP8 shuffled.

    Raises:
        ValueError: variant, type, shape, or sizes that are no multiple of 128.
    """
    name = "prepare_trtllm_fp8_block_weights"
    mx = _variant(variant, (QuantVariant.DeepSeekFp8, QuantVariant.MxFp8)) is QuantVariant.MxFp8
    gated = is_gated_activation(_activation(activation))
    shape = _Shape(num_local_experts, hidden_size, intermediate_size, gated)
    _check_weights(w1_bf16, w2_bf16, name, shape)
    _check_multiple(name, shape, 128)
    w1, w2 = _move(w1_bf16, device), _move(w2_bf16, device)
    if not mx:
        first = formats.quantize(ops.to_host(w1), "fp8_block128")
        second = formats.quantize(ops.to_host(w2), "fp8_block128")
        return {
            "gemm1_weights": ops.on_device_of(first.codes, w1),
            "gemm1_weights_scale": ops.on_device_of(first.scales, w1),
            "gemm2_weights": ops.on_device_of(second.codes, w1),
            "gemm2_weights_scale": ops.on_device_of(second.scales, w1),
        }

    def quantize(matrix: Array) -> tuple[Array, Array]:
        codes, scales = mxfp8_quantize(matrix, False)
        rows, cols = ops.shape_of(matrix)
        return codes, scales.reshape(rows, cols // 32)

    cache: layouts.IndexCache = {}
    codes1, scales1 = _each(w1, quantize)
    codes2, scales2 = _each(w2, quantize)
    return {
        "gemm1_weights": ops.view_as(_shuffled(codes1, _rows1, shape, cache), "float8_e4m3fn"),
        "gemm1_weights_scale": _scales(scales1, _rows1, shape, cache, 32),
        "gemm2_weights": ops.view_as(_shuffled(codes2, _rows2, shape, cache), "float8_e4m3fn"),
        "gemm2_weights_scale": _scales(scales2, _rows2, shape, cache, 32),
    }


def prepare_trtllm_fp8_block_activations(
    hidden_states_bf16: Array, *, variant: Any
) -> tuple[Array, Array]:
    """Hidden states in FP8: DeepSeek 1x128 with float32 scales [H / 128, T], or MXFP8 with uint8
    scales [T, H / 32].

    Raises:
        ValueError: variant, type, dimensions or columns.
    """
    checks.require_memory(hidden_states_bf16, "hidden_states_bf16", ValueError)
    shape = ops.shape_of(hidden_states_bf16)
    if len(shape) != 2 or not ops.is_type(hidden_states_bf16, "bfloat16"):
        raise ValueError(
            f"hidden_states_bf16 is {ops.type_of(hidden_states_bf16)} {list(shape)}, wanted "
            "bfloat16 [tokens, hidden]"
        )
    if _variant(variant, (QuantVariant.DeepSeekFp8, QuantVariant.MxFp8)) is QuantVariant.MxFp8:
        codes, scales = mxfp8_quantize(hidden_states_bf16, False)
        return codes, scales.reshape(shape[0], shape[1] // 32)
    if shape[1] % 128:
        raise ValueError(f"hidden_states_bf16 has {shape[1]} columns, wanted a multiple of 128")
    source = ops.contiguous(ops.to_host(hidden_states_bf16))
    quantized = formats.quantize(source, "fp8_block1x128")
    scales = ops.permuted(block_scales(quantized, 128, "float32"), (1, 0))
    return ops.on_device_of(quantized.codes, hidden_states_bf16), ops.on_device_of(
        scales, hidden_states_bf16
    )


def _calibrated(value: Any, name: str) -> float:
    numbers = ops.to_numpy(value).reshape(-1) if hasattr(value, "shape") else np.array([value])
    if len(numbers) != 1 or not np.isfinite(numbers).all() or numbers[0] <= 0:
        raise ValueError(f"{name} is {value!r}, wanted one finite positive number")
    return float(np.float32(numbers[0]))


def prepare_trtllm_fp8_per_tensor_weights(
    w1_bf16: Array,
    w2_bf16: Array,
    *,
    hidden_states_scale_global: Any,
    intermediate_scale_global: Any,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Any = None,
    device: Any = None,
) -> Prepared:
    """FP8 weights with one scale an expert for `trtllm_fp8_per_tensor_scale_moe`, and the three
    scalars that follow from the two calibrated multipliers.

    Raises:
        ValueError: type, shape, a weight that is not finite, or a multiplier that is not positive.
    """
    name = "prepare_trtllm_fp8_per_tensor_weights"
    gated = is_gated_activation(_activation(activation))
    shape = _Shape(num_local_experts, hidden_size, intermediate_size, gated)
    _check_weights(w1_bf16, w2_bf16, name, shape)
    g_x = _calibrated(hidden_states_scale_global, "hidden_states_scale_global")
    g_mid = _calibrated(intermediate_scale_global, "intermediate_scale_global")
    w1, w2 = _move(w1_bf16, device), _move(w2_bf16, device)
    quantized = []
    for weights, argument in ((w1, "w1_bf16"), (w2, "w2_bf16")):
        one = formats.quantize(ops.to_host(weights), "fp8_per_tensor")
        step = ops.to_numpy(one.global_scale).astype(np.float32)
        if not np.isfinite(step).all():
            raise ValueError(f"{name}: {argument} holds values that are not finite")
        quantized.append((ops.on_device_of(one.codes, weights), step))
    (codes1, step1), (codes2, step2) = quantized
    cache: layouts.IndexCache = {}
    experts = range(num_local_experts)
    first = _shuffled([codes1[e] for e in experts], _rows1, shape, cache)
    second = _shuffled([codes2[e] for e in experts], _rows2, shape, cache)
    s_ab = step1 / np.float32(g_x)

    def scalar(values: Any) -> Array:
        return ops.like_kind(np.asarray(values, np.float32), w1)

    return {
        "gemm1_weights": ops.view_as(first, "float8_e4m3fn"),
        "gemm2_weights": ops.view_as(second, "float8_e4m3fn"),
        "output1_scales_scalar": scalar(
            g_mid * s_ab if gated else np.fullops.on_device_of(s_ab, g_mid)
        ),
        "output1_scales_gate_scalar": scalar(s_ab),
        "output2_scales_scalar": scalar(step2 / np.float32(g_mid)),
        "hidden_states_scale_global": scalar(g_x),
        "intermediate_scale_global": scalar(g_mid),
    }


def prepare_trtllm_fp8_per_tensor_activations(
    hidden_states_bf16: Array, *, hidden_states_scale_global: Any
) -> tuple[Array, None]:
    """Hidden states [T, H] in FP8 with one calibrated multiplier.

    Raises:
        ValueError: type, dimensions or multiplier.
    """
    checks.require_memory(hidden_states_bf16, "hidden_states_bf16", ValueError)
    shape = ops.shape_of(hidden_states_bf16)
    if len(shape) != 2 or not ops.is_type(hidden_states_bf16, "bfloat16"):
        raise ValueError(
            f"hidden_states_bf16 is {ops.type_of(hidden_states_bf16)} {list(shape)}, wanted "
            "bfloat16 [tokens, hidden]"
        )
    multiplier = _calibrated(hidden_states_scale_global, "hidden_states_scale_global")
    source = ops.contiguous(ops.to_host(hidden_states_bf16))
    quantized = formats.quantize(source, "fp8_per_tensor", global_scale=1.0 / multiplier)
    return ops.on_device_of(quantized.codes, hidden_states_bf16), None


def prepare_trtllm_mxint4_weights(
    w1_bf16: Array,
    w2_bf16: Array,
    *,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Any = None,
    device: Any = None,
    permute_cache: layouts.IndexCache | None = None,
) -> Prepared:
    """INT4 weights with BF16 scales for `trtllm_mxint4_block_scale_moe`.

    Raises:
        ValueError: type, shape, or sizes that are no multiple of 256.
    """
    name = "prepare_trtllm_mxint4_weights"
    gated = is_gated_activation(_activation(activation))
    shape = _Shape(num_local_experts, hidden_size, intermediate_size, gated)
    _check_weights(w1_bf16, w2_bf16, name, shape)
    _check_multiple(name, shape, 256)
    w1, w2 = _move(w1_bf16, device), _move(w2_bf16, device)
    cache = {} if permute_cache is None else permute_cache

    def quantize(matrix: Array) -> tuple[Array, Array]:
        one = formats.quantize(ops.to_host(matrix), "mxint4")
        return ops.on_device_of(one.codes, matrix), ops.on_device_of(one.scales, matrix)

    codes1, scales1 = _each(w1, quantize)
    codes2, scales2 = _each(w2, quantize)
    return {
        "gemm1_weights": _shuffled(codes1, _rows1, shape, cache, 128),
        "gemm1_weights_scale": _scales(scales1, _rows1, shape, cache, 32),
        "gemm2_weights": _shuffled(codes2, _rows2, shape, cache, 128),
        "gemm2_weights_scale": _scales(scales2, _rows2, shape, cache, 32),
    }


def prepare_trtllm_bf16_weights(
    w1_bf16: Array,
    w2_bf16: Array,
    *,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    activation: Any = None,
    device: Any = None,
    permute_cache: layouts.IndexCache | None = None,
) -> Prepared:
    """BF16 weights of `trtllm_bf16_moe`: shuffled, K in blocks of 64.

    Raises:
        ValueError: type, shape, or sizes that are no multiple of 64.
    """
    name = "prepare_trtllm_bf16_weights"
    gated = is_gated_activation(_activation(activation))
    shape = _Shape(num_local_experts, hidden_size, intermediate_size, gated)
    _check_weights(w1_bf16, w2_bf16, name, shape)
    _check_multiple(name, shape, 64)
    w1, w2 = _move(w1_bf16, device), _move(w2_bf16, device)
    cache = {} if permute_cache is None else permute_cache
    experts = range(num_local_experts)
    first = _shuffled([w1[e] for e in experts], _rows1, shape, cache, 128)
    second = _shuffled([w2[e] for e in experts], _rows2, shape, cache, 128)
    return {
        "gemm1_weights": _view_bf16(first),
        "gemm2_weights": _view_bf16(second),
    }


def _view_bf16(stored: Array) -> Array:
    return ops.view_as(stored, "bfloat16") if is_torch(stored) else stored.view(np.uint16)
