# SPDX-License-Identifier: Apache-2.0
"""Routing alone: logits -> expert ids and weights."""

from __future__ import annotations

from typing import Any, Literal

from hopyard._library import lib
from hopyard.arrays import Array, as_output, as_tensor, dtype_name, empty_like_kind, token_count
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
    **forced: Array,
) -> tuple[Array, Array]:
    """Choose and weight the experts of every token; bit-identical to the routing of a layer.

    Args:
        logits: [T, E] float32, bfloat16 (uint16 bits in NumPy) or float16.
        rule: the routing method.
        top_k: K.
        bias: [E] selection bias, the same dtypes; None = zeros.
        weights_dtype: dtype of the weights returned.
        replay_out: [>= T, K] int16, receives the ids.
        load_out: [E] int32 or int64, is increased by the tokens of each expert.
        num_tokens: live rows, at most T; later rows are left alone (id -1, weight 0 in the arrays
            returned).
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
    inputs = {"logits": as_tensor(logits, "logits")}
    for name, array in {"bias": bias, **forced}.items():
        if array is not None:
            inputs[name] = as_tensor(array, name)
    if num_tokens is not None:
        inputs["num_tokens"] = token_count(num_tokens)
    shape = (int(logits.shape[0]), top_k)
    partial = num_tokens is not None
    ids = empty_like_kind(logits, shape, "int32", zero=partial)
    if partial:
        ids -= 1
    weights = empty_like_kind(logits, shape, weights_dtype, zero=partial)
    outputs = {"expert_ids": as_output(ids, "ids"), "weights": as_output(weights, "weights")}
    if replay_out is not None:
        outputs["replay"] = as_output(replay_out, "replay_out")
    if load_out is not None:
        outputs["expert_load"] = as_output(load_out, "load_out")
    lib.route(rule_to_map(rule), top_k, inputs, outputs)
    return ids, weights


def fused_topk_deepseek(
    scores: Array,
    bias: Array,
    num_groups: int,
    top_groups: int,
    top_k: int,
    scaling_factor: float,
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
    shape = (int(scores.shape[0]), top_k)
    name = dtype_name(scores)
    values = outputs.get("topk_values")
    if values is None:
        values = empty_like_kind(scores, shape, name)
    indices = outputs.get("topk_indices")
    if indices is None:
        indices = empty_like_kind(scores, shape, "int32")
    tensors: dict[str, Any] = {
        "scores": as_tensor(scores, "scores"),
        "bias": as_tensor(bias, "bias"),
        "topk_values": as_output(values, "topk_values"),
        "topk_indices": as_output(indices, "topk_indices"),
    }
    if outputs.get("routing_replay_out") is not None:
        tensors["replay"] = as_output(outputs["routing_replay_out"], "routing_replay_out")
    rule = RoutingRule.deepseek_v3(num_groups, top_groups, scaling_factor)
    lib.fused_topk_deepseek(rule_to_map(rule), tensors)
    return values, indices
