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


def route(
    logits: Array,
    rule: RoutingRule,
    top_k: int,
    *,
    bias: Array | None = None,
    weights_dtype: Literal["float32", "bfloat16"] = "float32",
    replay_out: Array | None = None,
    load_out: Array | None = None,
    num_tokens: int | Array | None = None,
    stream: int | None = None,
    **forced: Array,
) -> tuple[Array, Array]:
    """Choose and weight the experts of every token; bit-identical to the routing of a layer.

    On a GPU, where all arrays lie with the logits, one kernel with the bits of the CPU is enqueued.

    Args:
        logits: [T, E] float32, bfloat16 (uint16 bits in NumPy) or float16.
        rule: the routing method.
        top_k: K.
        bias: [E] selection bias, the same dtypes; None = zeros.
        weights_dtype: dtype of the weights returned.
        replay_out: [>= T, K] int16, receives the ids.
        load_out: [E] int32 or int64, is increased by the tokens of each expert.
        num_tokens: live rows, at most T; later rows are left alone (id -1, weight 0 in the arrays
            returned). An int is the same as fewer rows; an int32 scalar array lies with the logits.
        stream: GPU: handle of the CUDA stream, as for a layer's call.
        **forced: `forced_ids` [T, K] int16 or int32: ids given, weights recomputed from logits
            (an id outside [0, E) skips its slot); or `token_ids` [T] int32 or int64 and
            `token_to_experts` [vocabulary, K] int32: ids by token id.

    Returns:
        ids [T, K] int32 in descending score order (-1 = skipped), weights [T, K]. Arrays of the
        kind of `logits`.

    Raises:
        ValueError: naming the argument, what it is and what was wanted.
    """
    unknown = sorted(set(forced) - {"forced_ids", "token_ids", "token_to_experts"})
    if unknown:
        raise TypeError(f"route got unexpected arguments {unknown}")
    if gradients_enabled():
        refuse_gradients({"logits": logits, "bias": bias})
    handle = stream_of(device_of(logits), stream, uses_torch=is_torch(logits))
    inputs = {"logits": as_tensor(logits, "logits", handle)}
    for name, array in {"bias": bias, **forced}.items():
        if array is not None:
            inputs[name] = as_tensor(array, name, handle)
    if num_tokens is not None:
        inputs["num_tokens"] = token_count(num_tokens, handle)
    shape = (int(logits.shape[0]), top_k)
    no_id, no_weight = (-1, 0) if num_tokens is not None else (None, None)
    ids = empty_like_kind(logits, shape, "int32", fill=no_id, stream=handle)
    weights = empty_like_kind(logits, shape, weights_dtype, fill=no_weight, stream=handle)
    outputs = {
        "expert_ids": as_output(ids, "ids", handle),
        "weights": as_output(weights, "weights", handle),
    }
    if replay_out is not None:
        outputs["replay"] = as_output(replay_out, "replay_out", handle)
    if load_out is not None:
        outputs["expert_load"] = as_output(load_out, "load_out", handle)
    lib.route(rule_to_map(rule), top_k, inputs, outputs, handle)
    return ids, weights


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
