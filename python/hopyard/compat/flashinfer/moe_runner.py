# SPDX-License-Identifier: Apache-2.0
"""A MoE operation as a runner of FlashInfer's tuner, for one problem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hopyard.compat.flashinfer.autotuner_config import OptimizationProfile, TunableRunner
from hopyard.compat.flashinfer.enums import (
    ActivationType,
    DtypeTrtllmGen,
    Fp8QuantizationType,
    WeightLayout,
)
from hopyard.compat.flashinfer.signature import parse
from hopyard.compat.flashinfer.tuning import (
    forced_tactic,
    trtllm_get_valid_moe_configs,
    trtllm_moe_tactic_name,
)

_HIDDEN_STATES = 4  # place in the inputs
_PROBLEM = parse(
    "top_k num_local_experts dtype_act dtype_weights fp8_quantization_type hidden_size "
    "intermediate_size activation_type=ActivationType.Swiglu use_shuffled_weight=False "
    "weight_layout=WeightLayout.MajorK use_per_token_scaling=False"
)


class MoERunner(TunableRunner):
    """The kernels of a MoE operation as tactics of `AutoTuner.choose_one`.

    The operations tune themselves within `autotune`; this is for callers that choose by
    themselves. Runners of equal arguments are equal, with one hash.

    Args:
        operation: one of `trtllm_*_moe`.
        top_k: with the shared experts, as is num_local_experts.
        dtype_act: element type of the activations; also of the weights.
        activation_type: SwiGLU, rows as they are and in order without.

    Raises:
        TypeError: arguments that do not fit this signature.
        ValueError: no member of an enumeration.

    Its inputs are [output, routing_logits, topk_ids, expert_weights, hidden_states,
    hidden_states_scale], in FlashInfer's order; the last one may be left out. `output` may be None;
    so are the logits of a routed operation, and ids and weights of the others. Weights are None
    beside packed ids.
    """

    def __init__(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        given = _PROBLEM.bind(*args, **kwargs)
        given.apply_defaults()
        a = SimpleNamespace(**given.arguments)
        self.operation = operation.__name__
        self.problem = (
            DtypeTrtllmGen(a.dtype_act),
            DtypeTrtllmGen(a.dtype_weights),
            Fp8QuantizationType(a.fp8_quantization_type),
            int(a.top_k),
            int(a.hidden_size),
            int(a.intermediate_size),
            int(a.num_local_experts),
            ActivationType(a.activation_type),
            bool(a.use_shuffled_weight),
            WeightLayout(a.weight_layout),
            bool(a.use_per_token_scaling),
        )
        self._run_cache = operation  # no part of the key: its name is

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MoERunner):
            return NotImplemented
        return (self.operation, self.problem) == (other.operation, other.problem)

    __hash__ = TunableRunner.__hash__

    def get_valid_tactics(self, inputs: list[Any], profile: OptimizationProfile) -> list[list[int]]:
        """[tile_N, config] of the kernels that run the profile's number of tokens.

        Raises:
            RuntimeError: no kernel knows the types or the activation.
        """
        tokens = profile.get_opt_shapes()[_HIDDEN_STATES][0]
        return trtllm_get_valid_moe_configs(*self.problem, tokens)

    def forward(
        self, inputs: list[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        """Run the operation.

        Args:
            tactic: of `get_valid_tactics`; -1 leaves the kernel to the library, and to a
                `forced_tactic` around the call.
            kwargs: the operation's other arguments.

        Raises:
            RuntimeError: no such tactic.
        """
        output, logits, ids, weights, hidden, *scale = inputs
        arguments = {"hidden_states": hidden, **kwargs}
        if scale:
            arguments["hidden_states_scale"] = scale[0]
        if output is not None:
            arguments["output"] = output
        if logits is not None:
            arguments["routing_logits"] = logits
        else:
            arguments["topk_ids"] = ids if weights is None else (ids, weights)
        with self._tactic(tactic, len(hidden)):
            return self._run_cache(**arguments)

    def _tactic(self, tactic: Any, tokens: int) -> contextlib.AbstractContextManager[None]:
        if tactic == -1:
            return contextlib.nullcontext()
        return forced_tactic(trtllm_moe_tactic_name(tactic, *self.problem, tokens))
