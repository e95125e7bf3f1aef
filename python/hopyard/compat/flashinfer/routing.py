# SPDX-License-Identifier: Apache-2.0
"""Routing alone: FlashInfer's routing operations and its routing metadata.

Metadata are computed on the host; for CUDA tensors that means a copy there and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import hopyard
from hopyard.arrays import Array, from_bf16
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import check_routing_limits, method_of, rule_of
from hopyard.compat.flashinfer.engine import flashinfer_errors
from hopyard.compat.flashinfer.enums import RoutingInputMode, RoutingMethodType
from hopyard.compat.flashinfer.signature import Arguments, entry

_FLOATS = ("float32", "bfloat16", "float16")
_MAX_TILES = 8


def _want(condition: bool, message: str) -> None:
    check(condition, message, ValueError)


# --- fused_topk_deepseek


def _check_topk_sizes(experts: int, groups: int, kept: int, top_k: int) -> None:
    _want(
        groups >= 1 and kept >= 1 and top_k >= 1,
        f"n_group, topk_group and topk must be positive; got {groups}, {kept}, {top_k}",
    )
    _want(
        kept * groups >= top_k,
        f"topk_group * n_group must be at least topk={top_k}; got {kept} * {groups}",
    )
    _want(kept <= groups, f"topk_group={kept} must not be larger than n_group={groups}")
    if groups == 1:
        _want(experts <= 384, f"num_experts must be at most 384 without groups; got {experts}")
        _want(top_k <= 8, f"topk must be at most 8; got {top_k}")
        return
    size = experts / groups
    _want(top_k <= 8, f"topk must be at most 8 with n_group={groups}; got {top_k}")
    _want(size <= 32, f"a group has num_experts / n_group = {size} experts, wanted at most 32")
    _want(
        size * kept <= 128,
        f"selected groups have {size * kept} experts, wanted at most 128",
    )
    check(experts % groups == 0, f"num_experts={experts} must be divisible by n_group={groups}")
    check(groups <= 32, f"n_group must be at most 32; got {groups}")
    check(experts <= 256, f"unsupported configuration: {experts} experts in {groups} groups")


def _check_topk_arrays(a: Arguments) -> None:
    for name, ndim in (("scores", 2), ("bias", 1), ("topk_values", 2), ("topk_indices", 2)):
        array = getattr(a, name)
        checks.require(array, name, f"an array of {ndim} dimensions")
        checks.check_ndim(array, name, ndim)
        checks.check_device(array, name, a.scores)
        checks.check_contiguous(array, name)
    checks.check_type(a.scores, "scores", _FLOATS)
    checks.check_type(a.bias, "bias", _FLOATS)
    tokens, experts = ops.shape_of(a.scores)
    checks.check_shape(a.bias, "bias", (experts,))
    checks.check_shape(a.topk_values, "topk_values", (tokens, a.topk))
    checks.check_shape(a.topk_indices, "topk_indices", (tokens, a.topk))
    check(
        ops.type_of(a.topk_values) == ops.type_of(a.scores),
        f"topk_values must have the dtype of scores, {ops.type_of(a.scores)}; got "
        f"{ops.type_of(a.topk_values)}",
    )
    checks.check_type(a.topk_indices, "topk_indices", ["int32"])
    replay = a.routing_replay_out
    if replay is None:
        return
    _want(
        ops.is_type(replay, "int16"),
        f"routing_replay_out must be int16; got {ops.type_of(replay)}",
    )
    shape = ops.shape_of(replay)
    _want(
        len(shape) == 2 and shape[0] >= tokens and shape[1] == a.topk,
        f"routing_replay_out must have shape [>= {tokens}, {a.topk}]; got {list(shape)}",
    )
    checks.check_contiguous(replay, "routing_replay_out", ValueError)
    checks.check_device(replay, "routing_replay_out", a.scores)


@entry(
    "scores bias n_group topk_group topk routed_scaling_factor topk_values topk_indices "
    "launch_with_pdl=True routing_replay_out=None * backend='default'"
)
def fused_topk_deepseek(a: Arguments) -> None:
    """Grouped top-k of sigmoid scores plus bias; weights are the unbiased scores, normalised.

    Args:
        scores: [T, E] router logits, float32, float16 or bfloat16.
        bias: [E] selection bias, any of these types.
        topk_values: [T, K], written, of the type of scores.
        topk_indices: int32 [T, K], written, in descending order of the biased scores.
        routing_replay_out: int16 [>= T, K], receives the indices.
        backend: "default" or "cake", which are the same here.

    Raises:
        ValueError, RuntimeError: as FlashInfer; `hopyard.fused_topk_deepseek` has no such limits.
    """
    _want(
        a.backend in ("default", "cake"),
        f"backend is {a.backend!r}, wanted 'default' or 'cake'",
    )
    checks.require(a.scores, "scores", "an array [num_tokens, num_experts]")
    checks.check_ndim(a.scores, "scores", 2)
    _check_topk_sizes(ops.shape_of(a.scores)[1], a.n_group, a.topk_group, a.topk)
    _check_topk_arrays(a)
    outputs = {"topk_values": a.topk_values, "topk_indices": a.topk_indices}
    if a.routing_replay_out is not None:
        outputs["routing_replay_out"] = a.routing_replay_out
    with flashinfer_errors():
        hopyard.fused_topk_deepseek(
            a.scores,
            a.bias,
            int(a.n_group),
            int(a.topk_group),
            int(a.topk),
            float(a.routed_scaling_factor),
            **outputs,
        )


# --- hash_topk


def _check_hash(a: Arguments) -> tuple[int, int, int]:
    """Tokens, experts and K."""
    for name in ("router_logits", "input_ids", "tid2eid"):
        _want(hasattr(getattr(a, name), "shape"), f"{name} must be a tensor")
    shape = ops.shape_of(a.router_logits)
    _want(
        len(shape) == 2 and ops.type_of(a.router_logits) == "float32",
        f"router_logits must be 2D float32; got {ops.type_of(a.router_logits)} {list(shape)}",
    )
    ids = ops.shape_of(a.input_ids)
    _want(
        ids == (shape[0],) and ops.type_of(a.input_ids) == "int64",
        f"input_ids must be int64 [{shape[0]}]; got {ops.type_of(a.input_ids)} {list(ids)}",
    )
    table = ops.shape_of(a.tid2eid)
    _want(
        len(table) == 2 and ops.type_of(a.tid2eid) == "int32",
        f"tid2eid must be 2D int32; got {ops.type_of(a.tid2eid)} {list(table)}",
    )
    shared, scale = a.num_fused_shared_experts, float(a.routed_scaling_factor)
    _want(shared in (0, 1), f"num_fused_shared_experts must be 0 or 1; got {shared}")
    _want(table[1] >= 1, f"topk must be at least 1; got tid2eid {list(table)}")
    _want(table[1] + shared <= 32, f"topk + shared experts must be at most 32; got {table[1]}")
    _want(shape[1] >= 1, "router_logits must have at least 1 expert; got 0")
    _want(
        shared == 0 or (math.isfinite(scale) and scale > 0),
        f"routed_scaling_factor must be positive and finite with a shared expert; got {scale}",
    )
    for name in ("router_logits", "input_ids", "tid2eid"):
        array = getattr(a, name)
        checks.check_device(array, name, a.router_logits, ValueError)
        checks.check_contiguous(array, name, ValueError)
    return shape[0], shape[1], table[1]


@entry(
    "router_logits input_ids tid2eid num_fused_shared_experts=0 routed_scaling_factor=1.0 "
    "launch_with_pdl=True"
)
def hash_topk(a: Arguments) -> tuple[Array, Array]:
    """Experts by token id; weights are sqrt(softplus(logit)), divided by their sum.

    Args:
        router_logits: float32 [T, E].
        input_ids: int64 [T].
        tid2eid: int32 [vocabulary, K]. A token id outside the table skips its token: ids -1 and
            weights 0 (undefined in FlashInfer).
        num_fused_shared_experts: 1 appends expert E with weight 1 / routed_scaling_factor.

    Returns:
        Weights float32 and ids int32, both [T, K + S].

    Raises:
        ValueError: any wrong argument.
    """
    tokens, experts, top_k = _check_hash(a)
    ids, weights = hopyard.route(
        a.router_logits,
        hopyard.RoutingRule.sqrt_softplus(),
        top_k,
        token_ids=a.input_ids,
        token_to_experts=a.tid2eid,
    )
    if a.num_fused_shared_experts == 0:
        return weights, ids
    all_weights = ops.empty(a.router_logits, (tokens, top_k + 1), "float32")
    all_ids = ops.empty(a.router_logits, (tokens, top_k + 1), "int32")
    all_weights[:, :top_k], all_ids[:, :top_k] = weights, ids
    all_weights[:, top_k], all_ids[:, top_k] = 1.0 / float(a.routed_scaling_factor), experts
    return all_weights, all_ids


# --- metadata

Ints = npt.NDArray[np.int32]


def max_ctas(slots: int, experts: int, tile: int) -> int:
    """Tiles that any routing of so many slots can need."""
    first = min(experts, slots)
    return first + (slots - first) // tile


@dataclass(frozen=True)
class Permutation:
    """Rows in expert order, every expert's rows padded to whole tiles; unused entries are -1."""

    total_padded: int
    expanded_to_permuted: Ints
    permuted_to_token: Ints
    counts: Ints
    tile_expert: Ints
    tile_limit: Ints
    num_tiles: int


def permute(ids: Ints, offset: int, local: int, sizes: tuple[int, int]) -> Permutation:
    """The padded permutation of local slots, in increasing slot order within an expert.

    Args:
        ids: global ids [T, slots].
        offset: first local id.
        local: local experts.
        sizes: tile, and the experts that bound the number of tiles.
    """
    tile, bound = sizes
    tokens, slots = ids.shape
    tiles = max_ctas(ids.size, bound, tile)
    flat = ids.reshape(-1).astype(np.int64) - offset
    here = (flat >= 0) & (flat < local)
    counts = np.bincount(flat[here], minlength=local).astype(np.int64)
    tiles_of = -(-counts // tile)
    first = np.cumsum(tiles_of) - tiles_of
    order = np.argsort(np.where(here, flat, local), kind="stable")[: int(here.sum())]
    rank = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(first * tile, counts) + rank
    expanded = np.full(ids.size, -1, np.int32)
    expanded[order] = rows
    to_token = np.full(tiles * tile, -1, np.int32)
    to_token[rows] = order // slots if slots else order
    num_tiles = int(tiles_of.sum())
    tile_expert = np.full(tiles, -1, np.int32)
    tile_limit = np.full(tiles, -1, np.int32)
    owner = np.repeat(np.arange(local), tiles_of)
    tile_expert[:num_tiles] = owner
    ends = (np.arange(num_tiles) + 1) * tile
    tile_limit[:num_tiles] = np.minimum(ends, (first * tile + counts)[owner])
    return Permutation(
        num_tiles * tile,
        expanded.reshape(tokens, slots),
        to_token,
        counts.astype(np.int32),
        tile_expert,
        tile_limit,
        num_tiles,
    )


class TrtllmGenRoutingResult(NamedTuple):
    """Result of `trtllm_gen_routing`; all int32 but the weights."""

    topk_ids: Array
    topk_weights: Array
    total_num_padded_tokens: Array
    expanded_idx_to_permuted_idx: Array
    permuted_idx_to_token_idx: Array
    cta_idx_xy_to_batch_idx: Array
    cta_idx_xy_to_mn_limit: Array
    num_non_exiting_ctas: Array


def _check_gen_routing(a: Arguments) -> RoutingMethodType:
    method = method_of(a.routing_method, ValueError)
    checks.require(a.routing_logits, "routing_logits", "an array [num_tokens, num_experts]")
    shape = ops.shape_of(a.routing_logits)
    _want(len(shape) == 2, f"routing_logits must be 2D; got shape {list(shape)}")
    _want(
        ops.is_type(a.routing_logits, "float32", "bfloat16"),
        f"routing_logits must be float32 or bfloat16; got {ops.type_of(a.routing_logits)}",
    )
    check(shape[0] >= 1, "routing_logits must have at least one token; got 0")
    experts = shape[1]
    _want(
        1 <= a.top_k <= experts, f"top_k must be between 1 and num_experts={experts}; got {a.top_k}"
    )
    if a.routing_bias is not None:
        _want(
            ops.numel(a.routing_bias) == experts,
            f"routing_bias must have num_experts={experts} elements; got "
            f"{ops.numel(a.routing_bias)}",
        )
    tile = a.tile_tokens_dim
    _want(
        tile >= 1 and tile & (tile - 1) == 0, f"tile_tokens_dim must be a power of two; got {tile}"
    )
    return method


def _check_gen_shared(a: Arguments, method: RoutingMethodType, experts: int, local: int) -> None:
    shared = a.num_fused_shared_experts
    if shared == 0:
        return
    check(
        shared > 0 and method is RoutingMethodType.DeepSeekV3 and int(a.n_group or 0) > 1,
        "fusing shared experts is only supported with grouped DeepSeekV3 routing; got "
        f"{method.name} with n_group={a.n_group}",
    )
    check(
        a.local_expert_offset == 0 and local == experts,
        "fusing shared experts does not go with expert parallelism; got "
        f"local_expert_offset={a.local_expert_offset}, local_num_experts={local} of {experts}",
    )


def _with_shared(ids: Ints, weights: npt.NDArray[np.float32], first: int, count: int) -> Any:
    tokens = ids.shape[0]
    more = np.tile(np.arange(first, first + count, dtype=np.int32), (tokens, 1))
    ones = np.ones((tokens, count), np.float32)
    return np.concatenate([ids, more], 1), np.concatenate([weights, ones], 1)


@entry(
    "routing_logits routing_bias routing_method top_k * num_fused_shared_experts=0 n_group=0 "
    "topk_group=0 local_expert_offset=0 local_num_experts=None routed_scaling_factor=1.0 "
    "tile_tokens_dim=8 norm_topk_prob=True enable_pdl=None"
)
def trtllm_gen_routing(a: Arguments) -> TrtllmGenRoutingResult:
    """The routing stage alone, with the padded permutation that FlashInfer's GEMMs use.

    Args:
        routing_logits: [T, E] float32 or bfloat16, T >= 1.
        routing_bias: [E] or None (zeros).
        routing_method: `RoutingMethodType`.
        tile_tokens_dim: rows of a tile, a power of two.

    Returns:
        Arrays of the kind of the logits. Ids that are not local are -1; entries that no row owns
        are -1 (uninitialised in FlashInfer).

    Raises:
        ValueError, RuntimeError: as FlashInfer.
    """
    method = _check_gen_routing(a)
    experts = ops.shape_of(a.routing_logits)[1]
    local = experts if a.local_num_experts is None else int(a.local_num_experts)
    offset = int(a.local_expert_offset)
    check(
        1 <= local <= experts and offset >= 0 and offset + local <= experts,
        f"expert offset and count must be within valid range: got {offset}, {local} of {experts}",
    )
    a.routing_method_type, a.num_experts = method, experts
    _check_gen_shared(a, method, experts, local)
    check_routing_limits(a)
    biased = method in (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)
    bias = a.routing_bias.reshape(-1) if biased and a.routing_bias is not None else None
    with flashinfer_errors():
        device_ids, device_weights = hopyard.route(
            a.routing_logits, rule_of(a), int(a.top_k), bias=bias
        )
    ids, weights = ops.to_numpy(device_ids), ops.to_numpy(device_weights)
    shared = int(a.num_fused_shared_experts)
    if shared:
        ids, weights = _with_shared(ids, weights, experts, shared)
    bound = experts + shared
    p = permute(ids, offset, local + shared, (int(a.tile_tokens_dim), bound))
    here = p.expanded_to_permuted >= 0

    def give(values: Any) -> Array:
        return ops.like_kind(np.atleast_1d(np.asarray(values, np.int32)), a.routing_logits)

    return TrtllmGenRoutingResult(
        give(np.where(here, ids, -1)),
        ops.bfloat16(ops.like_kind(weights, a.routing_logits)),
        give(p.total_padded),
        give(p.expanded_to_permuted),
        give(p.permuted_to_token),
        give(p.tile_expert),
        give(p.tile_limit),
        give(p.num_tiles),
    )


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
    shape = ops.shape_of(a.topk_ids)
    _want(
        len(shape) == 2 and shape[1] == a.top_k,
        f"topk_ids must have shape [num_tokens, {a.top_k}]; got {list(shape)}",
    )
    _want(
        ops.type_of(a.topk_ids) == "int32", f"topk_ids must be int32; got {ops.type_of(a.topk_ids)}"
    )
    _want(len(set(tile_ns)) == len(tile_ns), f"tile_ns must contain unique values; got {tile_ns}")
    _want(
        1 <= len(tile_ns) <= _MAX_TILES,
        f"tile_ns must have 1 .. {_MAX_TILES} values; got {tile_ns}",
    )
    _want(min(tile_ns) >= 1, f"tile_ns must be positive; got {tile_ns}")
    mode = RoutingInputMode(a.routing_input_mode)
    _want(
        mode is not RoutingInputMode.FromLogits,
        "routing_input_mode must be PackedPrecomputed or UnpackedPrecomputed; got FromLogits",
    )
    unpacked = mode is RoutingInputMode.UnpackedPrecomputed
    _want(
        (a.topk_weights is not None) == unpacked,
        f"topk_weights must be {'given' if unpacked else 'None'} for {mode.name}",
    )


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
        RoutingInputMode(a.routing_input_mode),
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
        ValueError: the shape differs from the one that was allocated for.
    """
    shape = ops.shape_of(metadata.slots[0].expert_weights)
    _want(
        ops.shape_of(topk_ids) == shape,
        f"topk_ids has shape {list(ops.shape_of(topk_ids))}, wanted {list(shape)} as allocated",
    )
    ids = ops.to_numpy(topk_ids)
    if metadata.routing_input_mode is RoutingInputMode.PackedPrecomputed:
        bits = (ids & 0xFFFF).astype(np.uint16)
        ids = ids >> 16
        weights = ops.like_kind(from_bf16(bits), topk_ids)
    else:
        _want(topk_weights is not None, "topk_weights is None, wanted weights of unpacked ids")
        weights = topk_weights
    for slot in metadata.slots:
        sizes = (slot.tile_n, metadata.num_experts)
        p = permute(ids, metadata.local_expert_offset, metadata.num_local_experts, sizes)
        _fill_slot(slot, p, metadata, weights)


def _fill_slot(
    slot: TrtllmMoERoutingMetadataSlot,
    p: Permutation,
    metadata: TrtllmMoERoutingMetadata,
    weights: Array,
) -> None:
    padded = -(-p.counts // slot.tile_n) * slot.tile_n
    starts = np.cumsum(padded) - padded
    contents = {
        "total_num_padded_tokens": np.array([p.total_padded], np.int32),
        "expanded_idx_to_permuted_idx": p.expanded_to_permuted.reshape(-1),
        "permuted_idx_to_token_idx": p.permuted_to_token,
        "expert_count_histogram": np.concatenate([starts, padded]).astype(np.int32),
        "num_tokens_per_expert": p.counts,
        "cta_idx_xy_to_batch_idx": p.tile_expert,
        "cta_idx_xy_to_mn_limit": p.tile_limit,
        "num_non_exiting_ctas": np.array([p.num_tiles], np.int32),
    }
    for name, values in contents.items():
        array = getattr(slot, name)
        array[: values.size] = ops.like_kind(values, array)
    same = ops.type_of(weights) == ops.type_of(slot.expert_weights)
    slot.expert_weights[...] = weights if same else ops.bfloat16(weights)


def pack_topk_ids(ids: Array, weights: Array) -> Array:
    """ids and weights [T, K] in the packed format: id << 16 | bfloat16 bits, masked."""
    bits = ops.to_numpy(ops.bfloat16(ops.float32(weights))).astype(np.int32)
    packed = (ops.to_numpy(ids).astype(np.int32) << 16) | (bits & 0xFFFF)
    return ops.like_kind(packed, ids)
