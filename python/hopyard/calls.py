# SPDX-License-Identifier: Apache-2.0
"""The arguments of a layer's call, on their way to the extension.

A layer is called for every layer of a model at every step. So arguments cross one by one, in the
order in which the caller named them, and what follows from the names alone is worked out once for
each such order: a `Form`. Whatever follows from the arrays themselves (kind, dtype, shape, strides,
device, memory) is looked at by every call; nothing is remembered of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from hopyard._library import lib
from hopyard.arrays import (
    Array,
    as_output,
    as_tensor,
    require_not_float32,
    token_count,
)


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a call, all optional; T tokens, K = top_k, E experts, S shared, H, I.

    Routing is one of: `logits`; `ids` and `weights`; `ids` and `logits` (ids forced, weights
    recomputed); `packed`; `token_ids`, `token_to_experts` and `logits`.

    Attributes:
        logits: [T, E] float32 or bfloat16 router logits.
        routing_bias: [E] float32 or bfloat16 selection bias.
        ids: [T, K] int32 (with `logits` also int16); an id outside [0, E) skips its slot.
        weights: [T, K] float32 or bfloat16.
        packed: [T, K] int32, (id << 16) | bfloat16 bits of the weight.
        token_ids: [T] int32 or int64.
        token_to_experts: [vocabulary, K] int32.
        shared_weights: [T, S] float32 or bfloat16.
        expert_table: [E] int32, logical id -> local slot, for `ExpertMap(kind="table")`.
        hidden_scales: block scales of quantised hidden states, [T, blocks] or [T].
        token_scales: [T] float32, activations "nvfp4_per_token".
        gemm1_delta: [T, K, f * I] bfloat16, rows up|gate, added to GEMM1 (LoRA).
        num_tokens: live tokens, at most T; rows beyond stay untouched. An int is the same as fewer
            rows: nothing is read from a device, and a captured graph keeps it. An int32 scalar
            array on the layer's device is read when the work runs, in a graph at each replay;
            there it is clamped to 0 .. T.
        out: [T, W] bfloat16, W <= H, written instead of a new array.
        accumulate: add to `out`.
        replay_out: [>= T, K] int16, receives the selected ids.
        load_out: [E] int32 or int64, increased by the tokens of each expert.
        routing_weights_out: [T, K + S] float32.
        routing_ids_out: [T, K + S] int32.
        rows_out: [T * (K + S), H] bfloat16, GEMM2 rows before they are summed.
        finalize: False: no sum, `rows_out` is the result.
        slot_to_row_out: [T, K + S] int32, row of each slot or -1.
        gemm1_activation_out: [T * (K + S), I] bfloat16.
        stream: GPU: handle of the CUDA stream as an int, where the work is enqueued. Without it,
            torch's current stream of the layer's device if `hidden` is a torch tensor, else the
            legacy default stream, 0. The caller orders it with his other streams. A new array is
            memory of that stream. CUDA's per-thread default stream, 2, is refused.
    """

    logits: Array
    routing_bias: Array
    ids: Array
    weights: Array
    packed: Array
    token_ids: Array
    token_to_experts: Array
    shared_weights: Array
    expert_table: Array
    hidden_scales: Array
    token_scales: Array
    gemm1_delta: Array
    num_tokens: int | Array
    out: Array
    accumulate: bool
    replay_out: Array
    load_out: Array
    routing_weights_out: Array
    routing_ids_out: Array
    rows_out: Array
    finalize: bool
    slot_to_row_out: Array
    gemm1_activation_out: Array
    stream: int


# Names of a call -> fields of the extension's structs.
_INPUTS = {
    "logits": "logits",
    "routing_bias": "routing_bias",
    "ids": "expert_ids",
    "weights": "expert_weights",
    "packed": "packed_ids",
    "token_ids": "token_ids",
    "token_to_experts": "token_to_experts",
    "shared_weights": "shared_weights",
    "expert_table": "expert_table",
    "hidden_scales": "hidden_scales",
    "token_scales": "token_scales",
    "gemm1_delta": "gemm1_delta",
}
_OUTPUTS = {
    "out": "output",
    "replay_out": "replay",
    "load_out": "expert_load",
    "routing_weights_out": "routing_weights",
    "routing_ids_out": "routing_ids",
    "rows_out": "rows",
    "slot_to_row_out": "slot_to_row",
    "gemm1_activation_out": "gemm1_activation",
}
# What is no array, or not always; an empty field is one that the extension does not see.
_OPTIONS = {"num_tokens": "num_tokens", "accumulate": "accumulate", "finalize": "", "stream": ""}
_FIELDS = {**_INPUTS, **_OUTPUTS, **_OPTIONS}
_ROUTING_MODES = {
    frozenset({"logits"}): "logits",
    frozenset({"packed"}): "packed",
    frozenset({"ids", "weights"}): "unpacked",
    frozenset({"ids", "logits"}): "replay",
    frozenset({"token_ids", "token_to_experts", "logits"}): "hash",
}
_ROUTING_NAMES = frozenset().union(*_ROUTING_MODES)


def _routing_mode(given: tuple[str, ...]) -> str:
    names = _ROUTING_NAMES.intersection(given)
    mode = _ROUTING_MODES.get(names)
    if mode is None:
        raise ValueError(
            f"routing arguments are {sorted(names)}, wanted exactly one of: logits; ids and "
            "weights; ids and logits; packed; token_ids, token_to_experts and logits"
        )
    return mode


class Form(NamedTuple):
    """What follows from the names of a call's arguments, in their order.

    Attributes:
        handle: the extension's: which argument is which field.
        options: names of arguments that are no arrays, or not always.
        makes_output: whether the call gives nothing that has a say in its result, so that it is a
            new array, all of which is written.
    """

    handle: Any
    options: tuple[str, ...]
    makes_output: bool


_SAY_IN_THE_RESULT = frozenset({"out", "num_tokens", "accumulate", "finalize"})
_forms: dict[tuple[str, ...], Form] = {}
_MOST_FORMS = 1024  # programs have a few; who makes more by permuting names must not fill memory


def form_of(names: tuple[str, ...]) -> Form:
    """The form of a call with arguments of these names, none of which is None.

    Raises:
        TypeError: no call has an argument of such a name.
        ValueError: the names say no way of routing, or several.
    """
    form = _forms.get(names)
    if form is None:
        require_names(names)
        handle = lib.layer_form([_FIELDS[name] for name in names], _routing_mode(names))
        options = tuple(name for name in names if name in _OPTIONS)
        makes_output = _SAY_IN_THE_RESULT.isdisjoint(names)
        if len(_forms) >= _MOST_FORMS:
            _forms.clear()
        form = _forms[names] = Form(handle, options, makes_output)
    return form


def require_names(names: Any) -> None:
    """Refuse arguments that no call has.

    Raises:
        TypeError: naming them.
    """
    unknown = sorted(set(names) - _FIELDS.keys())
    if unknown:
        raise TypeError(f"a layer got unexpected arguments {unknown}")


def option_value(name: str, value: Any, stream: int) -> Any:
    """An argument that is no array, as the extension takes it."""
    if name == "num_tokens":
        return token_count(value, stream)
    return value if name == "stream" else bool(value)


def converted(call: Mapping[str, Any], stream: int) -> dict[str, Any]:
    """The arguments that are given, each as the extension takes it, in the same order.

    Raises:
        TypeError: no call has an argument of such a name.
        ValueError: one is no array, or cannot be shared, or is to be written and cannot be.
    """
    require_names(call)
    given = {}
    for name, value in call.items():
        if value is None:
            continue
        if name in _OPTIONS:
            given[name] = option_value(name, value, stream)
        elif name in _OUTPUTS:
            given[name] = as_output(value, name, stream)
        else:
            given[name] = as_tensor(value, name, stream)
    return given


def fault_of(hidden: Array, call: Mapping[str, Any], stream: int) -> ValueError | None:
    """What is wrong with the arguments of a call that the extension refused, in their own names.

    The extension refuses all of this, too, before anything is written; it does not know what Python
    calls an argument, or which conversion helps. None: its own error says it best.
    """
    try:
        require_not_float32(hidden, "hidden")
        if call.get("out") is not None:
            require_not_float32(call["out"], "out")
        as_tensor(hidden, "hidden", stream)
        converted(call, stream)
    except ValueError as fault:
        return fault
    return None
