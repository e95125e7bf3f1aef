# SPDX-License-Identifier: Apache-2.0
"""Routing alone: logits -> expert ids and weights."""

from __future__ import annotations

from typing import Any, Literal

from hopyard._library import lib
from hopyard.arrays import (
    Array,
    as_output,
    as_tensor,
    dtype_name,
    empty_like_kind,
    gradients_enabled,
    is_torch,
    refuse_gradients,
    token_count,
)
from hopyard.devices import device_of, stream_of
from hopyard.spec import RoutingRule, rule_to_map

_ROUTE_INPUTS = {"forced_ids", "token_ids", "token_to_experts"}
_ROUTE_RESULTS = {"ids_out", "weights_out"}


def route(
    logits: Array,
    rule: RoutingRule,
    top_k: int,
    *,
    bias: Array | None = None,
    weights_dtype: Literal["float32", "bfloat16"] | None = None,
    replay_out: Array | None = None,
    load_out: Array | None = None,
    num_tokens: int | Array | None = None,
    stream: int | None = None,
    **others: Array,
) -> tuple[Array, Array]:
    """Choose and weight the experts of every token; bit-identical to the routing of a layer.

    On a GPU, where all arrays lie with the logits, one kernel with the bits of the CPU is enqueued.

    Args:
        logits: [T, E] float32, bfloat16 (uint16 bits in NumPy) or float16.
        rule: the routing method.
        top_k: K.
        bias: [E] selection bias, the same dtypes; None = zeros.
        weights_dtype: dtype of the weights returned; None is that of `weights_out`, else float32.
        replay_out: [>= T, K] int16, receives the ids.
        load_out: [E] int32 or int64, is increased by the tokens of each expert.
        num_tokens: live rows, at most T; later rows are left alone (id -1, weight 0 in new
            arrays). An int is the same as fewer rows; an int32 scalar array lies with the logits.
        stream: GPU: handle of the CUDA stream, as for a layer's call.
        **others: `ids_out` [T, K] int32 and `weights_out` [T, K] float32 or bfloat16, written
            instead of new arrays. `forced_ids` [T, K] int16 or int32: ids given, weights recomputed
            from logits (an id outside [0, E) skips its slot); or `token_ids` [T] int32 or int64 and
            `token_to_experts` [vocabulary, K] int32: ids by token id.

    Returns:
        ids [T, K] int32 in descending score order (-1 = skipped), weights [T, K]: `ids_out` and
        `weights_out` where they are given, else new arrays of the kind of `logits`.

    Raises:
        ValueError: naming the argument, what it is and what was wanted.
    """
    unknown = sorted(others.keys() - _ROUTE_INPUTS - _ROUTE_RESULTS)
    if unknown:
        raise TypeError(f"route got unexpected arguments {unknown}")
    given = {name: array for name, array in others.items() if array is not None}
    if gradients_enabled():
        refuse_gradients({"logits": logits, "bias": bias, **given})
    handle = stream_of(device_of(logits), stream, uses_torch=is_torch(logits))
    inputs = {"logits": as_tensor(logits, "logits", handle)}
    for name, array in {"bias": bias, **given}.items():
        if array is not None and name not in _ROUTE_RESULTS:
            inputs[name] = as_tensor(array, name, handle)
    if num_tokens is not None:
        inputs["num_tokens"] = token_count(num_tokens, handle)
    ids, weights = given.get("ids_out"), given.get("weights_out")
    if weights is not None:
        _check_dtype(weights, weights_dtype)
    shape = (int(logits.shape[0]), top_k)
    no_id, no_weight = (-1, 0) if num_tokens is not None else (None, None)
    if ids is None:
        ids = empty_like_kind(logits, shape, "int32", fill=no_id, stream=handle)
    if weights is None:
        dtype = weights_dtype or "float32"
        weights = empty_like_kind(logits, shape, dtype, fill=no_weight, stream=handle)
    outputs = {
        "expert_ids": as_output(ids, "ids_out", handle),
        "weights": as_output(weights, "weights_out", handle),
    }
    if replay_out is not None:
        outputs["replay"] = as_output(replay_out, "replay_out", handle)
    if load_out is not None:
        outputs["expert_load"] = as_output(load_out, "load_out", handle)
    lib.route(rule_to_map(rule), top_k, inputs, outputs, handle)
    return ids, weights


def _check_dtype(weights_out: Array, wanted: str | None) -> None:
    """Refuse weights of another dtype than the caller asked for; NumPy's bfloat16 are uint16."""
    name = dtype_name(weights_out)
    if wanted is None or name == wanted or (wanted == "bfloat16" and name == "uint16"):
        return
    raise ValueError(
        f"weights_out has dtype {name}, wanted {wanted}, the weights_dtype; leave weights_dtype "
        "out, and the dtype is that of weights_out"
    )


def fused_topk_deepseek(
    scores: Array,
    bias: Array,
    num_groups: int,
    top_groups: int,
    top_k: int,
    scaling_factor: float,
    stream: int | None = None,
    **outputs: Array,
) -> tuple[Array, Array]:
    """FlashInfer's operation of this name, without its compiled limits.

    Sigmoid scores plus bias choose experts within the best groups; weights are the unbiased scores,
    normalised and scaled.

    Args:
        scores: [T, E] router logits, float32, bfloat16 (uint16 bits in NumPy) or float16.
        bias: [E] selection bias, the same dtypes.
        num_groups: groups of equal size.
        top_groups: groups kept.
        top_k: K.
        scaling_factor: multiplies every weight.
        stream: GPU: handle of the CUDA stream, as for a layer's call.
        **outputs: arrays to write into: `topk_values` [T, K] of the dtype of scores,
            `topk_indices` [T, K] int32, `routing_replay_out` [>= T, K] int16.

    Returns:
        values [T, K] of the dtype of scores, indices [T, K] int32.

    Raises:
        ValueError: naming the argument, what it is and what was wanted.
    """
    unknown = sorted(set(outputs) - {"topk_values", "topk_indices", "routing_replay_out"})
    if unknown:
        raise TypeError(f"fused_topk_deepseek got unexpected arguments {unknown}")
    if gradients_enabled():
        refuse_gradients({"scores": scores, "bias": bias, **outputs})
    handle = stream_of(device_of(scores), stream, uses_torch=is_torch(scores))
    shape = (int(scores.shape[0]), top_k)
    name = dtype_name(scores)
    values = outputs.get("topk_values")
    if values is None:
        values = empty_like_kind(scores, shape, name, stream=handle)
    indices = outputs.get("topk_indices")
    if indices is None:
        indices = empty_like_kind(scores, shape, "int32", stream=handle)
    tensors: dict[str, Any] = {
        "scores": as_tensor(scores, "scores", handle),
        "bias": as_tensor(bias, "bias", handle),
        "topk_values": as_output(values, "topk_values", handle),
        "topk_indices": as_output(indices, "topk_indices", handle),
    }
    if outputs.get("routing_replay_out") is not None:
        replay = outputs["routing_replay_out"]
        tensors["replay"] = as_output(replay, "routing_replay_out", handle)
    rule = RoutingRule.deepseek_v3(num_groups, top_groups, scaling_factor)
    lib.fused_topk_deepseek(rule_to_map(rule), tensors, handle)
    return values, indices
