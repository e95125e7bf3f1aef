# SPDX-License-Identifier: Apache-2.0
"""Layouts of prepared weights: row orders, 128x4 block scales, K blocks, and their index maps.

Every function takes NumPy arrays and torch tensors on any device and returns the same kind. The
layouts themselves are those that `hopyard.Matrix` reads as they are (docs/formats.md).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from hopyard.arrays import Array, is_torch
from hopyard.compat.flashinfer import ops
from hopyard.compat.flashinfer.enums import DtypeTrtllmGen
from hopyard.devices import torch_module

_SCALE_VECTORS = (16, 32)
IndexCache = dict[Hashable, Array]


def deduce_trtllm_gen_tensor_dtype(x: Array, scale: Array | None) -> DtypeTrtllmGen:
    """Element type of a tensor as FlashInfer's FP4 operation sees it.

    Args:
        x: bfloat16; float8_e4m3fn, MXFP8 where it comes with a scale; or uint8, two FP4 codes a
            byte. (NumPy: uint16 and uint8 only, so FP8 needs a torch or ml_dtypes array.)
        scale: its block scales or None; only the number of elements matters.

    Raises:
        AssertionError: uint8 without a scale.
        ValueError: any other type.
    """
    kind = ops.type_of(x)
    if kind == "bfloat16":
        return DtypeTrtllmGen.Bfloat16
    if kind == "float8_e4m3fn":
        return DtypeTrtllmGen.E4m3 if scale is None else DtypeTrtllmGen.MxE4m3
    if kind in ("uint8", "bytes"):
        if scale is None:
            raise AssertionError("scale is None for a uint8 tensor, wanted its block scales")
        codes = 2 * ops.numel(x)
        return DtypeTrtllmGen.E2m1 if ops.numel(scale) == codes // 16 else DtypeTrtllmGen.MxE2m1
    raise ValueError(f"x has dtype {kind}, wanted bfloat16, float8_e4m3fn or uint8 (packed FP4)")


def _index(values: np.ndarray[Any, Any], like: Array) -> Array:
    return torch_module().from_numpy(values) if is_torch(like) else values


def get_reorder_rows_for_gated_act_gemm_row_indices(x: Array) -> Array:
    """Index that interleaves the two halves of the rows: row 0, row M/2, row 1, row M/2 + 1 ..."""
    rows = ops.shape_of(x)[0]
    if rows % 2:
        raise AssertionError(f"x has {rows} rows, wanted an even number: up rows, then gate rows")
    return _index(np.arange(rows, dtype=np.int64).reshape(2, -1).T.reshape(-1).copy(), x)


def reorder_rows_for_gated_act_gemm(x: Array) -> Array:
    """Up and gate rows in turn: `out[2i] = x[i]`, `out[2i + 1] = x[M/2 + i]`."""
    return ops.take_rows(x, get_reorder_rows_for_gated_act_gemm_row_indices(x))


def _shuffle_block(epilogue_tile_m: int) -> int:
    return 32 if epilogue_tile_m % 128 == 0 else 16


def get_shuffle_matrix_a_row_indices(input_tensor: Array, epilogue_tile_m: int) -> Array:
    """Index `idx` of the row shuffle: `shuffled = x[idx]`.

    Blocks of 32 rows (16 where epilogue_tile_m is no multiple of 128) are read as a matrix of 8
    rows and stored column by column: 0, 4, 8 .. 28, 1, 5 ..
    """
    shape = ops.shape_of(input_tensor)
    if len(shape) != 2:
        raise AssertionError(f"input_tensor has shape {list(shape)}, wanted 2 dimensions")
    block = _shuffle_block(epilogue_tile_m)
    if shape[0] % block:
        raise AssertionError(
            f"input_tensor has {shape[0]} rows, wanted a multiple of {block} for "
            f"epilogue_tile_m={epilogue_tile_m}: zero-pad the rows"
        )
    within = np.arange(block, dtype=np.int64).reshape(8, -1).T.reshape(-1)
    starts = np.arange(0, shape[0], block, dtype=np.int64)
    return _index((starts[:, None] + within).reshape(-1), input_tensor)


def shuffle_matrix_a(input_tensor: Array, epilogue_tile_m: int) -> Array:
    """Rows in the order of the prepared layout (`get_shuffle_matrix_a_row_indices`)."""
    index = get_shuffle_matrix_a_row_indices(input_tensor, epilogue_tile_m)
    return ops.take_rows(input_tensor, index)


def get_shuffle_matrix_sf_a_row_indices(
    input_tensor: Array, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> Array:
    """`get_shuffle_matrix_a_row_indices` for a matrix [M, K / num_elts_per_sf] of block scales."""
    kind = ops.type_of(input_tensor)
    if not ops.is_type(input_tensor, "uint8", "bfloat16"):
        raise AssertionError(f"input_tensor has dtype {kind}, wanted uint8 or bfloat16 scales")
    if num_elts_per_sf not in _SCALE_VECTORS:
        raise AssertionError(f"num_elts_per_sf is {num_elts_per_sf}, wanted 16 or 32")
    shape = ops.shape_of(input_tensor)
    if len(shape) != 2 or shape[0] % 128:
        raise AssertionError(
            f"input_tensor has shape {list(shape)}, wanted [M, K / {num_elts_per_sf}] with M a "
            "multiple of 128: zero-pad the rows"
        )
    return get_shuffle_matrix_a_row_indices(input_tensor, epilogue_tile_m)


def shuffle_matrix_sf_a(
    input_tensor: Array, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> Array:
    """Linear block scales [M, K / vec] shuffled like their rows, in the 128x4 layout (flat)."""
    index = get_shuffle_matrix_sf_a_row_indices(input_tensor, epilogue_tile_m, num_elts_per_sf)
    return block_scale_interleave(ops.take_rows(input_tensor, index))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def swizzled_numel(rows: int, cols: int) -> int:
    """Elements of a matrix of scales [rows, cols] in the 128x4 layout."""
    return _padded(rows, 128) * _padded(cols, 4)


def pad_scales(scales: Array, rows: int, cols: int) -> Array:
    """A matrix or stack [.., M, C] with zeros up to multiples of `rows` and `cols`."""
    *stack, m, c = ops.shape_of(scales)
    padded = (*stack, _padded(m, rows), _padded(c, cols))
    if padded == ops.shape_of(scales):
        return scales
    result = ops.empty(scales, padded, ops.type_of(scales).replace("bytes", "uint8"))
    result[...] = 0
    result[..., :m, :c] = scales
    return result


def block_scale_interleave(unswizzled_sf: Array) -> Array:
    """Block scales in the 128x4 layout.

    Args:
        unswizzled_sf: uint8 or bfloat16 (NumPy: uint8, uint16) [M, C] or [E, M, C].

    Returns:
        Flat array of E * round_up(M, 128) * round_up(C, 4) elements; padding is zero.

    Raises:
        AssertionError: another type or number of dimensions.
    """
    kind = ops.type_of(unswizzled_sf)
    if not ops.is_type(unswizzled_sf, "uint8", "bfloat16"):
        raise AssertionError(f"unswizzled_sf has dtype {kind}, wanted uint8 or bfloat16")
    shape = ops.shape_of(unswizzled_sf)
    if len(shape) not in (2, 3):
        raise AssertionError(f"unswizzled_sf has shape {list(shape)}, wanted [M, C] or [E, M, C]")
    scales = pad_scales(unswizzled_sf.reshape(math.prod(shape[:-2]), *shape[-2:]), 128, 4)
    experts, rows, cols = ops.shape_of(scales)
    tiles = scales.reshape(experts, rows // 128, 4, 32, cols // 4, 4)
    return ops.permuted(tiles, (0, 1, 4, 3, 2, 5)).reshape(-1)


nvfp4_block_scale_interleave = block_scale_interleave


def interleave_8x4(scales: Array) -> Array:
    """Block scales [M, C] in the 8x4 layout, flat, padding zero."""
    scales = pad_scales(scales, 8, 4)
    rows, cols = ops.shape_of(scales)
    return ops.permuted(scales.reshape(rows // 8, 8, cols // 4, 4), (0, 2, 1, 3)).reshape(-1)


def deinterleave(flat: Array, rows: int, cols: int) -> Array:
    """Inverse of `block_scale_interleave` of one matrix [rows, cols]."""
    padded_rows, padded_cols = _padded(rows, 128), _padded(cols, 4)
    tiles = flat.reshape(-1)[: padded_rows * padded_cols]
    tiles = tiles.reshape(padded_rows // 128, padded_cols // 4, 32, 4, 4)
    matrix = ops.permuted(tiles, (0, 3, 2, 1, 4)).reshape(padded_rows, padded_cols)
    return matrix[:rows, :cols]


def convert_to_block_layout(input_tensor: Array, blockK: int) -> Array:
    """[M, K] as [K / blockK, M, blockK]: `out[b, m, j] = x[m, b * blockK + j]`."""
    shape = ops.shape_of(input_tensor)
    if len(shape) != 2 or shape[1] % blockK:
        raise AssertionError(
            f"input_tensor has shape {list(shape)}, wanted [M, K] with K a multiple of "
            f"blockK={blockK}"
        )
    blocks = input_tensor.reshape(shape[0], shape[1] // blockK, blockK)
    return ops.permuted(blocks, (1, 0, 2))


def cached_index(
    cache: IndexCache, matrix: Array, tile: int, vec: int | None, paired: bool
) -> Array:
    """Row index of a matrix, or with `vec` of its block scales: `paired` rows gate and up in turn,
    then shuffled. The index follows from the shape alone."""
    place = ops.place_of(matrix), is_torch(matrix)
    key = (paired, ops.shape_of(matrix), tile, vec, *place)
    if key not in cache:
        if vec is None:
            index = get_shuffle_matrix_a_row_indices(matrix, tile)
        else:
            index = get_shuffle_matrix_sf_a_row_indices(matrix, tile, vec)
        if paired:
            index = get_reorder_rows_for_gated_act_gemm_row_indices(matrix)[index]
        cache[key] = ops.on_device_of(index, matrix)
    return cache[key]


def _maybe_get_cached_w3_w1_permute_indices(
    _cache_permute_indices: IndexCache,
    dst_w3_w1_weight: Array,
    epilogue_tile_m: int,
    num_elts_per_sf: int | None = None,
    is_gated_act_gemm: bool = True,
) -> Array:
    """Row index of GEMM1's weights (or of their scales, with num_elts_per_sf): gate and up in turn,
    then shuffled. Kept in the caller's dictionary."""
    return cached_index(
        _cache_permute_indices,
        dst_w3_w1_weight,
        epilogue_tile_m,
        num_elts_per_sf,
        bool(is_gated_act_gemm),
    )


def get_w2_permute_indices_with_cache(
    _cache_permute_indices: IndexCache,
    dst_w2_weight: Array,
    epilogue_tile_m: int,
    num_elts_per_sf: int | None = None,
    is_gated_act_gemm: bool | None = None,
) -> Array:
    """Row index of GEMM2's weights or scales: the shuffle alone, cached as above."""
    return cached_index(
        _cache_permute_indices, dst_w2_weight, epilogue_tile_m, num_elts_per_sf, False
    )
