# SPDX-License-Identifier: Apache-2.0
"""Routing alone: FlashInfer's routing operations, and the padded permutation of its GEMMs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import hopyard
from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import check_routing_limits, method_of, rule_of
from hopyard.compat.flashinfer.engine import flashinfer_errors
from hopyard.compat.flashinfer.enums import RoutingMethodType
from hopyard.compat.flashinfer.signature import Arguments, entry

_FLOATS = ("float32", "bfloat16", "float16")


def want(condition: bool, message: str) -> None:
    """`check` with ValueError."""
    check(condition, message, ValueError)


# --- fused_topk_deepseek


def _check_topk_sizes(experts: int, groups: int, kept: int, top_k: int) -> None:
    want(
        groups >= 1 and kept >= 1 and top_k >= 1,
        f"n_group, topk_group and topk must be positive; got {groups}, {kept}, {top_k}",
    )
    want(
        kept * groups >= top_k,
        f"topk_group * n_group must be at least topk={top_k}; got {kept} * {groups}",
    )
    want(kept <= groups, f"topk_group={kept} must not be larger than n_group={groups}")
    if groups == 1:
        want(experts <= 384, f"num_experts must be at most 384 without groups; got {experts}")
        want(top_k <= 8, f"topk must be at most 8; got {top_k}")
        return
    size = experts / groups
    want(top_k <= 8, f"topk must be at most 8 with n_group={groups}; got {top_k}")
    want(size <= 32, f"a group has num_experts / n_group = {size} experts, wanted at most 32")
    want(
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
    want(
        ops.is_type(replay, "int16"),
        f"routing_replay_out must be int16; got {ops.type_of(replay)}",
    )
    shape = ops.shape_of(replay)
    want(
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
    checks.refuse_gradients(a)
    want(
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
        want(hasattr(getattr(a, name), "shape"), f"{name} must be a tensor")
    shape = ops.shape_of(a.router_logits)
    want(
        len(shape) == 2 and ops.type_of(a.router_logits) == "float32",
        f"router_logits must be 2D float32; got {ops.type_of(a.router_logits)} {list(shape)}",
    )
    ids = ops.shape_of(a.input_ids)
    want(
        ids == (shape[0],) and ops.type_of(a.input_ids) == "int64",
        f"input_ids must be int64 [{shape[0]}]; got {ops.type_of(a.input_ids)} {list(ids)}",
    )
    table = ops.shape_of(a.tid2eid)
    want(
        len(table) == 2 and ops.type_of(a.tid2eid) == "int32",
        f"tid2eid must be 2D int32; got {ops.type_of(a.tid2eid)} {list(table)}",
    )
    shared, scale = a.num_fused_shared_experts, float(a.routed_scaling_factor)
    want(shared in (0, 1), f"num_fused_shared_experts must be 0 or 1; got {shared}")
    want(table[1] >= 1, f"topk must be at least 1; got tid2eid {list(table)}")
    want(table[1] + shared <= 32, f"topk + shared experts must be at most 32; got {table[1]}")
    want(shape[1] >= 1, "router_logits must have at least 1 expert; got 0")
    want(
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
        NotImplementedError: gradients are enabled and an argument requires one.
    """
    checks.refuse_gradients(a)
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


# --- trtllm_gen_routing


def max_ctas(slots: int, experts: int, tile: int) -> int:
    """Tiles that any routing of so many slots can need."""
    first = min(experts, slots)
    return first + (slots - first) // tile


@dataclass(frozen=True)
class Permutation:
    """Rows in expert order, every expert's rows padded to whole tiles; unused entries are -1.

    All int32; the first two have one element.
    """

    total_padded: Array
    num_tiles: Array
    expanded_to_permuted: Array
    permuted_to_token: Array
    counts: Array
    starts: Array
    padded: Array
    tile_expert: Array
    tile_limit: Array


def permute(ids: Array, offset: int, local: int, sizes: tuple[int, int]) -> Permutation:
    """The padded permutation of local slots, in increasing slot order within an expert.

    Every shape follows from the arguments, so that nothing is read back from a GPU.

    Args:
        ids: global ids [T, slots].
        offset: first local id.
        local: local experts, at least one.
        sizes: tile, and the experts that bound the number of tiles.
    """
    tile, bound = sizes
    tokens, slots = ops.shape_of(ids)
    tiles = max_ctas(tokens * slots, bound, tile)
    xp = ops.namespace(ids)
    flat = ops.cast(ids.reshape(-1), "int64") - offset
    # Slots of other ranks come last, as those of one more expert.
    expert = xp.where((flat >= 0) & (flat < local), flat, local)
    order = ops.stable_order(expert)
    expert = expert[order]
    begins = xp.searchsorted(expert, ops.arange(ids, local + 1))
    counts = begins[1:] - begins[:-1]
    ends = xp.cumsum((counts + tile - 1) // tile, 0)  # tiles up to an expert's last one
    padded = (counts + tile - 1) // tile * tile
    starts = ends * tile - padded

    own = expert.clip(max=local - 1)
    rows = starts[own] + ops.arange(ids, tokens * slots) - begins[expert]
    rows = xp.where(expert < local, rows, -1)
    expanded = ops.empty(ids, (tokens * slots,), "int64")
    expanded[order] = rows
    to_token = ops.full(ids, (tiles * tile + 1,), -1, "int64")
    to_token[rows] = order // max(slots, 1)  # those without a row at the end, which is cut off

    place = ops.arange(ids, tiles)
    owner = xp.searchsorted(ends, place, side="right")
    used = owner < local
    limit = (starts + counts)[owner.clip(max=local - 1)]
    limit = xp.where((place + 1) * tile < limit, (place + 1) * tile, limit)
    parts = {
        "total_padded": ends[-1:] * tile,
        "num_tiles": ends[-1:],
        "expanded_to_permuted": expanded.reshape(tokens, slots),
        "permuted_to_token": to_token[:-1],
        "counts": counts,
        "starts": starts,
        "padded": padded,
        "tile_expert": xp.where(used, owner, -1),
        "tile_limit": xp.where(used, limit, -1),
    }
    return Permutation(**{name: ops.cast(part, "int32") for name, part in parts.items()})


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
    checks.require_memory(a.routing_logits, "routing_logits")
    shape = ops.shape_of(a.routing_logits)
    want(len(shape) == 2, f"routing_logits must be 2D; got shape {list(shape)}")
    want(
        ops.is_type(a.routing_logits, "float32", "bfloat16"),
        f"routing_logits must be float32 or bfloat16; got {ops.type_of(a.routing_logits)}",
    )
    check(shape[0] >= 1, "routing_logits must have at least one token; got 0")
    experts = shape[1]
    want(
        1 <= a.top_k <= experts, f"top_k must be between 1 and num_experts={experts}; got {a.top_k}"
    )
    if a.routing_bias is not None:
        want(
            ops.numel(a.routing_bias) == experts,
            f"routing_bias must have num_experts={experts} elements; got "
            f"{ops.numel(a.routing_bias)}",
        )
    tile = a.tile_tokens_dim
    want(
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


def _with_shared(ids: Array, weights: Array, first: int, count: int) -> tuple[Array, Array]:
    """`count` more slots for every token: experts from `first` on, with weights of 1."""
    tokens, top_k = ops.shape_of(ids)
    all_ids = ops.empty(ids, (tokens, top_k + count), "int32")
    all_weights = ops.full(weights, (tokens, top_k + count), 1.0)
    all_ids[:, :top_k], all_weights[:, :top_k] = ids, weights
    for shared in range(count):
        all_ids[:, top_k + shared] = first + shared
    return all_ids, all_weights


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
    checks.refuse_gradients(a)
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
        ids, weights = hopyard.route(a.routing_logits, rule_of(a), int(a.top_k), bias=bias)
    shared = int(a.num_fused_shared_experts)
    if shared:
        ids, weights = _with_shared(ids, weights, experts, shared)
    p = permute(ids, offset, local + shared, (int(a.tile_tokens_dim), experts + shared))
    here = p.expanded_to_permuted >= 0
    return TrtllmGenRoutingResult(
        ops.cast(ops.namespace(ids).where(here, ids, -1), "int32"),
        ops.bfloat16(weights),
        p.total_padded,
        p.expanded_to_permuted,
        p.permuted_to_token,
        p.tile_expert,
        p.tile_limit,
        p.num_tiles,
    )
