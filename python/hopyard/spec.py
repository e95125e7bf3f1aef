# SPDX-License-Identifier: Apache-2.0
"""The layer, as a model's config states it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

RoutingScore: TypeAlias = Literal["logit", "softmax", "sigmoid", "sqrt_softplus"]
RoutingWeight: TypeAlias = Literal["score", "softmax_selected", "sigmoid_selected"]
Renormalise: TypeAlias = Literal["none", "sum_plus_epsilon", "sum_at_least"]
ActivationKind: TypeAlias = Literal[
    "swiglu", "geglu", "geglu_tanh", "situ", "relu2", "silu", "gelu", "identity"
]
WeightFormat: TypeAlias = Literal[
    "bf16",
    "fp8_block128",
    "fp8_per_tensor",
    "fp8_per_channel",
    "mxfp8",
    "nvfp4",
    "mxfp4",
    "mxint4",
]
ActivationFormat: TypeAlias = Literal[
    "bf16", "fp8_block128", "fp8_per_tensor", "fp8_per_token", "mxfp8", "nvfp4", "nvfp4_per_token"
]
ExpertMapKind: TypeAlias = Literal["all", "range", "table"]

_GATED = ("swiglu", "geglu", "geglu_tanh", "situ")


@dataclass(frozen=True)
class RoutingRule:
    """How experts are chosen and weighted; data, not code. All arithmetic is FP32.

    The larger score wins, equal scores are won by the smaller expert id, and ids come out in
    descending score order.

    Attributes:
        score: what ranks the experts.
        weight: how the weight of a selected expert follows.
        renormalise: how selected weights are divided by their sum: not at all,
            ``w * scaling_factor / (sum + 1e-20)``, or ``w * scaling_factor / max(sum, 1e-20)``.
        use_bias: selection ranks score + bias (weights never use the bias).
        num_groups: above 1, experts come in groups of equal size, ranked by the sum of their two
            best biased scores.
        top_groups: groups kept.
        scaling_factor: multiplies every weight.
    """

    score: RoutingScore = "logit"
    weight: RoutingWeight = "softmax_selected"
    renormalise: Renormalise = "none"
    use_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 1.0

    @staticmethod
    def default() -> RoutingRule:
        """Softmax over all experts, top-k, no renormalisation."""
        return RoutingRule(score="softmax", weight="score")

    @staticmethod
    def renormalize() -> RoutingRule:
        """Top-k of the logits, softmax of the survivors (Mixtral, Qwen3-MoE, gpt-oss)."""
        return RoutingRule()

    @staticmethod
    def deepseek_v3(
        num_groups: int = 1, top_groups: int = 1, scaling_factor: float = 1.0
    ) -> RoutingRule:
        """Sigmoid scores, selection bias, expert groups, weights normalised and scaled."""
        return RoutingRule(
            score="sigmoid",
            weight="score",
            renormalise="sum_plus_epsilon",
            use_bias=True,
            num_groups=num_groups,
            top_groups=top_groups,
            scaling_factor=scaling_factor,
        )

    @staticmethod
    def llama4() -> RoutingRule:
        """Top-1 of the logits, weight = sigmoid of the logit."""
        return RoutingRule(weight="sigmoid_selected")

    @staticmethod
    def top_k() -> RoutingRule:
        """Top-k of the logits, weight = the logit."""
        return RoutingRule(weight="score")

    @staticmethod
    def sigmoid_renorm(norm_topk_prob: bool = True) -> RoutingRule:
        """Sigmoid scores, weights divided by their sum if `norm_topk_prob`."""
        return RoutingRule(
            score="sigmoid",
            weight="score",
            renormalise="sum_at_least" if norm_topk_prob else "none",
        )

    @staticmethod
    def minimax2(scaling_factor: float = 1.0) -> RoutingRule:
        """DeepSeek-V3 without groups."""
        return RoutingRule.deepseek_v3(scaling_factor=scaling_factor)

    @staticmethod
    def sigmoid() -> RoutingRule:
        """Sigmoid scores are the weights."""
        return RoutingRule(score="sigmoid", weight="score")

    @staticmethod
    def top_k_sigmoid() -> RoutingRule:
        """Top-k of the logits, weights = their sigmoids."""
        return RoutingRule(weight="sigmoid_selected")

    @staticmethod
    def sqrt_softplus(scaling_factor: float = 1.0) -> RoutingRule:
        """DeepSeek-V4: scores sqrt(log(1 + exp(z))), selection bias, normalised and scaled."""
        return RoutingRule(
            score="sqrt_softplus",
            weight="score",
            renormalise="sum_at_least",
            use_bias=True,
            scaling_factor=scaling_factor,
        )


@dataclass(frozen=True)
class Activation:
    """The function between the two GEMMs; x1 = gate, x0 = up, in natural units.

    Attributes:
        kind: "swiglu" is ``(x0 + beta) * x1 * sigmoid(alpha * x1)`` with x1 <= limit and
            abs(x0) <= limit; docs/numerics.md has the others.
        alpha: one value, or one per local expert.
        beta: the same; "situ" needs a positive one.
        limit: the same; infinity for none.
    """

    kind: ActivationKind = "swiglu"
    alpha: float | tuple[float, ...] = 1.0
    beta: float | tuple[float, ...] = 0.0
    limit: float | tuple[float, ...] = math.inf

    @property
    def gated(self) -> bool:
        """Whether GEMM1 has a gate and an up half."""
        return self.kind in _GATED


@dataclass(frozen=True)
class ExpertMap:
    """Which experts live here.

    Attributes:
        kind: "all"; "range": ids offset .. offset + count - 1; "table": `expert_table` of each call
            maps logical ids to local slots (-1 = elsewhere).
        offset: first id of a range.
        count: local experts, or slots of the table.
    """

    kind: ExpertMapKind = "all"
    offset: int = 0
    count: int = 0


@dataclass(frozen=True)
class SharedExperts:
    """Experts that every token takes, appended after the routed ones.

    Attributes:
        count: how many; 0 for none.
        per_token_weight: weights come from `shared_weights` [T, count] of each call.
        weight: otherwise this constant.
        weights: number format of their matrices.
    """

    count: int = 0
    per_token_weight: bool = False
    weight: float = 1.0
    weights: WeightFormat = "bf16"


@dataclass(frozen=True)
class MoeSpec:
    """One MoE layer: hidden states [T, hidden_size] bf16 -> output [T, hidden_size] bf16.

    GEMM1 is [f * intermediate_size, hidden_size] per expert, f = 2 where the activation is gated;
    GEMM2 is [hidden_size, intermediate_size]. Values are checked when a layer or weights are made.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E, 1 .. 2048.
        top_k: K experts per token, 1 .. 32.
        routing: how they are chosen.
        activation: between the GEMMs.
        weights: number format of the routed experts' matrices.
        activations: format that hidden states and intermediate are rounded to.
        local: which experts live here.
        shared: experts that every token takes.
        router_weight_on_input: the routing weight scales GEMM1's input (Llama-4).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    routing: RoutingRule = field(default_factory=RoutingRule)
    activation: Activation = field(default_factory=Activation)
    weights: WeightFormat = "bf16"
    activations: ActivationFormat = "bf16"
    local: ExpertMap = field(default_factory=ExpertMap)
    shared: SharedExperts = field(default_factory=SharedExperts)
    router_weight_on_input: bool = False

    @property
    def num_local_experts(self) -> int:
        """Routed experts that live here."""
        return self.num_experts if self.local.kind == "all" else self.local.count

    @property
    def slots_per_token(self) -> int:
        """Slots of a token: routed and shared."""
        return self.top_k + self.shared.count

    @property
    def gemm1_rows(self) -> int:
        """Rows of an expert's GEMM1 matrix."""
        return (2 if self.activation.gated else 1) * self.intermediate_size


def _per_expert(value: float | Sequence[float], name: str) -> list[float]:
    values = [float(x) for x in np.atleast_1d(np.asarray(value, np.float64))]
    if not values:
        raise ValueError(f"activation.{name} is empty, wanted one value or one per local expert")
    return values


def rule_to_map(rule: RoutingRule) -> dict[str, Any]:
    """The fields of a rule as the extension reads them."""
    return {**vars(rule), "scaling_factor": float(rule.scaling_factor)}


def spec_to_map(spec: MoeSpec) -> dict[str, Any]:
    """The fields of a spec as the extension reads them."""
    activation = spec.activation
    return {
        **vars(spec),
        "routing": rule_to_map(spec.routing),
        "activation": {
            "kind": activation.kind,
            "alpha": _per_expert(activation.alpha, "alpha"),
            "beta": _per_expert(activation.beta, "beta"),
            "limit": _per_expert(activation.limit, "limit"),
        },
        "local": dict(vars(spec.local)),
        "shared": {**vars(spec.shared), "weight": float(spec.shared.weight)},
    }


def spec_from_map(fields: Mapping[str, Any]) -> MoeSpec:
    """Inverse of `spec_to_map`."""

    def per_expert(values: Sequence[float]) -> float | tuple[float, ...]:
        return float(values[0]) if len(values) == 1 else tuple(float(x) for x in values)

    activation = fields["activation"]
    return MoeSpec(
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_experts=fields["num_experts"],
        top_k=fields["top_k"],
        routing=RoutingRule(**dict(fields["routing"].items())),
        activation=Activation(
            kind=activation["kind"],
            alpha=per_expert(activation["alpha"]),
            beta=per_expert(activation["beta"]),
            limit=per_expert(activation["limit"]),
        ),
        weights=fields["weights"],
        activations=fields["activations"],
        local=ExpertMap(**dict(fields["local"].items())),
        shared=SharedExperts(**dict(fields["shared"].items())),
        router_weight_on_input=fields["router_weight_on_input"],
    )
