# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's routing metadata and its packed ids, computed where the ids lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopyard.arrays import Array, dtype_name
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.enums import RoutingInputMode
from hopyard.compat.flashinfer.routing import Permutation, max_ctas, permute, want
from hopyard.compat.flashinfer.signature import Arguments, entry

_MAX_TILES = 8
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class TrtllmMoERoutingMetadataSlot:
    """Permutation of one tile size, in FlashInfer's order of its nine arrays.

    Unused entries of index arrays are -1; the histogram holds each local expert's first row, then
    its rows with padding.
    """

    total_num_padded_tokens: Array
    expanded_idx_to_permuted_idx: Array
    permuted_idx_to_token_idx: Array
    expert_weights: Array
    expert_count_histogram: Array
    num_tokens_per_expert: Array
    cta_idx_xy_to_batch_idx: Array
    cta_idx_xy_to_mn_limit: Array
    num_non_exiting_ctas: Array
    tile_n: int = 8


@dataclass(frozen=True)
class TrtllmMoERoutingMetadata:
    """Slots of several tile sizes, and what they were allocated for."""

    slots: tuple[TrtllmMoERoutingMetadataSlot, ...]
    tile_ns: tuple[int, ...]
    num_experts: int
    top_k: int
    local_expert_offset: int
    num_local_experts: int
    routing_input_mode: RoutingInputMode


def _check_metadata(a: Arguments, tile_ns: Sequence[int]) -> None:
    checks.require(a.topk_ids, "topk_ids", f"an int32 array [num_tokens, {a.top_k}]")
    checks.require_memory(a.topk_ids, "topk_ids")
    shape = ops.shape_of(a.topk_ids)
    want(
        len(shape) == 2 and shape[1] == a.top_k,
        f"topk_ids must have shape [num_tokens, {a.top_k}]; got {list(shape)}",
    )
    want(
        ops.type_of(a.topk_ids) == "int32", f"topk_ids must be int32; got {ops.type_of(a.topk_ids)}"
    )
    want(len(set(tile_ns)) == len(tile_ns), f"tile_ns must contain unique values; got {tile_ns}")
    want(
        1 <= len(tile_ns) <= _MAX_TILES,
        f"tile_ns must have 1 .. {_MAX_TILES} values; got {tile_ns}",
    )
    experts, first, local = (
        int(n) for n in (a.num_experts, a.local_expert_offset, a.num_local_experts)
    )
    want(
        local >= 1 and 0 <= first <= experts - local,
        f"local_expert_offset={first} with num_local_experts={local}: wanted at least one expert "
        f"within 0 .. num_experts={experts}",
    )
    want(min(tile_ns) >= 1, f"tile_ns must be positive; got {tile_ns}")
    mode = a.routing_input_mode
    want(
        mode is not RoutingInputMode.FromLogits,
        "routing_input_mode must be PackedPrecomputed or UnpackedPrecomputed; got FromLogits",
    )
    unpacked = mode is RoutingInputMode.UnpackedPrecomputed
    want(
        (a.topk_weights is not None) == unpacked,
        f"topk_weights must be {'given' if unpacked else 'None'} for {mode.name}",
    )
    if unpacked:
        _check_weights_of(a.topk_weights, a.topk_ids)


def _allocate(a: Arguments, tile_ns: Sequence[int]) -> TrtllmMoERoutingMetadata:
    _check_metadata(a, tile_ns)
    tokens, top_k = ops.shape_of(a.topk_ids)
    weights_type = "bfloat16" if a.topk_weights is None else ops.type_of(a.topk_weights)
    slots = []
    for tile in sorted(tile_ns):
        tiles = max_ctas(tokens * top_k, int(a.num_experts), tile)
        shapes = (1, tokens * top_k, tiles * tile + 1)
        tail = (max(2 * int(a.num_experts), 512), int(a.num_experts), tiles, tiles, 1)
        arrays = [ops.full(a.topk_ids, (n,), -1, "int32") for n in shapes]
        arrays.append(ops.empty(a.topk_ids, (tokens, top_k), weights_type))
        arrays += [ops.full(a.topk_ids, (n,), -1, "int32") for n in tail]
        slots.append(TrtllmMoERoutingMetadataSlot(*arrays, tile_n=tile))
    metadata = TrtllmMoERoutingMetadata(
        tuple(slots),
        tuple(sorted(tile_ns)),
        int(a.num_experts),
        top_k,
        int(a.local_expert_offset),
        int(a.num_local_experts),
        a.routing_input_mode,
    )
    populate_trtllm_moe_routing_metadata_(metadata, a.topk_ids, a.topk_weights)
    return metadata


@entry(
    "topk_ids * num_experts top_k local_expert_offset num_local_experts tile_n "
    "routing_input_mode topk_weights=None"
)
def trtllm_moe_allocate_routing_metadata(a: Arguments) -> TrtllmMoERoutingMetadataSlot:
    """Routing metadata of precomputed ids for one tile size.

    Args:
        topk_ids: int32 [T, K], packed with weights or global ids.
        tile_n: rows of a tile.
        routing_input_mode: `RoutingInputMode`.
        topk_weights: bfloat16 or float32 [T, K] beside unpacked ids.
    """
    return _allocate(a, [int(a.tile_n)]).slots[0]


@entry(
    "topk_ids * num_experts top_k local_expert_offset num_local_experts tile_ns "
    "routing_input_mode topk_weights=None"
)
def trtllm_moe_allocate_routing_metadata_multi_tile(a: Arguments) -> TrtllmMoERoutingMetadata:
    """`trtllm_moe_allocate_routing_metadata` for up to 8 tile sizes."""
    return _allocate(a, [int(tile) for tile in a.tile_ns])


def populate_trtllm_moe_routing_metadata_(
    metadata: TrtllmMoERoutingMetadata, topk_ids: Array, topk_weights: Array | None = None
) -> None:
    """Fill the arrays of `metadata` again, in place, for other ids of the same shape.

    Raises:
        ValueError: the shape differs from the one that was allocated for, or the weights from it.
    """
    shape = ops.shape_of(metadata.slots[0].expert_weights)
    want(
        ops.shape_of(topk_ids) == shape,
        f"topk_ids has shape {list(ops.shape_of(topk_ids))}, wanted {list(shape)} as allocated",
    )
    checks.check_type(topk_ids, "topk_ids", ["int32"], ValueError)
    checks.require_memory(topk_ids, "topk_ids")
    place = ops.place_of(metadata.slots[0].expert_weights)
    want(
        ops.place_of(topk_ids) == place,
        f"topk_ids must be where the metadata is, {place}; got {ops.place_of(topk_ids)}",
    )
    if metadata.routing_input_mode is RoutingInputMode.PackedPrecomputed:
        ids, weights = topk_ids >> 16, _low_halves(topk_ids)
    else:
        _check_weights_of(topk_weights, topk_ids)
        ids, weights = topk_ids, topk_weights
    for slot in metadata.slots:
        sizes = (slot.tile_n, metadata.num_experts)
        p = permute(ids, metadata.local_expert_offset, metadata.num_local_experts, sizes)
        _fill_slot(slot, p, metadata, weights)


def _halves(words: Array) -> Array:
    """int32 words [T, K] as int16 [T, K, 2], the low half first."""
    kind = ops.namespace(words).int16
    return ops.contiguous(words).view(kind).reshape(*ops.shape_of(words), 2)


def _low_halves(packed: Array) -> Array:
    """The bfloat16 weights of packed ids."""
    return ops.view_as(ops.contiguous(_halves(packed)[..., 0]), "bfloat16")


def _check_weights_of(weights: Array | None, ids: Array) -> None:
    """topk_weights: bfloat16 or float32, of the shape of topk_ids and beside them."""
    name, shape = "topk_weights", ops.shape_of(ids)
    # A tensor is not put into a message: its values may be on a GPU.
    if not hasattr(weights, "shape"):
        want(False, f"{name} is {weights!r}, wanted weights of unpacked ids")
    checks.check_type(weights, name, ["bfloat16", "float32"], ValueError)
    want(
        ops.shape_of(weights) == shape,
        f"{name} has shape {list(ops.shape_of(weights))}, wanted that of topk_ids, {list(shape)}",
    )
    want(
        ops.place_of(weights) == ops.place_of(ids),
        f"{name} must be where topk_ids are, {ops.place_of(ids)}; got {ops.place_of(weights)}",
    )
    checks.require_memory(weights, name)


def _fill_slot(
    slot: TrtllmMoERoutingMetadataSlot,
    p: Permutation,
    metadata: TrtllmMoERoutingMetadata,
    weights: Array,
) -> None:
    contents = {
        "total_num_padded_tokens": p.total_padded,
        "expanded_idx_to_permuted_idx": p.expanded_to_permuted.reshape(-1),
        "permuted_idx_to_token_idx": p.permuted_to_token,
        "num_tokens_per_expert": p.counts,
        "cta_idx_xy_to_batch_idx": p.tile_expert,
        "cta_idx_xy_to_mn_limit": p.tile_limit,
        "num_non_exiting_ctas": p.num_tiles,
    }
    local = metadata.num_local_experts
    slot.expert_count_histogram[:local] = p.starts
    slot.expert_count_histogram[local : 2 * local] = p.padded
    for name, values in contents.items():
        array = getattr(slot, name)
        array[: ops.numel(values)] = values
    wanted = ops.type_of(slot.expert_weights)
    if ops.type_of(weights) != wanted:
        weights = ops.bfloat16(weights) if wanted == "bfloat16" else ops.float32(weights)
    slot.expert_weights[...] = weights


def pack_topk_ids(ids: Array, weights: Array) -> Array:
    """ids and weights [T, K] in the packed format: id << 16 | bfloat16 bits, masked.

    Ids that 16 bits cannot hold are no expert's: on a GPU, where nobody looks, they become -1.

    Raises:
        ValueError: shapes that differ, or on the host ids that 16 bits cannot hold.
    """
    for name, array in (("ids", ids), ("weights", weights)):
        checks.require_memory(array, name)
    want(
        ops.shape_of(ids) == ops.shape_of(weights),
        f"weights have shape {list(ops.shape_of(weights))}, wanted that of ids, "
        f"{list(ops.shape_of(ids))}",
    )
    want(
        ops.place_of(ids) == ops.place_of(weights),
        f"weights must be where ids are, {ops.place_of(ids)}; got {ops.place_of(weights)}",
    )
    want("int" in dtype_name(ids), f"ids must be integers; got {dtype_name(ids)}")
    numbers = ops.cast(ids, "int64")
    outside = (numbers < _INT16.min) | (numbers > _INT16.max)
    if ops.on_host(ids):
        want(
            not outside.any(),
            f"ids must be within {_INT16.min} .. {_INT16.max}, the 16 bits that they are packed "
            f"into; got {numbers[outside][:1].tolist()}",
        )
    packed = ops.empty(ids, ops.shape_of(ids), "int32")
    halves = _halves(packed)
    halves[..., 0] = ops.view_as(ops.bfloat16(ops.float32(weights)), "int16")
    halves[..., 1] = ops.namespace(ids).where(outside, -1, numbers)
    return packed
