# SPDX-License-Identifier: Apache-2.0
"""Number formats of matrices: quantise and dequantise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from hopyard._library import lib
from hopyard.arrays import (
    Array,
    as_output,
    as_tensor,
    dtype_name,
    empty_like_kind,
    is_torch,
    require_host,
)

Format: TypeAlias = Literal[
    "bf16",
    "fp16",
    "fp8_per_tensor",
    "fp8_per_row",
    "fp8_block1x128",
    "fp8_block128",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "mxint4",
]
ScaleLayout: TypeAlias = Literal["linear", "swizzled128x4"]

# Library dtype -> dtype of arrays. Torch has the float8 types, NumPy sees their bytes.
_NUMPY_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "u8": "uint8"}
_BYTES = {"e4m3": "float8_e4m3fn", "e8m0": "uint8", "u8": "uint8"}


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix [rows, cols], or a stack of them [n, rows, cols].

    Attributes:
        format: number format.
        codes: [.., rows, code_cols]: bfloat16, float8_e4m3fn (uint8 in NumPy), or uint8 with two
            4-bit codes a byte, low nibble first.
        scales: [.., scale_rows, scale_cols] where the layout is linear, [.., scale_numel] where it
            is 128x4; None for formats without.
        global_scale: multiplier of every value (fp8_per_tensor, nvfp4), float32 [n] for a stack;
            1 for the other formats.
        cols: columns of the matrix.
        scale_layout: order of the scales.
    """

    format: Format
    codes: Array
    scales: Array | None
    global_scale: Any
    cols: int
    scale_layout: ScaleLayout = "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix or stack that the codes stand for."""
        return (*tuple(self.codes.shape[:-1]), self.cols)


def _array_dtype(library_dtype: str, like: Array) -> str:
    if library_dtype in _BYTES:
        name = _BYTES[library_dtype]
        return name if is_torch(like) else "uint8"
    return _NUMPY_DTYPES[library_dtype]


def _allocate(
    like: Array, format: Format, shape: tuple[int, ...], layout: ScaleLayout
) -> tuple[Array, Array | None]:
    *stack, rows, cols = shape
    sizes = lib.format_shape(format, rows, cols, layout)
    codes = empty_like_kind(
        like, (*stack, rows, sizes["code_cols"]), _array_dtype(sizes["code_dtype"], like)
    )
    if sizes["scale_rows"] == 0 and sizes["scale_numel"] == 0:
        return codes, None
    scale_shape = (sizes["scale_rows"], sizes["scale_cols"])
    if layout == "swizzled128x4":
        scale_shape = (sizes["scale_numel"],)
    scales = empty_like_kind(like, (*stack, *scale_shape), _array_dtype(sizes["scale_dtype"], like))
    return codes, scales


def _fields(quantized: Quantized, index: int | None) -> dict[str, Any]:
    def pick(array: Array) -> Array:
        return array if index is None else array[index]

    fields = {
        "format": quantized.format,
        "codes": as_tensor(pick(quantized.codes), "codes"),
        "scale_layout": quantized.scale_layout,
        "global_scale": float(pick(quantized.global_scale)),
    }
    if quantized.scales is not None:
        fields["scales"] = as_tensor(pick(quantized.scales), "scales")
    return fields


def quantize(
    source: Array,
    format: Format,
    *,
    scale_layout: ScaleLayout = "linear",
    global_scale: Array | float | None = None,
) -> Quantized:
    """Quantise a matrix; scales are computed from the data.

    Args:
        source: [rows, cols], or a stack [n, rows, cols] of matrices that are quantised apart.
            float32, float16 or bfloat16 (uint16 bits in NumPy), contiguous along cols.
        format: number format; docs/formats.md defines each bit for bit.
        scale_layout: order of the scales.
        global_scale: multiplier of every value to use for fp8_per_tensor (default amax / 448) and
            nvfp4 (1/g, default amax / (448 * 6)). One, or one per matrix.

    Returns:
        Codes and scales of the kind of `source`, NumPy or torch.

    Raises:
        ValueError: unknown format, wrong dtype or shape, odd cols of a 4-bit format, or an array on
            a GPU.
    """
    require_host(source, "source", "quantize")
    shape = tuple(int(n) for n in source.shape)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"source has {len(shape)} dimensions, wanted 2 [rows, cols] or 3 [n, rows, cols]"
        )
    codes, scales = _allocate(source, format, shape, scale_layout)
    count = shape[0] if len(shape) == 3 else 1
    wanted = np.broadcast_to(
        np.asarray(0.0 if global_scale is None else global_scale, np.float32), (count,)
    )
    request = Quantized(
        format, codes, scales, wanted if len(shape) == 3 else wanted[0], shape[-1], scale_layout
    )
    used = np.empty(count, np.float32)
    for i in range(count):
        index = i if len(shape) == 3 else None
        matrix = source if index is None else source[i]
        used[i] = lib.quantize(as_tensor(matrix, "source"), _fields(request, index))
    result: Any = float(used[0])
    if len(shape) == 3:
        result = used
        if is_torch(source):
            result = empty_like_kind(source, (count,), "float32")
            result.numpy()[:] = used
    return Quantized(format, codes, scales, result, shape[-1], scale_layout)


def dequantize(quantized: Quantized, dtype: Literal["float32", "bfloat16"] = "float32") -> Array:
    """The values of a quantised matrix or stack.

    Args:
        quantized: as `quantize` returns it, or put together from a checkpoint's tensors.
        dtype: of the result; bfloat16 is uint16 bits in NumPy.

    Returns:
        Array of `quantized.shape`, NumPy or torch as the codes are.

    Raises:
        ValueError: shapes or dtypes do not fit the format, or an array lies on a GPU.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, wanted 'float32' or 'bfloat16'")
    for name, array in (("codes", quantized.codes), ("scales", quantized.scales)):
        require_host(array, f"quantized.{name}", "dequantize")
    like = quantized.codes
    if dtype_name(like) == "bfloat16" and not is_torch(like) and dtype == "float32":
        like = np.empty(0, np.float32)
    result = empty_like_kind(like, quantized.shape, dtype)
    if result.ndim == 2:
        lib.dequantize(_fields(quantized, None), as_output(result, "destination"))
        return result
    for i in range(result.shape[0]):
        lib.dequantize(_fields(quantized, i), as_output(result[i], "destination"))
    return result
