# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `prepare_*` helpers: BF16 expert weights in the layouts that its operations read.

Weights come as [experts, rows, K] in BF16, GEMM1's rows up first, then gate; the results are the
arguments of the operations by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from hopyard.compat.flashinfer.quantize import fp4_quantize, mxfp8_quantize, quantized
from hopyard.compat.flashinfer.signature import Arguments, entry

Prepared = dict[str, Array]
_Quantize = Callable[[Array], tuple[Array, Array]]

_FP4 = (QuantVariant.NVFP4, QuantVariant.MXFP4, QuantVariant.W4A16)
_FP8_BLOCK = (QuantVariant.DeepSeekFp8, QuantVariant.MxFp8)
_SIZES = "num_local_experts hidden_size intermediate_size activation=None device=None"
_CACHE = " permute_cache=None"


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


@dataclass(frozen=True)
class _Stack:
    """The weights of one GEMM, checked and where they are to be prepared.

    Attributes:
        name: prefix of the results, "gemm1" or "gemm2".
        experts: BF16 matrices [rows, K].
        paired: gate and up rows are stored in turn.
        cache: row indices by shape.
    """

    name: str
    experts: list[Array]
    paired: bool
    cache: layouts.IndexCache

    def _in_order(self, matrix: Array, vec: int | None = None) -> Array:
        index = layouts.cached_index(self.cache, matrix, 128, vec, self.paired)
        return ops.take_rows(matrix, index)

    def codes(self, experts: Iterable[Array], dtype: str, block_k: int | None = None) -> Array:
        """Codes of all experts, rows in the prepared order, K in blocks of `block_k` bytes."""
        stored = [self._in_order(ops.as_bytes(codes)) for codes in experts]
        if block_k is not None:
            stored = [layouts.convert_to_block_layout(codes, block_k) for codes in stored]
        return ops.view_as(ops.stack(stored), dtype)

    def scales(self, experts: Iterable[Array], vec: int) -> Array:
        """Block scales of all experts, rows in the prepared order, 128x4."""
        stored = [
            layouts.block_scale_interleave(self._in_order(scales, vec)).reshape(scales.shape)
            for scales in experts
        ]
        return ops.stack(stored)

    def quantized(
        self, quantize: _Quantize, dtype: str, vec: int, block_k: int | None = None
    ) -> Prepared:
        """The two results of a format with block scales."""
        pairs = [quantize(matrix) for matrix in self.experts]
        return {
            f"{self.name}_weights": self.codes((codes for codes, _ in pairs), dtype, block_k),
            f"{self.name}_weights_scale": self.scales((scales for _, scales in pairs), vec),
        }


def _sizes_of(a: Arguments) -> list[tuple[str, int]]:
    return [(field, int(getattr(a, field))) for field in ("hidden_size", "intermediate_size")]


def _check_multiple(name: str, sizes: list[tuple[str, int]], multiple: int) -> None:
    for field, size in sizes:
        if size % multiple:
            raise ValueError(f"{name}: {field} is {size}, wanted a multiple of {multiple}")


def _begin(
    name: str, a: Arguments, multiple: int, wrong_type: type[Exception] = ValueError
) -> tuple[_Stack, _Stack]:
    """Check what the `prepare_*_weights` functions have in common, and move the weights.

    Args:
        name: of the function, for messages.
        a: its arguments.
        multiple: what the sizes must be a multiple of.
        wrong_type: class for weights that are not BF16.

    Raises:
        ValueError, wrong_type: type, shape or sizes.
    """
    gated = is_gated_activation(_activation(a.activation))
    experts = int(a.num_local_experts)
    hidden, inter = int(a.hidden_size), int(a.intermediate_size)
    for field, size in (("num_local_experts", experts), *_sizes_of(a)):
        if size < 1:
            raise ValueError(f"{name}: {field} is {size}, wanted at least 1")
    wanted = {
        "w1_bf16": (experts, (2 if gated else 1) * inter, hidden),
        "w2_bf16": (experts, hidden, inter),
    }
    for argument, shape in wanted.items():
        array = getattr(a, argument)
        checks.require_memory(array, f"{name}: {argument}")
        if not ops.is_type(array, "bfloat16"):
            raise wrong_type(f"{name}: {argument} is {ops.type_of(array)}, wanted bfloat16")
        if ops.shape_of(array) != shape:
            raise ValueError(
                f"{name}: {argument} has shape {list(ops.shape_of(array))}, wanted {list(shape)}"
            )
    _check_multiple(name, _sizes_of(a), multiple)
    given = getattr(a, "permute_cache", None)
    cache: layouts.IndexCache = {} if given is None else given
    first, second = (_move(array, a.device) for array in (a.w1_bf16, a.w2_bf16))
    return (
        _Stack("gemm1", list(first), gated, cache),
        _Stack("gemm2", list(second), False, cache),
    )


def _move(array: Array, device: Any) -> Array:
    moved = array.to(device) if is_torch(array) and device is not None else array
    return ops.contiguous(moved)


@entry("w1_bf16 w2_bf16 * variant=None " + _SIZES + _CACHE)
def prepare_trtllm_fp4_weights(a: Arguments) -> Prepared:
    """NVFP4 (default), MXFP4 or W4A16 weights of `trtllm_fp4_block_scale_moe`.

    The global scales are 1, and so are the three scalars that are returned.

    Raises:
        ValueError: variant, type, shape, or sizes that are no multiple of the scale tiles.
    """
    name = "prepare_trtllm_fp4_weights"
    variant = QuantVariant.NVFP4 if a.variant is None else a.variant
    mx = _variant(variant, _FP4) is not QuantVariant.NVFP4
    vec = 32 if mx else 16
    stacks = _begin(name, a, 128 if mx else 16)
    rows = [ops.shape_of(stack.experts[0])[0] for stack in stacks]
    _check_multiple(name, list(zip(("rows of GEMM1", "hidden_size"), rows, strict=True)), 128)
    _check_multiple(name, _sizes_of(a), 4 * vec)

    def quantize(matrix: Array) -> tuple[Array, Array]:
        return fp4_quantize(matrix, None, vec, mx, is_sf_swizzled_layout=False)

    result: Prepared = {}
    for stack in stacks:
        result |= stack.quantized(quantize, "uint8", vec)
        scale = f"{stack.name}_weights_scale"
        result[scale] = ops.view_as(result[scale], "float8_e4m3fn")
    ones = ops.full(result["gemm1_weights"], (int(a.num_local_experts),), 1.0)
    for scalar in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        result[scalar] = ones
    if not mx and _activation(a.activation) in (ActivationType.Swiglu, ActivationType.Situ):
        result["gemm1_alpha"] = ones
    return result


def _check_hidden(hidden: Array, wrong_type: type[Exception] = ValueError) -> tuple[int, ...]:
    """Shape of BF16 hidden states [tokens, hidden]."""
    name, shape = "hidden_states_bf16", ops.shape_of(hidden)
    checks.require_memory(hidden, name)
    if len(shape) != 2:
        raise ValueError(f"{name} has shape {list(shape)}, wanted [tokens, hidden]")
    if not ops.is_type(hidden, "bfloat16"):
        raise wrong_type(f"{name} is {ops.type_of(hidden)}, wanted bfloat16")
    return shape


def prepare_trtllm_fp4_activations(
    hidden_states_bf16: Array, *, variant: Any
) -> tuple[Array, Array | None]:
    """Hidden states of an FP4 variant: BF16 as they are (W4A16), MXFP8 (MXFP4), or NVFP4 with a
    global scale of 1; linear scales.

    Raises:
        ValueError: variant, dimensions or columns.
        TypeError: not bfloat16.
    """
    shape = _check_hidden(hidden_states_bf16, TypeError)
    chosen = _variant(variant, _FP4)
    if chosen is QuantVariant.W4A16:
        return hidden_states_bf16, None
    if chosen is QuantVariant.MXFP4:
        codes, scales = mxfp8_quantize(hidden_states_bf16, False)
    else:
        codes, scales = fp4_quantize(hidden_states_bf16, None, is_sf_swizzled_layout=False)
    block = 32 if chosen is QuantVariant.MXFP4 else 16
    return codes, ops.view_as(scales.reshape(shape[0], shape[1] // block), "float8_e4m3fn")


@entry("w1_bf16 w2_bf16 * variant " + _SIZES)
def prepare_trtllm_fp8_block_weights(a: Arguments) -> Prepared:
    """FP8 weights of `trtllm_fp8_block_scale_moe`: 128x128 blocks as they are, or MXFP8 shuffled.

    Raises:
        ValueError: variant, type, shape, or sizes that are no multiple of 128.
    """
    mx = _variant(a.variant, _FP8_BLOCK) is QuantVariant.MxFp8
    result: Prepared = {}
    for stack in _begin("prepare_trtllm_fp8_block_weights", a, 128):
        if mx:
            result |= stack.quantized(_mxfp8, "float8_e4m3fn", 32)
            continue
        pairs = [_quantized(matrix, "fp8_block128") for matrix in stack.experts]
        result[f"{stack.name}_weights"] = ops.stack([codes for codes, _ in pairs])
        result[f"{stack.name}_weights_scale"] = ops.stack([scales for _, scales in pairs])
    return result


def _quantized(matrix: Array, number_format: formats.Format) -> tuple[Array, Array]:
    """Codes and scales of a matrix, computed on the host."""
    one = formats.quantize(ops.to_host(matrix), number_format)
    return ops.on_device_of(one.codes, matrix), ops.on_device_of(one.scales, matrix)


def _mxfp8(matrix: Array) -> tuple[Array, Array]:
    codes, scales = mxfp8_quantize(matrix, False)
    rows, cols = ops.shape_of(matrix)
    return codes, scales.reshape(rows, cols // 32)


def prepare_trtllm_fp8_block_activations(
    hidden_states_bf16: Array, *, variant: Any
) -> tuple[Array, Array]:
    """Hidden states in FP8: DeepSeek 1x128 with float32 scales [H / 128, T], or MXFP8 with uint8
    scales [T, H / 32].

    Raises:
        ValueError: variant, type, dimensions or columns.
    """
    shape = _check_hidden(hidden_states_bf16)
    if _variant(variant, _FP8_BLOCK) is QuantVariant.MxFp8:
        codes, scales = mxfp8_quantize(hidden_states_bf16, False)
        return codes, scales.reshape(shape[0], shape[1] // 32)
    if shape[1] % 128:
        raise ValueError(f"hidden_states_bf16 has {shape[1]} columns, wanted a multiple of 128")
    codes, scales = quantized(ops.contiguous(hidden_states_bf16), "fp8_block1x128")
    return codes, ops.permuted(scales, (1, 0))


def _calibrated(value: Any, name: str) -> float:
    numbers = ops.to_numpy(value).reshape(-1) if hasattr(value, "shape") else np.array([value])
    if len(numbers) != 1 or not np.isfinite(numbers).all() or numbers[0] <= 0:
        raise ValueError(f"{name} is {value!r}, wanted one finite positive number")
    return float(np.float32(numbers[0]))


@entry("w1_bf16 w2_bf16 * hidden_states_scale_global intermediate_scale_global " + _SIZES)
def prepare_trtllm_fp8_per_tensor_weights(a: Arguments) -> Prepared:
    """FP8 weights with one scale an expert for `trtllm_fp8_per_tensor_scale_moe`, and the three
    scalars that follow from the two calibrated multipliers.

    Raises:
        ValueError: type, shape, a weight that is not finite, or a multiplier that is not positive.
    """
    name = "prepare_trtllm_fp8_per_tensor_weights"
    stacks = _begin(name, a, 1)
    g_x = _calibrated(a.hidden_states_scale_global, "hidden_states_scale_global")
    g_mid = _calibrated(a.intermediate_scale_global, "intermediate_scale_global")
    result: Prepared = {}
    steps = []
    for stack, argument in zip(stacks, ("w1_bf16", "w2_bf16"), strict=True):
        done = [formats.quantize(ops.to_host(m), "fp8_per_tensor") for m in stack.experts]
        step = np.array([ops.to_numpy(one.global_scale) for one in done], np.float32)
        if not np.isfinite(step).all():
            raise ValueError(f"{name}: {argument} holds values that are not finite")
        steps.append(step)
        codes = (ops.on_device_of(one.codes, stack.experts[0]) for one in done)
        result[f"{stack.name}_weights"] = stack.codes(codes, "float8_e4m3fn")
    s_ab = steps[0] / np.float32(g_x)
    gated = is_gated_activation(_activation(a.activation))
    scalars = {
        "output1_scales_scalar": g_mid * s_ab if gated else np.full_like(s_ab, g_mid),
        "output1_scales_gate_scalar": s_ab,
        "output2_scales_scalar": steps[1] / np.float32(g_mid),
        "hidden_states_scale_global": g_x,
        "intermediate_scale_global": g_mid,
    }
    like = result["gemm1_weights"]
    return result | {n: ops.like_kind(np.asarray(v, np.float32), like) for n, v in scalars.items()}


def prepare_trtllm_fp8_per_tensor_activations(
    hidden_states_bf16: Array, *, hidden_states_scale_global: Any
) -> tuple[Array, None]:
    """Hidden states [T, H] in FP8 with one calibrated multiplier.

    Raises:
        ValueError: type, dimensions or multiplier.
    """
    _check_hidden(hidden_states_bf16)
    multiplier = _calibrated(hidden_states_scale_global, "hidden_states_scale_global")
    source = ops.contiguous(hidden_states_bf16)
    factor = 1.0 / multiplier if ops.on_host(source) else ops.full(source, (), 1.0 / multiplier)
    return quantized(source, "fp8_per_tensor", factor)[0], None


@entry("w1_bf16 w2_bf16 * " + _SIZES + _CACHE)
def prepare_trtllm_mxint4_weights(a: Arguments) -> Prepared:
    """INT4 weights with BF16 scales for `trtllm_mxint4_block_scale_moe`.

    Raises:
        ValueError: type, shape, or sizes that are no multiple of 256.
    """
    result: Prepared = {}
    for stack in _begin("prepare_trtllm_mxint4_weights", a, 256):
        result |= stack.quantized(lambda m: _quantized(m, "mxint4"), "uint8", 32, 128)
    return result


@entry("w1_bf16 w2_bf16 * " + _SIZES + _CACHE)
def prepare_trtllm_bf16_weights(a: Arguments) -> Prepared:
    """BF16 weights of `trtllm_bf16_moe`: shuffled, K in blocks of 64.

    Raises:
        ValueError: type, shape, or sizes that are no multiple of 64.
    """
    stacks = _begin("prepare_trtllm_bf16_weights", a, 64)
    return {f"{s.name}_weights": s.codes(s.experts, "bfloat16", 128) for s in stacks}


# --- the layouts of cutlass_fused_moe

_CUTLASS = {"gemm1": "fc1_expert", "gemm2": "fc2_expert"}


@entry("w1_bf16 w2_bf16 * " + _SIZES)
def prepare_cutlass_bf16_weights(a: Arguments) -> Prepared:
    """BF16 weights as they are, contiguous: `fc1_expert_weights`, `fc2_expert_weights`.

    `hopyard.Matrix` reads them (row order "up_gate"), and so does `trtllm_bf16_moe` with
    `use_shuffled_weight=False` and `WeightLayout.MajorK`.

    Raises:
        TypeError: not bfloat16.
        ValueError: shape.
    """
    stacks = _begin("prepare_cutlass_bf16_weights", a, 1, TypeError)
    return {f"{_CUTLASS[s.name]}_weights": ops.stack(s.experts) for s in stacks}


@entry("w1_bf16 w2_bf16 * " + _SIZES)
def prepare_cutlass_w4a16_weights(a: Arguments) -> Prepared:
    """MXFP4 weights of BF16 activations: `fc1_expert_weights` uint8 [experts, rows, K / 2] and
    `fc1_expert_scales` uint8 (e8m0) [experts, rows, K / 32]; `fc2_...` alike.

    Rows and scales are in their natural order, which `hopyard.Matrix` reads (row order "up_gate").
    FlashInfer's function of this name goes on to interleave the bytes for a kernel of its own.

    Raises:
        TypeError: not bfloat16.
        ValueError: shape, or sizes that are no multiple of 128.
    """
    result: Prepared = {}
    for stack in _begin("prepare_cutlass_w4a16_weights", a, 128, TypeError):
        pairs = [
            fp4_quantize(matrix, None, 32, True, is_sf_swizzled_layout=False)
            for matrix in stack.experts
        ]
        result[f"{_CUTLASS[stack.name]}_weights"] = ops.stack([codes for codes, _ in pairs])
        result[f"{_CUTLASS[stack.name]}_scales"] = ops.stack([scales for _, scales in pairs])
    return result
