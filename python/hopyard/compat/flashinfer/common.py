# SPDX-License-Identifier: Apache-2.0
"""What all operations have in common: sizes, routing, optional inputs and results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hopyard import Activation, ExpertMap, MoeSpec, RoutingRule, SharedExperts
from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.autotuner_moe import Operation
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.engine import Experts, run
from hopyard.compat.flashinfer.enums import (
    ActivationType,
    RoutingMethodType,
    WeightLayout,
    is_gated_activation,
)
from hopyard.compat.flashinfer.signature import Arguments

_KINDS = {
    ActivationType.Swiglu: "swiglu",
    ActivationType.Geglu: "geglu",
    ActivationType.Situ: "situ",
    ActivationType.Relu2: "relu2",
    ActivationType.Identity: "identity",
}
_BIASED = (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)
_RENORMALIZE = (RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)


@dataclass(frozen=True)
class Problem:
    """Sizes of a call, checked."""

    tokens: int
    hidden: int
    inter: int
    num_experts: int
    top_k: int
    offset: int
    local: int
    shared: int
    activation: ActivationType

    @property
    def gated(self) -> bool:
        """Whether GEMM1 has a gate."""
        return is_gated_activation(self.activation)

    @property
    def rows(self) -> int:
        """Rows of GEMM1."""
        return (2 if self.gated else 1) * self.inter

    @property
    def experts(self) -> int:
        """Experts with weights here: local and shared ones."""
        return self.local + self.shared

    @property
    def slots(self) -> int:
        """Experts of a token."""
        return self.top_k + self.shared


def activation_of(activation: ActivationType) -> ActivationType:
    """The activation of an operation, or FlashInfer's refusal."""
    known = [a.name for a in _KINDS]
    check(
        activation is not ActivationType.InvalidType,
        f"Invalid activation type: {int(activation)}; activation_type must be one of {known}",
    )
    kind = "gated" if is_gated_activation(activation) else "eltwise"
    check(
        activation in _KINDS,
        f"Unsupported {kind} activation type {activation.name}; activation_type must be one of "
        f"{known}",
    )
    return activation


def problem_of(a: Arguments, hidden_size: int) -> Problem:
    """Check and collect the sizes of a call.

    Raises:
        NotImplementedError: gradients are enabled and an argument requires one.
        RuntimeError: sizes or ranges that mean nothing.
    """
    checks.refuse_gradients(a)
    checks.check_ndim(a.hidden_states, "hidden_states", 2)
    checks.require_memory(a.hidden_states, "hidden_states")
    experts, top_k = int(a.num_experts), int(a.top_k)
    check(
        1 <= top_k <= experts,
        f"top_k must be between 1 and num_experts={experts}; got {top_k}",
    )
    local, offset = int(a.local_num_experts), int(a.local_expert_offset)
    check(
        1 <= local <= experts,
        f"local_num_experts must be between 1 and num_experts={experts}; got {local}",
    )
    check(
        offset >= 0 and offset + local <= experts,
        f"expert offset and count must be within valid range: got local_expert_offset={offset} "
        f"with local_num_experts={local}, wanted a range within 0 .. num_experts={experts}",
    )
    inter = int(a.intermediate_size)
    check(
        inter > 0 and hidden_size > 0,
        f"intermediate_size must be positive and hidden_states must have columns; got {inter} "
        f"and {hidden_size}",
    )
    return Problem(
        tokens=ops.shape_of(a.hidden_states)[0],
        hidden=hidden_size,
        inter=inter,
        num_experts=experts,
        top_k=top_k,
        offset=offset,
        local=local,
        shared=int(getattr(a, "num_fused_shared_experts", None) or 0),
        activation=activation_of(getattr(a, "activation_type", ActivationType.Swiglu)),
    )


def check_layout(weight_layout: WeightLayout) -> WeightLayout:
    """The order of weights, or FlashInfer's refusal."""
    check(
        weight_layout is not WeightLayout.MajorMn,
        "Unsupported weight_layout: MajorMn; wanted MajorK or BlockMajorK",
        NotImplementedError,
    )
    return weight_layout


# --- routing


def method_of(
    method: RoutingMethodType, error: type[Exception] = RuntimeError
) -> RoutingMethodType:
    """The routing method, or FlashInfer's refusal."""
    known = method is not RoutingMethodType.Unspecified
    check(
        known,
        f"Unimplemented routing method: {int(method)}; routing_method_type must be one of 0 .. 9",
        error,
    )
    return method


def rule_of(a: Arguments) -> RoutingRule:
    """The routing rule of a call from logits."""
    method = method_of(a.routing_method_type)
    scale = 1.0 if a.routed_scaling_factor is None else float(a.routed_scaling_factor)
    if method is RoutingMethodType.DeepSeekV3:
        groups, kept = int(a.n_group or 0), int(a.topk_group or 0)
        if groups <= 1:
            return RoutingRule.deepseek_v3(scaling_factor=scale)
        return RoutingRule.deepseek_v3(groups, kept, scale)
    if method is RoutingMethodType.MiniMax2:
        return RoutingRule.minimax2(scale)
    if method is RoutingMethodType.SigmoidRenorm:
        return RoutingRule.sigmoid_renorm(bool(a.norm_topk_prob))
    if method is RoutingMethodType.Llama4:
        check(int(a.top_k) == 1, f"Llama4 routing wants top_k=1; got {a.top_k}")
        return RoutingRule.llama4()
    return {
        RoutingMethodType.Default: RoutingRule.default,
        RoutingMethodType.Renormalize: RoutingRule.renormalize,
        RoutingMethodType.RenormalizeNaive: RoutingRule.renormalize,
        RoutingMethodType.TopK: RoutingRule.top_k,
        RoutingMethodType.Sigmoid: RoutingRule.sigmoid,
        RoutingMethodType.TopKSigmoid: RoutingRule.top_k_sigmoid,
    }[method]()


def check_routing_limits(a: Arguments) -> None:
    """The limits that `trtllm_fp8_block_scale_moe` and `trtllm_gen_routing` state."""
    method = method_of(a.routing_method_type)
    experts, top_k = int(a.num_experts), int(a.top_k)
    groups, kept = int(a.n_group or 0), int(a.topk_group or 0)
    if method is not RoutingMethodType.DeepSeekV3:
        check(
            groups <= 1 and kept <= 1,
            f"routing method {method.name} only supports n_group <= 1 and topk_group <= 1; got "
            f"n_group={groups}, topk_group={kept}",
        )
    else:
        _check_groups(experts, top_k, groups, kept)
    if method in _RENORMALIZE:
        check(top_k <= 32, f"routing method {method.name} only supports top_k<=32; got {top_k}")


def _check_groups(experts: int, top_k: int, groups: int, kept: int) -> None:
    check(groups != 0, "n_group should not be zero for DeepSeekV3 routing; got 0, wanted 1 or more")
    check(experts % groups == 0, f"num_experts={experts} must be divisible by n_group={groups}")
    most = 8 if experts <= 384 else 22
    check(
        top_k <= most,
        f"DeepSeekV3 routing of {experts} experts only supports top_k<={most}; got {top_k}",
    )
    if groups == 1:
        return
    check(kept != 0, f"topk_group must be given with n_group={groups}; got 0")
    check(kept <= 4, f"DeepSeekV3 routing only supports topk_group<=4; got {kept}")
    check(kept <= groups, f"n_group={groups} must not be smaller than topk_group={kept}")
    candidates = kept * experts // groups
    check(
        top_k < candidates,
        f"top_k={top_k} must be less than total number of experts in selected groups, {candidates}",
    )


def check_shared(a: Arguments, p: Problem) -> None:
    """FlashInfer's rules of fused shared experts."""
    if p.shared == 0:
        return
    check(p.shared > 0, f"num_fused_shared_experts must not be negative; got {p.shared}")
    check(
        p.offset == 0 and p.local == p.num_experts,
        "num_fused_shared_experts > 0 does not go with expert parallelism: got "
        f"local_expert_offset={p.offset}, local_num_experts={p.local} of {p.num_experts}",
        ValueError,
    )
    check(
        a.routing_method_type is RoutingMethodType.DeepSeekV3,
        "num_fused_shared_experts > 0 is only supported with DeepSeekV3 routing; got "
        f"{method_of(a.routing_method_type).name}",
        ValueError,
    )
    check(
        int(a.n_group or 0) > 1,
        f"fusing shared experts needs grouped routing, n_group > 1; got n_group={a.n_group}",
    )


def _logits_call(a: Arguments, p: Problem) -> dict[str, Any]:
    logits = a.routing_logits
    if logits is None:
        raise checks.MissingArgument("either topk_ids or routing_logits must be provided; got none")
    checks.require(logits, "routing_logits", "an array [num_tokens, num_experts]")
    check(
        ops.is_type(logits, "float32", "bfloat16"),
        f"routing_logits must be float or bfloat16; got {ops.type_of(logits)}",
    )
    shape = ops.shape_of(logits)
    check(len(shape) == 2, f"routing_logits must be 2D; got shape {list(shape)}")
    check(
        shape[0] == p.tokens,
        f"routing_logits and hidden_states must have the same number of tokens; got {shape[0]} "
        f"and {p.tokens}",
    )
    check(
        shape[1] == p.num_experts,
        f"routing_logits dim1 must match num_experts={p.num_experts}; got {shape[1]}",
    )
    checks.check_contiguous(logits, "routing_logits")
    checks.check_device(logits, "routing_logits", a.hidden_states)
    call = {"logits": logits}
    bias = getattr(a, "routing_bias", None)
    if bias is not None:
        _check_bias(bias, p, a.hidden_states)
        if method_of(a.routing_method_type) in _BIASED:
            call["routing_bias"] = bias
    return call


def _check_bias(bias: Array, p: Problem, hidden: Array) -> None:
    check(
        ops.is_type(bias, "float32", "bfloat16"),
        f"routing_bias must be float or bfloat16; got {ops.type_of(bias)}",
    )
    checks.check_ndim(bias, "routing_bias", 1)
    check(
        ops.shape_of(bias) == (p.num_experts,),
        f"routing_bias has incorrect shape: got {list(ops.shape_of(bias))}, wanted "
        f"[{p.num_experts}]",
    )
    checks.check_device(bias, "routing_bias", hidden)


def _check_ids(ids: Array, p: Problem, hidden: Array) -> None:
    checks.require(ids, "topk_ids", "an int32 array [num_tokens, top_k]")
    if not ops.is_type(ids, "int32"):
        raise checks.MissingArgument(f"topk_ids must be an int32 tensor; got {ops.type_of(ids)}")
    shape = ops.shape_of(ids)
    check(len(shape) == 2, f"topk_ids must be 2D; got shape {list(shape)}")
    check(
        shape[0] == p.tokens,
        f"topk_ids and hidden_states must have the same number of tokens; got {shape[0]} and "
        f"{p.tokens}",
    )
    check(shape[1] == p.top_k, f"topk_ids dim1 must match top_k={p.top_k}; got {shape[1]}")
    checks.check_contiguous(ids, "topk_ids")
    checks.check_device(ids, "topk_ids", hidden)


def _ids_call(a: Arguments, p: Problem) -> dict[str, Any]:
    given = a.topk_ids
    if given is None:
        raise checks.MissingArgument("either topk_ids or routing_logits must be provided; got none")
    if not isinstance(given, (tuple, list)):
        _check_ids(given, p, a.hidden_states)
        return {"packed": given}
    if len(given) != 2:
        raise checks.MissingArgument(
            f"topk_ids is a sequence of {len(given)}; wanted (ids, expert_weights)"
        )
    ids, weights = given
    _check_ids(ids, p, a.hidden_states)
    if weights is None or not ops.is_type(weights, "bfloat16", "float32"):
        kind = None if weights is None else ops.type_of(weights)
        raise checks.MissingArgument(f"expert_weights must be bfloat16 or float32; got {kind}")
    if ops.shape_of(weights) != (p.tokens, p.top_k):
        raise checks.MissingArgument(
            f"expert_weights has incorrect shape: got {list(ops.shape_of(weights))}, wanted "
            f"[{p.tokens}, {p.top_k}]"
        )
    checks.check_contiguous(weights, "expert_weights")
    checks.check_device(weights, "expert_weights", a.hidden_states)
    return {"ids": ids, "weights": weights}


# --- the rest of a call


def check_replay(replay: Array, p: Problem, like: Array) -> None:
    """routing_replay_out: int16 [rows >= num_tokens, top_k], contiguous, beside hidden_states."""
    name = "routing_replay_out"
    checks.check_device(replay, name, like)
    check(
        ops.is_type(replay, "int16"), f"{name} must be int16; got {ops.type_of(replay)}", ValueError
    )
    shape = ops.shape_of(replay)
    check(len(shape) == 2, f"{name} must be 2D; got shape {list(shape)}", ValueError)
    check(
        shape[1] == p.top_k, f"{name} dim1 must equal top_k={p.top_k}; got {shape[1]}", ValueError
    )
    check(
        shape[0] >= p.tokens,
        f"{name} must have at least num_tokens={p.tokens} rows; got {shape[0]}",
        ValueError,
    )
    checks.check_contiguous(replay, name, ValueError)


def check_delta(a: Arguments, p: Problem, shuffled: bool = True) -> None:
    """gemm1_lora_delta: bfloat16 [num_tokens, top_k, 2 * intermediate_size]."""
    delta = a.gemm1_lora_delta
    check(p.gated, f"gemm1_lora_delta requires a gated activation; got {p.activation.name}")
    check(
        shuffled,
        "gemm1_lora_delta needs shuffled weights (useShuffledMatrix=true); got "
        "use_shuffled_weight=False",
    )
    check(
        ops.is_type(delta, "bfloat16"),
        f"gemm1_lora_delta: gemm1_bias must be bfloat16; got {ops.type_of(delta)}",
    )
    wanted = (p.tokens, p.top_k, 2 * p.inter)
    check(
        ops.shape_of(delta) == wanted,
        "gemm1_lora_delta must have shape [num_tokens, top_k, 2 * intermediate_size] = "
        f"{list(wanted)}; got {list(ops.shape_of(delta))}",
    )
    checks.check_contiguous(delta, "gemm1_lora_delta")
    checks.check_device(delta, "gemm1_lora_delta", a.hidden_states)


def _check_output(a: Arguments, p: Problem, narrow: bool) -> None:
    output = a.output
    if not ops.is_type(output, "bfloat16"):
        raise checks.BadOutput(f"output must be bfloat16; got {ops.type_of(output)}")
    shape = ops.shape_of(output)
    right = len(shape) == 2 and shape[0] == p.tokens
    right = right and (1 <= shape[1] <= p.hidden if narrow else shape[1] == p.hidden)
    if not right:
        columns = f"1 .. {p.hidden}" if narrow else p.hidden
        raise checks.BadOutput(f"output must have shape [{p.tokens}, {columns}]; got {list(shape)}")
    checks.check_device(output, "output", a.hidden_states, checks.BadOutput)
    checks.check_contiguous(output, "output", checks.BadOutput)


def spec_of(a: Arguments, p: Problem, weights: str, activations: str) -> MoeSpec:
    """The layer of a call."""
    routed = hasattr(a, "topk_ids")
    if routed:
        method = method_of(a.routing_method_type)
        check(
            method is not RoutingMethodType.Llama4 or p.top_k == 1,
            f"Llama4 routing wants top_k=1; got {p.top_k}",
        )
    whole = p.local == p.num_experts
    kind = _KINDS[p.activation]
    return MoeSpec(
        hidden_size=p.hidden,
        intermediate_size=p.inter,
        num_experts=p.num_experts,
        top_k=p.top_k,
        routing=RoutingRule() if routed else rule_of(a),
        activation=Activation(kind, 1.0, 1.0 if kind == "situ" else 0.0, math.inf),  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        activations=activations,  # type: ignore[arg-type]
        local=ExpertMap() if whole else ExpertMap("range", p.offset, p.local),
        shared=SharedExperts(p.shared, weights=weights) if p.shared else SharedExperts(),  # type: ignore[arg-type]
        router_weight_on_input=bool(getattr(a, "use_routing_scales_on_input", False)),
    )


def call_of(a: Arguments, p: Problem, *, narrow: bool = False, shuffled: bool = True) -> dict:
    """Routing, replay, delta and output of a call as arguments of `hopyard.MoeLayer`."""
    call = _ids_call(a, p) if hasattr(a, "topk_ids") else _logits_call(a, p)
    if getattr(a, "routing_replay_out", None) is not None:
        check_replay(a.routing_replay_out, p, a.hidden_states)
        call["replay_out"] = a.routing_replay_out
    if getattr(a, "gemm1_lora_delta", None) is not None:
        check_delta(a, p, shuffled)
        call["gemm1_delta"] = a.gemm1_lora_delta
    if a.output is not None:
        _check_output(a, p, narrow)
        if a.do_finalize:
            call["out"] = a.output
    return call


def execute(
    a: Arguments, p: Problem, spec: MoeSpec, experts: Experts, call: dict[str, Any]
) -> list[Array]:
    """Run the call; FlashInfer's list of results."""
    hidden = a.hidden_states
    operation = Operation(a.operation, int(a.tune_max_num_tokens))
    rows = p.tokens * p.slots
    extra = []
    if "gemm1_delta" in call:
        extra = [ops.empty(hidden, (rows, p.inter), "bfloat16")]
        call["gemm1_activation_out"] = extra[0]
    slots = None
    if extra or not a.do_finalize:
        slots = ops.empty(hidden, (p.tokens, p.slots), "int32")
        call["slot_to_row_out"] = slots
    if a.do_finalize:
        if "out" not in call:
            call["out"] = ops.empty(hidden, (p.tokens, p.hidden), "bfloat16")
        output = run(operation, spec, experts, hidden, call)
        return [output, slots.reshape(-1), *extra] if slots is not None else [output]
    weights = ops.empty(hidden, (p.tokens, p.slots), "float32")
    call["rows_out"] = ops.empty(hidden, (rows, p.hidden), "bfloat16")
    call["routing_weights_out"] = weights
    result = run(operation, spec, experts, hidden, call | {"finalize": False})
    if not ("weights" in call and ops.is_type(call["weights"], "float32")):
        weights = ops.bfloat16(weights)
    return [result, weights, slots.reshape(-1), *extra]


def single(results: list[Array]) -> Array | list[Array]:
    """The convention of the BF16 and FP8 operations: one result comes without a list."""
    return results[0] if len(results) == 1 else results
