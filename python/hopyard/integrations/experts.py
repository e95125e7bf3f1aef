# SPDX-License-Identifier: Apache-2.0
"""One experts module of a transformers model as a Hopyard layer."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.integrations.moe import _default_apply_gate

from hopyard.formats import quantize
from hopyard.integrations.replay import Replay, RoutingRecord
from hopyard.layer import MoeLayer
from hopyard.spec import Activation, ActivationFormat, MoeSpec, WeightFormat
from hopyard.tuning import generation
from hopyard.weights import ExpertWeights, Matrix, Weights, can_pack

_LEAST_CAPACITY = 64
_PARAMETERS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
# Classes of the activation between gate and up, by the names that transformers has for them.
_GATES = {
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELUActivation": "geglu",
    "GELUTanh": "geglu_tanh",
    "PytorchGELUTanh": "geglu_tanh",
}
# Names of Hopyard's quantisers where they differ from those of the weight formats.
_QUANTISERS = {"fp8_per_channel": "fp8_per_row"}


@dataclass(frozen=True)
class Options:
    """How the experts of a model are run.

    Attributes:
        weight_format: what the BF16 parameters are quantised to; "bf16" reads them as they are.
        activations: format that hidden states and the intermediate are rounded to.
    """

    weight_format: WeightFormat = "bf16"
    activations: ActivationFormat = "bf16"


@dataclass(frozen=True)
class Layout:
    """What a class of experts modules computes, and how it stores its parameters.

    Attributes:
        activation: between the two products.
        transposed: parameters are [experts, in, out].
        interleaved: rows are gate, up, gate, up; otherwise all gates, then all ups.
        weight_on_input: the routing weight scales the experts' input.
    """

    activation: Activation
    transposed: bool = False
    interleaved: bool = False
    weight_on_input: bool = False


def _refuse(module: torch.nn.Module, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} {what}, which Hopyard does not run; use another "
        "experts_implementation for this model, for instance 'eager'"
    )


def _gate_of(module: Any) -> Activation:
    own_gate = getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate
    if own_gate and type(module).__name__ == "GptOssExperts":
        return Activation(alpha=float(module.alpha), beta=1.0, limit=float(module.limit))
    if own_gate:
        raise _refuse(module, "has a gate function of its own")
    kind = _GATES.get(type(module.act_fn).__name__)
    if kind is None:
        raise _refuse(module, f"has the activation {type(module.act_fn).__name__}")
    return Activation(kind=kind)


def layout_of(module: Any) -> Layout:
    """What a module computes.

    Raises:
        NotImplementedError: Hopyard does not run it; the message says why.
    """
    if type(module).__name__ == "Llama4TextExperts":
        return Layout(_gate_of(module), transposed=True, weight_on_input=True)
    if not getattr(module, "has_gate", False):
        raise _refuse(module, "has no gate")
    if getattr(module, "has_post_expert_norm", False):
        raise _refuse(module, "has a norm behind each expert")
    return Layout(
        _gate_of(module),
        transposed=module.is_transposed,
        interleaved=not module.is_concatenated,
    )


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters that a module computes with."""
    found = (getattr(module, name, None) for name in _PARAMETERS)
    return [parameter for parameter in found if parameter is not None]


def _version(module: torch.nn.Module, tensor: torch.Tensor) -> int:
    if tensor.is_inference():
        raise ValueError(
            f"parameters of {type(module).__name__} were made under torch.inference_mode(), where "
            "torch does not count writes, so that Hopyard's copy of them would not follow; make or "
            "load the model outside of it, for instance under torch.no_grad()"
        )
    return tensor._version


# One plan and one set of workspaces for all modules that are alike.
_plans: weakref.WeakValueDictionary[tuple[Any, ...], MoeLayer] = weakref.WeakValueDictionary()


class Experts:
    """Runs one module; sees parameters that are changed, replaced or moved.

    Parameters are read where they are; quantised ones, and [in, out] matrices on a GPU, are copies,
    which are made anew when torch's version counter says that a parameter was written. Those that
    were made under inference mode have no counter, and are refused where copies are made.

    Args:
        module: experts of a transformers model; only a weak reference is kept.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = weakref.ref(module)
        self.options = Options()
        self.layout = layout_of(module)
        self.recorders: list[tuple[RoutingRecord, int]] = []
        self.replay: Replay | None = None
        self._spec: MoeSpec | None = None
        self._stamp: tuple[Any, ...] = ()
        self._weights: Weights | None = None
        self._layer: MoeLayer | None = None
        self._plan: MoeLayer | None = None
        self._generation = generation()

    def __call__(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **outputs: Any
    ) -> torch.Tensor:
        """Output [T, H] of hidden states [T, H], ids and weights [T, K].

        Raises:
            ValueError: the model is not in bfloat16, or its parameters, which are copied, were made
                under inference mode.
        """
        if hidden.dtype != torch.bfloat16:
            raise ValueError(
                f"hidden states of {type(self.module()).__name__} are {hidden.dtype}, wanted "
                "torch.bfloat16; load the model with dtype=torch.bfloat16"
            )
        layer = self._layer_for(hidden.shape[0], ids.shape[1])
        if weights.dtype not in (torch.float32, torch.bfloat16):
            weights = weights.float()
        return layer(
            hidden.contiguous(),
            ids=ids.to(torch.int32).contiguous(),
            weights=weights.contiguous(),
            **outputs,
        )

    @property
    def num_experts(self) -> int:
        """Experts of the module."""
        return int(self.module().gate_up_proj.shape[0])

    def use(self, options: Options) -> None:
        """Run the module in this way from now on."""
        if options != self.options:
            self.options = options
            self.forget()

    def forget(self) -> None:
        """Read the parameters anew at the next call."""
        self._stamp = ()

    def _layer_for(self, tokens: int, top_k: int) -> MoeLayer:
        module = self.module()
        if module is None:
            raise ReferenceError("the experts module is gone; keep the model alive")
        parameters = parameters_of(module)
        copied = self._copies(parameters[0])
        stamp = (
            top_k,
            *(
                (p.data_ptr(), p.shape, p.stride(), p.dtype, p.device)
                + ((_version(module, p),) if copied else ())
                for p in parameters
            ),
        )
        if stamp != self._stamp:
            self._spec = self._spec_of(module, top_k)
            # Codes of the integration's own making: on a GPU nobody else wants them in rows.
            packed = module.down_proj.device.type == "cuda" and can_pack(self._spec)
            experts = self._experts_of(module, copied)
            try:
                self._weights = Weights(self._spec, experts, packed=packed)
            except NotImplementedError:  # a build of a few kernels
                if not packed:
                    raise
                self._weights = Weights(self._spec, experts)
            self._layer, self._stamp = None, stamp
        now = generation()
        stale = self._generation != now
        if self._layer is None or stale or tokens > self._layer.max_tokens:
            plan = self._plan_for(tokens, (self._spec, parameters[0].device, now))
            self._layer, self._generation = plan.with_weights(self._weights), now
        return self._layer

    def _plan_for(self, tokens: int, key: tuple[Any, ...]) -> MoeLayer:
        """A layer with room for the tokens, shared by all modules whose key is the same."""
        plan = _plans.get(key)
        if plan is None or plan.max_tokens < tokens:
            capacity = max(_LEAST_CAPACITY, 1 << math.ceil(math.log2(max(tokens, 1))))
            plan = MoeLayer(self._spec, self._weights, max_tokens=capacity)
            _plans[key] = plan
        self._plan = plan  # keeps it in the dictionary
        return plan

    def _copies(self, parameter: torch.Tensor) -> bool:
        quantised = self.options.weight_format != "bf16"
        return quantised or (self.layout.transposed and parameter.device.type != "cpu")

    def _spec_of(self, module: Any, top_k: int) -> MoeSpec:
        experts, first, second = module.gate_up_proj.shape
        hidden, both = (first, second) if self.layout.transposed else (second, first)
        return MoeSpec(
            hidden_size=hidden,
            intermediate_size=both // 2,
            num_experts=experts,
            top_k=top_k,
            activation=self.layout.activation,
            weights=self.options.weight_format,
            activations=self.options.activations,
            router_weight_on_input=self.layout.weight_on_input,
        )

    def _experts_of(self, module: Any, copied: bool) -> ExpertWeights:
        for name in ("gate_up_proj", "down_proj"):
            dtype = getattr(module, name).dtype
            if dtype != torch.bfloat16:
                raise ValueError(
                    f"{type(module).__name__}.{name} is {dtype}, wanted torch.bfloat16; load the "
                    "model with dtype=torch.bfloat16"
                )
        order = "interleaved_gate_up" if self.layout.interleaved else "gate_up"
        gate_up_bias = getattr(module, "gate_up_proj_bias", None)
        down_bias = getattr(module, "down_proj_bias", None)
        return ExpertWeights(
            gemm1=self._matrix(module.gate_up_proj, gate_up_bias, copied),
            gemm2=self._matrix(module.down_proj, down_bias, copied),
            row_order=order,
        )

    def _matrix(self, values: torch.Tensor, bias: torch.Tensor | None, copied: bool) -> Matrix:
        # The model's forward looks at what requires grad; it may be frozen later on.
        source, bias = values.detach(), None if bias is None else bias.detach()
        if not copied:
            return Matrix(source, bias=bias, major="mn" if self.layout.transposed else "k")
        if self.layout.transposed:
            source = source.transpose(1, 2).contiguous()
        name = self.options.weight_format
        if name == "bf16":
            return Matrix(source, bias=bias)
        made = quantize(source.cpu(), _QUANTISERS.get(name, name))
        matrix = Matrix.from_quantized(made, bias=bias)
        on_device = {
            field: getattr(matrix, field).to(values.device)
            for field in ("values", "scales", "global_scales")
            if getattr(matrix, field) is not None
        }
        return replace(matrix, **on_device)
