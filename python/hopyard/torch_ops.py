# SPDX-License-Identifier: Apache-2.0
"""Layers and routing as torch operators: ``torch.ops.hopyard``.

    from hopyard import torch_ops

    handle = torch_ops.handle(layer)
    output = torch_ops.moe(hidden, handle, logits=logits, replay_out=replay)
    ids, weights = torch.ops.hopyard.route(logits, torch_ops.rule_text(rule), top_k)

Importing this module registers them (torch >= 2.9); `import hopyard` alone never imports torch.

    hopyard::moe(hidden, layer, *, inputs) -> output
    hopyard::moe_out(hidden, layer, out!, *, accumulate, finalize, inputs, replay_out!, ...) -> ()
    hopyard::route(logits, rule, top_k, *, inputs, replay_out!, load_out!) -> (ids, weights)
    hopyard::route_out(logits, rule, top_k, ids!, weights!, *, inputs, replay_out!, ...) -> ()

Keyword arguments are those of a layer's call (`hopyard.CallOptions`) and of `hopyard.route`, as
tensors; "!" marks what is written. `hopyard::moe` writes none of its arguments, which lets a
compiler move or remove it; the function `moe` below chooses between it and `hopyard::moe_out`.

A layer crosses the operator boundary as an integer that names a live `MoeLayer`. Weights as tensor
arguments were not chosen: a layer checks and lays out its weights once, a call would have to do so
again or find them in a cache by address, and an engine that updates weights in place wants graphs
that hold the weights' addresses anyway. The shape of a result follows from the arguments alone,
never from what the integer names, so one compiled graph serves all layers of a model (the integer
may be a graph input), and a graph from torch's on-disk cache is right in the next process.

The operators run on the device of `hidden` and its current stream, without reading memory back, so
that calls can be captured in a CUDA graph; the layer must outlive the graph. Tensors without memory
(meta, fake) give results without memory. There is no backward: where gradients would be needed, the
call is refused instead of returning a result that has none; weights that require gradients are
refused in eager mode only, because a compiled graph does not know what the integer names.

For the same reason a compiler does not see that a call reads the layer's weights: write no weights
inside of a compiled region that calls their layer, for the write may be moved behind the call.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import weakref
from collections.abc import Mapping
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError(
        "hopyard.torch_ops needs torch >= 2.9; install it: pip install torch"
    ) from error

from hopyard import routing as _routing
from hopyard.arrays import refuse_backward
from hopyard.layer import CallOptions, MoeLayer
from hopyard.spec import RoutingRule, rule_to_map

_layers: weakref.WeakValueDictionary[int, MoeLayer] = weakref.WeakValueDictionary()
_handles: weakref.WeakKeyDictionary[MoeLayer, int] = weakref.WeakKeyDictionary()
_next_handle = itertools.count(2)  # torch.compile makes constants of 0 and 1
_lock = threading.Lock()


def handle(layer: MoeLayer) -> int:
    """The integer that names a layer in ``torch.ops.hopyard``; the same one at every call.

    Handles count up in the order in which they are first asked for. They do not keep the layer
    alive. Ask for them outside of compiled functions.
    """
    with _lock:
        if layer not in _handles:
            number = next(_next_handle)
            _handles[layer] = number
            _layers[number] = layer
        return _handles[layer]


def rule_text(rule: RoutingRule) -> str:
    """A routing rule as the string that ``torch.ops.hopyard.route`` takes."""
    return json.dumps(rule_to_map(rule))


def moe(
    hidden: torch.Tensor, layer: int, *, out: torch.Tensor | None = None, **call: Any
) -> torch.Tensor:
    """Call a layer through its operator, in eager mode or inside of a compiled function.

    Args:
        hidden: as for `MoeLayer`.
        layer: its handle.
        out: written instead of a new tensor.
        **call: the other keyword arguments of a layer's call, tensors (and `accumulate`,
            `finalize`).

    Returns:
        `out`, or a new bfloat16 tensor of the shape of `hidden`; `rows_out` where `finalize` is
        False.
    """
    if not call.get("finalize", True):
        torch.ops.hopyard.moe_out(hidden, layer, out, **call)
        return call["rows_out"]
    call.pop("finalize", None)
    written = [name for name, value in call.items() if name in _WRITTEN and value is not None]
    if out is None:
        if call.get("accumulate"):
            raise ValueError("accumulate is set without out, wanted a tensor to add to")
        call.pop("accumulate", None)
        if not written:
            return torch.ops.hopyard.moe(hidden, layer, **call)
        if hidden.dtype == torch.uint8:
            raise ValueError(
                "hidden has dtype torch.uint8 and may hold two codes a byte, so that the output's "
                "width is not known; give out, or hidden.view(torch.float8_e4m3fn)"
            )
        make = torch.zeros_like if call.get("num_tokens") is not None else torch.empty_like
        out = make(hidden, dtype=torch.bfloat16)
    torch.ops.hopyard.moe_out(hidden, layer, out, **call)
    return out


def _layer_of(number: int) -> MoeLayer:
    layer = _layers.get(number)
    if layer is None:
        raise ValueError(
            f"layer={number} names no live layer, wanted hopyard.torch_ops.handle(layer) of a "
            "MoeLayer that still exists: keep it as long as it is called"
        )
    return layer


def _moe(hidden: torch.Tensor, layer: int, **call: Any) -> torch.Tensor:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::moe", {"hidden": hidden, **call})
    found = _layer_of(layer)
    if found.spec.hidden_size != hidden.shape[-1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, wanted [T, {found.spec.hidden_size}]: a new "
            "output has the shape of hidden; for hidden states of two 4-bit codes a byte call "
            "hopyard::moe_out with an output of that width"
        )
    return found(hidden, **call)


def _moe_fake(hidden: torch.Tensor, layer: int, **call: Any) -> torch.Tensor:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::moe", {"hidden": hidden, **call})
    return hidden.new_empty(hidden.shape, dtype=torch.bfloat16)


def _require_result(out: torch.Tensor | None, call: dict[str, Any]) -> None:
    if call.get("finalize", True) and out is None:
        raise ValueError("out is None, wanted a tensor to write; only finalize=False has none")
    if not call.get("finalize", True) and call.get("rows_out") is None:
        raise ValueError("finalize is False without rows_out, wanted a tensor for the rows")


def _moe_out(hidden: torch.Tensor, layer: int, out: torch.Tensor | None, **call: Any) -> None:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::moe_out", {"hidden": hidden, "out": out, **call})
    _require_result(out, call)
    _layer_of(layer)(hidden, out=out, **call)


def _moe_out_fake(hidden: torch.Tensor, layer: int, out: torch.Tensor | None, **call: Any) -> None:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::moe_out", {"hidden": hidden, "out": out, **call})
    _require_result(out, call)


def _route(
    logits: torch.Tensor, rule: str, top_k: int, *, bf16_weights: bool = False, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::route", {"logits": logits, **call})
    dtype = "bfloat16" if bf16_weights else "float32"
    return _routing.route(logits, _parse_rule(rule), top_k, weights_dtype=dtype, **call)


def _route_fake(
    logits: torch.Tensor, rule: str, top_k: int, *, bf16_weights: bool = False, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled():
        refuse_backward("hopyard::route", {"logits": logits, **call})
    dtype = torch.bfloat16 if bf16_weights else torch.float32
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=dtype)


def _route_out(
    logits: torch.Tensor,
    rule: str,
    top_k: int,
    ids: torch.Tensor,
    weights: torch.Tensor,
    **call: Any,
) -> None:
    _route_out_fake(logits, rule, top_k, ids, weights, **call)
    outputs = {"ids_out": ids, "weights_out": weights}
    _routing.route(logits, _parse_rule(rule), top_k, **outputs, **call)


def _route_out_fake(
    logits: torch.Tensor,
    rule: str,
    top_k: int,
    ids: torch.Tensor,
    weights: torch.Tensor,
    **call: Any,
) -> None:
    if torch.is_grad_enabled():
        arrays = {"logits": logits, "ids": ids, "weights": weights, **call}
        refuse_backward("hopyard::route_out", arrays)


@functools.lru_cache(maxsize=64)  # of texts, each of which means one rule; errors are not kept
def _parse_rule(text: str) -> RoutingRule:
    try:
        fields = json.loads(text)
        if isinstance(fields, Mapping):
            return RoutingRule(**fields)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"rule is {text!r}, wanted the text of hopyard.torch_ops.rule_text(rule)")


def _arguments(names: list[str]) -> str:
    """Optional tensors of a schema; those whose names end in `_out` are written."""
    letters = iter("bcdefghijklmnop")
    return ", ".join(
        f"Tensor({next(letters)}!)? {name}=None"
        if name.endswith("_out")
        else f"Tensor? {name}=None"
        for name in names
    )


_WRITTEN = [name for name in CallOptions.__annotations__ if name.endswith("_out")]
_OTHERS = ("out", "accumulate", "finalize", "stream")  # the stream is torch's current one
_READ = [name for name in CallOptions.__annotations__ if name not in (*_WRITTEN, *_OTHERS)]
_ROUTE_READ = ["bias", "forced_ids", "token_ids", "token_to_experts", "num_tokens"]
_ROUTE_WRITTEN = ["replay_out", "load_out"]
_SCHEMAS = {
    f"moe(Tensor hidden, SymInt layer, *, {_arguments(_READ)}) -> Tensor": (_moe, _moe_fake),
    "moe_out(Tensor hidden, SymInt layer, Tensor(a!)? out, *, bool accumulate=False, "
    f"bool finalize=True, {_arguments(_READ + _WRITTEN)}) -> ()": (_moe_out, _moe_out_fake),
    "route(Tensor logits, str rule, int top_k, *, bool bf16_weights=False, "
    f"{_arguments(_ROUTE_READ + _ROUTE_WRITTEN)}) -> (Tensor ids, Tensor weights)": (
        _route,
        _route_fake,
    ),
    "route_out(Tensor logits, str rule, int top_k, Tensor(a!) ids, Tensor(z!) weights, *, "
    f"{_arguments(_ROUTE_READ + _ROUTE_WRITTEN)}) -> ()": (_route_out, _route_out_fake),
}

# Python kernels for the backends and none for autograd: one there would double a call's overhead,
# and kernels and fakes see whether gradients are wanted.
_library = torch.library.Library("hopyard", "DEF")
for _schema, (_kernel, _fake) in _SCHEMAS.items():
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"hopyard::{_name}", _fake, lib=_library)
