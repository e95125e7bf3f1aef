# SPDX-License-Identifier: Apache-2.0
"""Routing of a model's run: recorded, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hopyard.devices import is_capturing
from hopyard.routing import route
from hopyard.spec import RoutingRule


def require_no_capture(name: str, tensor: torch.Tensor) -> None:
    """Refuse a CUDA graph's capture on the tensor's GPU: its replays run no Python.

    Raises:
        RuntimeError: naming the function.
    """
    if is_capturing(tensor):
        raise RuntimeError(
            f"hopyard.{name} is active while a CUDA graph is captured, but the graph's replays run "
            "no Python; run the model without CUDA graphs, or call a layer with replay_out"
        )


class RoutingRecord:
    """The experts that each token was sent to; see `record_routing`.

    Args:
        layers: how many layers record.
    """

    def __init__(self, layers: int) -> None:
        self._ids: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._loads: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def add(self, layer: int, ids: torch.Tensor, load: torch.Tensor) -> None:
        """Append the tokens of one call."""
        self._ids[layer].append(ids)
        self._loads[layer].append(load)

    def _require_tokens(self) -> None:
        tokens = [sum(len(ids) for ids in calls) for calls in self._ids]
        if min(tokens) != max(tokens) or not max(tokens):
            raise RuntimeError(
                f"the layers recorded {tokens} tokens, wanted the same number, above 0, for each; "
                "run the model inside of the context, without CUDA graphs (their replays run no "
                "Python)"
            )

    @property
    def ids(self) -> torch.Tensor:
        """Int16 [tokens, layers, top_k] in host memory, each token's experts in the router's order.

        Raises:
            RuntimeError: nothing, or not every layer, was recorded.
        """
        self._require_tokens()
        return torch.stack([torch.cat(calls).cpu() for calls in self._ids], dim=1)

    @property
    def loads(self) -> torch.Tensor:
        """Int64 [layers, experts] in host memory: tokens that each expert got.

        Raises:
            RuntimeError: nothing, or not every layer, was recorded.
        """
        self._require_tokens()
        return torch.stack([torch.stack(calls).sum(0).cpu() for calls in self._loads])


def _grouped_sigmoid(router: Any) -> RoutingRule:
    return RoutingRule(
        score="sigmoid",
        weight="score",
        renormalise="sum_plus_epsilon" if router.norm_topk_prob else "none",
        use_bias=True,
        num_groups=router.num_group,
        top_groups=router.topk_group,
        scaling_factor=float(router.routed_scaling_factor),
    )


# What the routers of transformers compute, by class.
_RULES: dict[str, Callable[[Any], RoutingRule]] = {
    "MixtralTopKRouter": lambda router: RoutingRule.renormalize(),
    "Qwen3MoeTopKRouter": lambda router: (
        RoutingRule.renormalize() if router.norm_topk_prob else RoutingRule.default()
    ),
    "DeepseekV3TopkRouter": _grouped_sigmoid,
    "Glm4MoeTopkRouter": _grouped_sigmoid,
    "GptOssTopKRouter": lambda router: RoutingRule.renormalize(),
    "Llama4Router": lambda router: RoutingRule.llama4(),
}


def rule_of(router: Any) -> RoutingRule:
    """The routing rule of a router module.

    Raises:
        NotImplementedError: its class is not known.
    """
    name = type(router).__name__
    if name not in _RULES:
        raise NotImplementedError(
            f"replay_routing does not know how {name} weights experts; known are "
            f"{', '.join(sorted(_RULES))}"
        )
    return _RULES[name](router)


class Replay:
    """The ids of one layer, handed out call by call.

    Args:
        router: of the layer.
        ids: int16 [tokens, top_k].

    Raises:
        ValueError: another top_k than the router's.
        NotImplementedError: the router's rule is not known.
    """

    def __init__(self, router: Any, ids: torch.Tensor) -> None:
        if ids.shape[1] != router.top_k:
            raise ValueError(f"ids has top_k={ids.shape[1]}, wanted the router's {router.top_k}")
        self._rule = rule_of(router)
        self._ids = ids.contiguous()
        self._next = 0
        self._forced: int | None = None

    def force(
        self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights of the next tokens, in the dtypes of those that the router chose.

        Raises:
            ValueError: there are no more ids.
        """
        tokens = ids.shape[0]
        if self._next + tokens > len(self._ids):
            raise ValueError(
                f"the model runs {self._next + tokens} tokens, but ids has {len(self._ids)}; give "
                "the ids of every token that goes through the model"
            )
        if self._ids.device != logits.device:
            self._ids = self._ids.to(logits.device)
        given = self._ids[self._next : self._next + tokens]
        self._next += tokens
        self._forced = tokens
        _, computed = route(logits.contiguous(), self._rule, given.shape[1], forced_ids=given)
        own = (given == ids).all(-1, keepdim=True)
        return given.to(ids.dtype), torch.where(own, weights, computed.to(weights.dtype))

    def require_forced(self, tokens: int) -> None:
        """Refuse experts whose router was not forced.

        Raises:
            RuntimeError: it ran without the hook, as code does that was compiled before.
        """
        if self._forced != tokens:
            raise RuntimeError(
                "replay_routing did not reach a router: the model was compiled before; enter the "
                "context first, or call torch._dynamo.reset()"
            )
        self._forced = None

    def require_end(self) -> None:
        """Refuse ids that no token has used.

        Raises:
            ValueError: naming how many.
        """
        if self._next != len(self._ids):
            raise ValueError(
                f"the model ran {self._next} tokens, but ids has {len(self._ids)}; give the ids of "
                "exactly the tokens that go through the model"
            )
