# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's quantisers: `hopyard.quantize` on the CPU, torch's operations on a GPU.

Both give the bits of docs/formats.md, and a GPU is not waited for. FlashInfer's own kernels do
nothing on Hopper. Decoders return host memory, as FlashInfer's do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hopyard import formats
from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, layouts, ops, quantize_torch
from hopyard.compat.flashinfer.enums import SfLayout
from hopyard.compat.flashinfer.signature import Arguments, entry

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _e4m3_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    values = np.where(exponent == 0, subnormal, normal)
    values[(code & 127) == 127] = np.nan
    return np.where(code >= 128, -values, values).astype(np.float32)


E4M3 = _e4m3_values()
E8M0 = np.append(2.0 ** np.arange(-127.0, 128), np.nan).astype(np.float32)


def _scalar(value: Any, name: str) -> float:
    """The one number of a scalar, an array or a tensor."""
    numbers = ops.to_numpy(value).reshape(-1) if hasattr(value, "shape") else [value]
    if len(numbers) != 1:
        raise ValueError(f"{name} has {len(numbers)} elements, wanted one global scale")
    number = float(numbers[0])
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} is {number}, wanted a finite number above 0")
    return number


def _matrix(source: Array, name: str, block: int) -> Array:
    """The source as a matrix [M, K]; leading dimensions are rows."""
    kinds = ("float32", "float16", "bfloat16")
    checks.require_memory(source, name)
    if not ops.is_type(source, *kinds):
        raise ValueError(f"{name} has dtype {ops.type_of(source)}, wanted one of {list(kinds)}")
    shape = ops.shape_of(source)
    if len(shape) < 2 or shape[-1] % block or shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {list(shape)}, wanted [.., M, K] with K a multiple of {block}"
        )
    return ops.contiguous(source.reshape(math.prod(shape[:-1]), shape[-1]))


def _factor(value: Any, name: str, source: Array, *, invert: bool) -> Any:
    """A global scale as the multiplier of values: a number on the host, beside the source on a GPU,
    where one that is no finite number above 0 is not found and makes NaN."""
    if ops.on_host(source) or ops.on_host(value):
        number = np.float32(_scalar(value, name))
        number = np.float32(1) / number if invert else number
        return float(number) if ops.on_host(source) else ops.full(source, (), float(number))
    if ops.numel(value) != 1:
        raise ValueError(f"{name} has {ops.numel(value)} elements, wanted one global scale")
    factor = ops.on_device_of(ops.float32(value.detach().reshape(())), source)
    return 1.0 / factor if invert else factor


def quantized(
    source: Array, number_format: formats.Format, factor: Any = None
) -> tuple[Array, Array]:
    """Codes and linear block scales of a contiguous matrix, computed where it lies.

    Args:
        source: float32, float16 or bfloat16 [M, K].
        number_format: one that `quantize_torch.quantize` knows.
        factor: multiplier of every value (NVFP4, FP8 per tensor), as `_factor` gives it.
    """
    if not ops.on_host(source):
        return quantize_torch.quantize(source, number_format, factor)
    one = formats.quantize(source, number_format, global_scale=factor)
    scales = one.scales
    if scales is None and number_format in quantize_torch.BLOCKS:  # there are no rows
        kind = "float32" if number_format == "fp8_block1x128" else "uint8"
        block = quantize_torch.BLOCKS[number_format]
        scales = ops.empty(one.codes, (0, ops.shape_of(source)[1] // block), kind)
    return one.codes, scales


def _ordered_scales(linear: Array, layout: SfLayout) -> Array:
    """Linear scales [M, C] as a matrix in `layout`, padded to whole tiles."""
    if layout is SfLayout.layout_linear:
        return linear
    if layout is SfLayout.layout_8x4:
        padded = ops.shape_of(layouts.pad_scales(linear, 8, 4))
        return layouts.interleave_8x4(linear).reshape(padded)
    padded = ops.shape_of(layouts.pad_scales(linear, 128, 4))
    return layouts.block_scale_interleave(linear).reshape(padded)


@entry(
    "input global_scale=None sf_vec_size=16 sf_use_ue8m0=False is_sf_swizzled_layout=True "
    "is_sf_8x4_layout=False is_global_scale_inversed=False enable_pdl=None backend='cuda'"
)
def fp4_quantize(a: Arguments) -> tuple[Array, Array]:
    """Quantise to NVFP4 (blocks of 16, e4m3 scales) or MXFP4 (blocks of 32, e8m0 scales).

    Args:
        input: [.., M, K] float32, float16 or bfloat16.
        global_scale: the multiplier 448 * 6 / amax of NVFP4, one number; None = 1. MXFP4 has none.
            On a GPU nobody looks at it: what is no finite number above 0 makes NaN scales.
        sf_vec_size: 16, or 32 with `sf_use_ue8m0`.
        sf_use_ue8m0: e8m0 scales.
        is_sf_swizzled_layout: scales in the 128x4 layout (8x4 with `is_sf_8x4_layout`).
        is_global_scale_inversed: `global_scale` is amax / (448 * 6).
        enable_pdl, backend: without effect.

    Returns:
        Codes uint8 [.., M, K / 2], low nibble first, and scales uint8 [M, K / vec], padded to whole
        tiles where they are swizzled.

    Raises:
        NotImplementedError: a pair of sf_vec_size and sf_use_ue8m0 that is no format.
        ValueError: type, shape or global scale.
    """
    if (a.sf_vec_size, bool(a.sf_use_ue8m0)) not in ((16, False), (32, True)):
        raise NotImplementedError(
            f"sf_vec_size={a.sf_vec_size} with sf_use_ue8m0={a.sf_use_ue8m0}; wanted 16 with False "
            "(NVFP4) or 32 with True (MXFP4)"
        )
    source = _matrix(a.input, "input", a.sf_vec_size)
    if a.sf_use_ue8m0:
        codes, linear = quantized(source, "mxfp4")
    else:
        scale = 1.0 if a.global_scale is None else a.global_scale
        factor = _factor(scale, "global_scale", source, invert=not a.is_global_scale_inversed)
        codes, linear = quantized(source, "nvfp4", factor)
    layout = SfLayout.layout_linear
    if a.is_sf_swizzled_layout:
        layout = SfLayout.layout_8x4 if a.is_sf_8x4_layout else SfLayout.layout_128x4
    codes = codes.reshape(*ops.shape_of(a.input)[:-1], ops.shape_of(source)[1] // 2)
    return codes, _ordered_scales(ops.as_bytes(linear), layout)


@entry(
    "a a_global_sf sfLayout=SfLayout.layout_128x4 do_shuffle=False sf_vec_size=16 enable_pdl=None "
    "backend='cuda'"
)
def nvfp4_quantize(a: Arguments) -> tuple[Array, Array]:
    """Quantise to NVFP4.

    Args:
        a: [M, K] float16, bfloat16 or float32.
        a_global_sf: the multiplier 448 * 6 / amax, one number.
        sfLayout: order of the scales.
        do_shuffle: rows of codes and scales in the prepared order (`shuffle_matrix_a` with 128),
            scales in the 128x4 layout.
        sf_vec_size: 16.
        enable_pdl, backend: without effect.

    Returns:
        Codes uint8 [M, K / 2] and scales uint8 [M, K / 16], padded to whole tiles where swizzled.
    """
    swizzled = not a.do_shuffle and a.sfLayout is not SfLayout.layout_linear
    codes, scales = fp4_quantize(
        a.a,
        a.a_global_sf,
        a.sf_vec_size,
        is_sf_swizzled_layout=swizzled,
        is_sf_8x4_layout=a.sfLayout is SfLayout.layout_8x4,
    )
    if a.do_shuffle:
        padded = ops.shape_of(layouts.pad_scales(scales, 128, 4))
        scales = layouts.shuffle_matrix_sf_a(scales, 128).reshape(padded)
        codes = layouts.shuffle_matrix_a(codes, 128)
    return codes, scales


def mxfp4_quantize(a: Array, backend: str = "cuda", enable_pdl: bool | None = None) -> tuple:
    """Quantise [M, K] to MXFP4; codes uint8 [M, K / 2] and e8m0 scales, 128x4."""
    return fp4_quantize(a, None, 32, True, enable_pdl=enable_pdl, backend=backend)


@entry(
    "input is_sf_swizzled_layout=True alignment=32 enable_pdl=None backend='cuda' "
    "sf_swizzle_layout=None"
)
def mxfp8_quantize(a: Arguments) -> tuple[Array, Array]:
    """Quantise to MXFP8 (blocks of 32, e8m0 scales).

    Args:
        input: [.., M, K] float32, float16 or bfloat16, K a multiple of 32.
        is_sf_swizzled_layout: scales in the 128x4 layout, or linear.
        alignment: K is zero-padded up to a multiple of it.
        enable_pdl, backend: without effect.
        sf_swizzle_layout: `SfLayout`, instead of `is_sf_swizzled_layout`.

    Returns:
        Codes float8_e4m3fn (uint8 in NumPy) [.., M, K padded] and scales uint8, flat.
    """
    if a.alignment % 32:
        raise ValueError(f"alignment is {a.alignment}, wanted a multiple of 32")
    source = _matrix(a.input, "input", 32)
    padded = layouts.pad_scales(source, 1, a.alignment)
    codes, linear = quantized(padded, "mxfp8")
    layout = a.sf_swizzle_layout
    if layout is None:
        layout = SfLayout.layout_128x4 if a.is_sf_swizzled_layout else SfLayout.layout_linear
    codes = codes.reshape(*ops.shape_of(a.input)[:-1], ops.shape_of(padded)[1])
    return codes, _ordered_scales(ops.as_bytes(linear), layout).reshape(-1)


def _linear_scales(scales: Array, rows: int, cols: int, swizzled: bool) -> np.ndarray[Any, Any]:
    checks.require_memory(scales, "the scale tensor")
    flat = ops.to_numpy(scales).view(np.uint8).reshape(-1)
    least = layouts.swizzled_numel(rows, cols) if swizzled else rows * cols
    if flat.size < least:
        raise ValueError(
            f"the scale tensor has {flat.size} elements, wanted {least}: [{rows}, {cols}] in the "
            f"{'128x4' if swizzled else 'linear'} layout"
        )
    return layouts.deinterleave(flat, rows, cols) if swizzled else flat[:least].reshape(rows, cols)


def _blocks(values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    block = values.shape[1] // max(scales.shape[1], 1)
    return values * np.repeat(scales, block, axis=1)


@entry(
    "e2m1_tensor ufp8_scale_tensor global_scale_tensor=None sf_vec_size=16 ufp8_type=1 "
    "is_sf_swizzled_layout=True"
)
def e2m1_and_ufp8sf_scale_to_float(a: Arguments) -> Array:
    """Decode FP4: code * block scale * global scale, in FP32.

    Args:
        e2m1_tensor: uint8 [M, K / 2], low nibble first.
        ufp8_scale_tensor: uint8 (or float8) scales of [M, K / sf_vec_size].
        global_scale_tensor: one number that multiplies every value; None = 1.
        sf_vec_size: elements of a block.
        ufp8_type: 1 for e4m3 scales, 0 for e8m0.
        is_sf_swizzled_layout: the scales are 128x4, or linear.

    Returns:
        float32 [M, K] in host memory, as FlashInfer does.
    """
    if a.ufp8_type not in (0, 1):
        raise ValueError(f"ufp8_type is {a.ufp8_type}, wanted 0 (e8m0) or 1 (e4m3)")
    checks.require_memory(a.e2m1_tensor, "e2m1_tensor")
    packed = ops.to_numpy(a.e2m1_tensor).view(np.uint8)
    rows, cols = packed.shape[0], packed.shape[1] * 2
    if cols % a.sf_vec_size:
        raise ValueError(f"e2m1_tensor has {cols} columns, wanted a multiple of {a.sf_vec_size}")
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, cols)
    values = np.where(codes & 8, -_E2M1[codes & 7], _E2M1[codes & 7])
    scales = _linear_scales(
        a.ufp8_scale_tensor, rows, cols // a.sf_vec_size, a.is_sf_swizzled_layout
    )
    decoded = _blocks(values, (E4M3 if a.ufp8_type == 1 else E8M0)[scales])
    if a.global_scale_tensor is not None:
        decoded *= np.float32(_scalar(a.global_scale_tensor, "global_scale_tensor"))
    return ops.like_kind(decoded, ops.to_host(a.e2m1_tensor))


def mxfp4_dequantize(a_fp4: Array, a_sf: Array) -> Array:
    """Decode MXFP4 codes [M, K / 2] with 128x4 scales to float32."""
    return e2m1_and_ufp8sf_scale_to_float(a_fp4, a_sf, None, 32, 0, True)


def mxfp8_dequantize_host(
    input: Array, scale_tensor: Array, is_sf_swizzled_layout: bool = True
) -> Array:
    """Decode MXFP8 codes [M, K] to float32 in host memory."""
    checks.require_memory(input, "input")
    codes = ops.to_numpy(input).view(np.uint8)
    rows, cols = codes.shape
    scales = _linear_scales(scale_tensor, rows, cols // 32, is_sf_swizzled_layout)
    return ops.like_kind(_blocks(E4M3[codes], E8M0[scales]), ops.to_host(input))
