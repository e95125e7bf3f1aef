# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models of transformers through Hopyard.

    import hopyard.integrations.transformers  # registers experts_implementation="hopyard"

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="hopyard"
    )
    with hopyard.record_routing(model) as record:
        model.generate(...)
    record.ids  # int16 [tokens, layers, top_k]

Routers, shared experts and everything else stay transformers'; the experts themselves are one call
of a layer, with the ids and weights that the router chose. That call is an operator, so that models
compile without graph breaks. There is no backward: with gradients enabled, experts are refused if
their input, their parameters or the router's weights require one; train with another
implementation.

The model's parameters are read where they are: values that an optimiser or a weight update writes
are seen by the next call, and so is a parameter that is replaced. `register` makes implementations
that quantise them at the first call instead. Modules that compute something else than Hopyard does
are refused by name at the first call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface
from transformers.models.llama4 import modeling_llama4 as _llama4

from hopyard.integrations.experts import Experts, Options, parameters_of
from hopyard.integrations.replay import Replay, RoutingRecord, require_no_capture
from hopyard.spec import ActivationFormat, WeightFormat

_registered: dict[str, Options] = {}
_experts: dict[int, Experts] = {}


def register(
    name: str,
    *,
    weight_format: WeightFormat = "bf16",
    activations: ActivationFormat = "bf16",
) -> None:
    """Make `experts_implementation=name` run experts through Hopyard.

    Args:
        name: new, or of an earlier `register`; "hopyard" is registered with the defaults.
        weight_format: other than "bf16", the parameters are quantised at the first call, and anew
            when they were written. They stay in the model as they are.
        activations: format that goes with it; README.md has the pairs.

    Raises:
        ValueError: transformers itself has an implementation of that name.
    """
    if name == "eager" or (name in ExpertsInterface._global_mapping and name not in _registered):
        raise ValueError(f"name is {name!r}, an implementation of transformers; choose another")
    _registered[name] = Options(weight_format, activations)
    ExpertsInterface.register(name, _experts_forward)


def refresh(model: torch.nn.Module) -> None:
    """Read a model's experts anew at the next call.

    Needed after `parameter.data.copy_(...)`, which torch's version counters do not see, and only
    where parameters are quantised.
    """
    for block in _blocks_of(model):
        _state_of(block).forget()


def record_routing(model: torch.nn.Module) -> contextlib.AbstractContextManager[RoutingRecord]:
    """Record the experts that every token was sent to.

    Tokens come in the order in which forward passes saw them: those of a prompt, then one of each
    sequence a step. In a CUDA graph's replay nothing is recorded, and the record then says so.

    Args:
        model: whose experts run through Hopyard.

    Returns:
        A context manager that gives a `RoutingRecord`: `ids` int16 [tokens, layers, top_k], which
        `replay_routing` takes, and `loads` int64 [layers, experts].

    Raises:
        ValueError: no module of the model runs through Hopyard.
    """
    return _recording([_state_of(block) for block in _blocks_of(model)])


def replay_routing(
    model: torch.nn.Module, ids: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """Send every token to given experts; its routing weights follow from its own logits.

    Where the ids are those that the router chooses itself, in its order, weights are the router's
    own, so that a recording replayed on the same model gives the same bits. Enter the context
    before a model is compiled, not after.

    Args:
        model: whose experts run through Hopyard.
        ids: int16 [tokens, layers, top_k] in the order of `record_routing`; an id outside the
            experts skips its slot.

    Raises:
        ValueError: no module runs through Hopyard, or the ids do not fit the model; and at the
            calls: there are more tokens than ids, or fewer when the context ends.
        NotImplementedError: a router's way of weighting is not known.
    """
    return _replaying(model, ids)


@contextlib.contextmanager
def _recording(states: list[Experts]) -> Iterator[RoutingRecord]:
    record = RoutingRecord(len(states))
    for index, state in enumerate(states):
        state.recorders.append((record, index))
    try:
        yield record
    finally:
        for index, state in enumerate(states):
            state.recorders.remove((record, index))


@contextlib.contextmanager
def _replaying(model: torch.nn.Module, ids: torch.Tensor) -> Iterator[None]:
    blocks = _blocks_of(model)
    if ids.dtype != torch.int16 or ids.dim() != 3 or ids.shape[1] != len(blocks):
        raise ValueError(
            f"ids is {ids.dtype} of shape {list(ids.shape)}, wanted torch.int16 [tokens, "
            f"{len(blocks)}, top_k] as record_routing gives it"
        )
    states = [_state_of(block) for block in blocks]
    replays = [Replay(_router_of(b), each) for b, each in zip(blocks, ids.unbind(1), strict=True)]
    hooks = []
    for block, state, replay in zip(blocks, states, replays, strict=True):
        state.replay = replay
        if not isinstance(block, _llama4.Llama4TextMoe):
            key = id(block.experts)
            hook = functools.partial(_force, key)
            hooks.append(_router_of(block).register_forward_hook(hook))
    try:
        yield
        for replay in replays:
            replay.require_end()
    finally:
        for hook in hooks:
            hook.remove()
        for state in states:
            state.replay = None


def _implementation(block: Any) -> str | None:
    """The experts_implementation of a block, None where there is no choice of one."""
    if isinstance(block, _llama4.Llama4TextMoe):
        return block.shared_expert.config._experts_implementation
    experts = getattr(block, "experts", None)
    if isinstance(experts, torch.nn.Module) and hasattr(experts, "is_concatenated"):
        return experts.config._experts_implementation
    return None


def _blocks_of(model: torch.nn.Module) -> list[Any]:
    """The modules whose experts run through Hopyard, in the order of the layers."""
    found = [block for block in model.modules() if _implementation(block) in _registered]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no experts that run through Hopyard; call "
            "model.set_experts_implementation('hopyard') first"
        )
    return found


def _router_of(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def _state_of(block: Any) -> Experts:
    return _experts[_key_of(block.experts)]


def _key_of(module: torch.nn.Module) -> int:
    return _remember(id(module))  # `id` makes compiled code that of this module only


# Runs while torch.compile traces, so that compiled code finds the state. It takes the key because
# torch 2.11 and older refuse modules as arguments of such functions.
@torch.compiler.assume_constant_result
def _remember(key: int) -> int:
    state = _experts.get(key)
    if state is None or state.module() is None:
        # The caller holds the module: its address is valid.
        module = ctypes.cast(key, ctypes.py_object).value
        _experts[key] = Experts(module)
        weakref.finalize(module, _experts.pop, key, None)
    return key


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            "experts_implementation='hopyard' has no backward; run the model under "
            "torch.no_grad(), or train it with model.set_experts_implementation('eager')"
        )


def _call(
    module: Any, name: str, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    _refuse_gradients(hidden, weights, *parameters_of(module))
    key = _key_of(module)
    return torch.ops.hopyard.transformers_experts(hidden, ids, weights, key, name)


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    name = self.config._experts_implementation
    return _call(self, name, hidden_states, top_k_index, top_k_weights)


_llama4_forward = _llama4.Llama4TextMoe.forward


@functools.wraps(_llama4_forward)
def _llama4_block_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """Transformers has every expert see every token here, and no choice of implementations."""
    name = self.shared_expert.config._experts_implementation
    if name not in _registered:
        return _llama4_forward(self, hidden_states)
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    _refuse_gradients(logits)
    ids = logits.topk(self.top_k, dim=1)[1]
    key = _key_of(self.experts)
    ids, weights = torch.ops.hopyard.transformers_replay(logits, ids, scores.gather(1, ids), key)
    out = self.shared_expert(hidden)
    out.add_(_call(self.experts, name, hidden, ids, weights))
    return out, logits


def _llama4_refuse_grouped_mm(self: Any) -> bool:
    raise ValueError(f"{type(self).__name__} has no grouped_mm implementation of its experts.")


def _force(key: int, router: Any, args: Any, output: Any) -> Any:
    """Forward hook of a router."""
    logits, weights, ids = output
    _refuse_gradients(logits)
    ids, weights = torch.ops.hopyard.transformers_replay(logits, ids, weights, key)
    return logits, weights, ids


def _run_experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, key: int, name: str
) -> torch.Tensor:
    state = _experts[key]
    state.use(_registered[name])
    if state.replay is not None:
        state.replay.require_forced(ids.shape[0])
    if not state.recorders:
        return state(hidden, ids, weights)
    require_no_capture("record_routing", hidden)
    chosen = torch.empty(ids.shape, dtype=torch.int16, device=hidden.device)
    load = torch.zeros(state.num_experts, dtype=torch.int64, device=hidden.device)
    output = state(hidden, ids, weights, replay_out=chosen, load_out=load)
    for record, index in state.recorders:
        record.add(index, chosen, load)
    return output


def _run_replay(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    replay = _experts[key].replay
    if replay is None:
        contiguous = {"memory_format": torch.contiguous_format}
        return ids.clone(**contiguous), weights.clone(**contiguous)
    require_no_capture("replay_routing", logits)
    return replay.force(logits, ids, weights)


_library = torch.library.Library("hopyard", "FRAGMENT")
for _schema, _kernel, _fake in (
    (
        "transformers_experts(Tensor hidden, Tensor ids, Tensor weights, SymInt experts, "
        "str implementation) -> Tensor",
        _run_experts,
        lambda hidden, ids, weights, experts, implementation: hidden.new_empty(hidden.shape),
    ),
    (
        "transformers_replay(Tensor logits, Tensor ids, Tensor weights, SymInt experts)"
        " -> (Tensor, Tensor)",
        _run_replay,
        lambda logits, ids, weights, experts: (
            ids.new_empty(ids.shape),
            weights.new_empty(ids.shape),
        ),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"hopyard::{_name}", _fake, lib=_library)

register("hopyard")
# Lets set_experts_implementation reach Llama-4; what it refused before it still refuses.
_llama4.Llama4TextMoe.forward = _llama4_block_forward
_llama4.Llama4PreTrainedModel._can_set_experts_implementation_cached_value = True
_llama4.Llama4PreTrainedModel._grouped_mm_can_dispatch = _llama4_refuse_grouped_mm
