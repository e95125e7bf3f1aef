# SPDX-License-Identifier: Apache-2.0
"""The layer: a plan, its weights and a workspace."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from hopyard._library import lib
from hopyard.arrays import (
    Array,
    as_output,
    as_tensor,
    empty_like_kind,
    gradients_enabled,
    is_torch,
    raise_requires_grad,
    refuse_gradients,
    require_not_float32,
    token_count,
)
from hopyard.devices import Device, device_name, parse_device, stream_of
from hopyard.spec import MoeSpec, spec_to_map
from hopyard.weights import Weights
from hopyard.workspace import Workspaces


class PlanOptions(TypedDict, total=False):
    """Options of a layer.

    Attributes:
        max_tokens: capacity; a call takes 0 .. max_tokens tokens.
        tactic: name of the kernel to use; the library chooses without.
        batch_invariant: a token's output depends on that token alone.
        workspace_cap: bytes; larger batches are cut into chunks of tokens.
        num_threads: 0 = all that OpenMP gives when the layer is made.
        overlap_launches: GPU: a call's kernels may be scheduled before the work ahead of them has
            ended. Off by default; the environment's HOPYARD_OVERLAP_LAUNCHES=0 keeps it off.
    """

    max_tokens: int
    tactic: str
    batch_invariant: bool
    workspace_cap: int
    num_threads: int
    overlap_launches: bool


@dataclass(frozen=True)
class Candidate:
    """One kernel and what became of it.

    Attributes:
        kernel: its name.
        chosen: whether the layer uses it.
        reason: why it was refused or chosen.
    """

    kernel: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What the library would do for a spec.

    Attributes:
        supported: whether a kernel runs it.
        reason: when not: the rule that was broken, and the remedy.
        candidates: every kernel looked at.
        text: all of this, for people.
    """

    supported: bool
    reason: str
    candidates: tuple[Candidate, ...]
    text: str

    def __str__(self) -> str:
        return self.text


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


_INPUT_NAMES = {
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
_OUTPUT_NAMES = {
    "replay_out": "replay",
    "load_out": "expert_load",
    "routing_weights_out": "routing_weights",
    "routing_ids_out": "routing_ids",
    "rows_out": "rows",
    "slot_to_row_out": "slot_to_row",
    "gemm1_activation_out": "gemm1_activation",
}
_ROUTING_MODES = {
    frozenset({"logits"}): "logits",
    frozenset({"packed"}): "packed",
    frozenset({"ids", "weights"}): "unpacked",
    frozenset({"ids", "logits"}): "replay",
    frozenset({"token_ids", "token_to_experts", "logits"}): "hash",
}
_ROUTING_NAMES = frozenset().union(*_ROUTING_MODES)


def _routing_mode(given: dict[str, Any]) -> str:
    names = _ROUTING_NAMES.intersection(given)
    mode = _ROUTING_MODES.get(names)
    if mode is None:
        raise ValueError(
            f"routing arguments are {sorted(names)}, wanted exactly one of: logits; ids and "
            "weights; ids and logits; packed; token_ids, token_to_experts and logits"
        )
    return mode


def explain(spec: MoeSpec, device: Device = "cpu", **options: Unpack[PlanOptions]) -> Explanation:
    """Say which kernels would run a spec, and why not the others; needs no weights and no GPU.

    Args:
        spec: the layer.
        device: "cpu", "cuda", "cuda:1" or a torch.device.
        **options: as for `MoeLayer`.

    Raises:
        ValueError: the spec means nothing. An unsupported spec is an answer, not an error.
    """
    answer = lib.explain(spec_to_map(spec), {"max_tokens": 1, **options}, parse_device(device))
    return Explanation(
        supported=bool(answer["supported"]),
        reason=str(answer["reason"]),
        candidates=tuple(
            Candidate(str(c["kernel"]), bool(c["chosen"]), str(c["reason"]))
            for c in answer["candidates"]
        ),
        text=str(answer["text"]),
    )


def _check_spec_of(weights: Weights, spec: MoeSpec) -> None:
    given, wanted = vars(weights.spec), vars(spec)
    for name in wanted:
        if given[name] != wanted[name]:
            raise ValueError(
                f"weights were made for a spec with {name}={given[name]}, wanted {name}="
                f"{wanted[name]}; make them for the layer's spec"
            )


class MoeLayer:
    """A layer that can be called; safe to call from several threads at once.

    Calls release the GIL. Each concurrent call has a workspace of its own.

    On a GPU a call enqueues its work on a stream and returns; it never waits, and may be captured
    into a CUDA graph. Calls on several streams, from one thread or several, have workspaces of
    their own. For torch tensors a workspace is memory of torch's allocator, taken anew by each call
    and shared with whatever else runs on the stream later; a captured call's is the graph's.
    Otherwise it is the library's own and kept for the stream: make one call on the stream before
    capturing it, and replay a graph only where calls on the stream it was captured on could run.

    Args:
        spec: the layer.
        weights: made for an equal spec; kept alive.
        max_tokens: capacity of a call.
        device: that of the weights, which is also what None means; "cuda" takes any GPU.
        **options: the other options of `PlanOptions`.

    Raises:
        ValueError: the spec means nothing, or weights belong to another one or another device.
        NotImplementedError: no kernel runs it; the message says why, as `explain` does.
        MemoryError: there is no memory for the workspace.
    """

    def __init__(
        self,
        spec: MoeSpec,
        weights: Weights,
        max_tokens: int,
        device: Device = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._options: PlanOptions = {**options, "max_tokens": max_tokens}
        self._device = parse_device(weights.device if device is None else device, weights._device)
        self._plan = lib.make_plan(spec_to_map(spec), dict(self._options), self._device)
        self._require_fit(weights)
        self._workspaces = Workspaces(self.workspace_bytes, self._device)

    @property
    def spec(self) -> MoeSpec:
        """The layer."""
        return self._spec

    @property
    def weights(self) -> Weights:
        """Its weights."""
        return self._weights

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda:0"."""
        return device_name(self._device)

    @property
    def max_tokens(self) -> int:
        """Capacity of a call."""
        return self._options["max_tokens"]

    @property
    def workspace_bytes(self) -> int:
        """Bytes that one call needs besides its inputs and outputs."""
        return int(self._plan.workspace_bytes)

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that one pass handles under `workspace_cap`."""
        return int(self._plan.tokens_per_chunk)

    def explain(self) -> Explanation:
        """Which kernels were chosen, and why not the others."""
        return explain(self._spec, self.device, **self._options)

    def with_weights(self, weights: Weights) -> MoeLayer:
        """A layer with other weights that shares this one's plan and workspaces.

        A model whose layers are alike makes one plan, and calls that follow each other use the same
        memory.

        Raises:
            ValueError: the weights were made for another spec, or lie on another device.
        """
        self._require_fit(weights)
        other = copy.copy(self)
        other._weights = weights
        return other

    def _require_fit(self, weights: Weights) -> None:
        _check_spec_of(weights, self._spec)
        if weights._device != self._device:
            raise ValueError(
                f"weights are on {weights.device}, wanted {self.device}, the layer's device; copy "
                "them there (Weights.to), or leave device out"
            )

    def _inputs(self, hidden: Array, call: dict[str, Any], stream: int) -> dict[str, Any]:
        require_not_float32(hidden, "hidden")
        inputs = {
            "routing": _routing_mode(call),
            "hidden_states": as_tensor(hidden, "hidden", stream),
        }
        for name, array in call.items():
            if name in _INPUT_NAMES:
                inputs[_INPUT_NAMES[name]] = as_tensor(array, name, stream)
        if "num_tokens" in call:
            inputs["num_tokens"] = token_count(call["num_tokens"], stream)
        return inputs

    def _result(self, hidden: Array, call: dict[str, Any], stream: int) -> Array:
        result = call.get("out")
        if not call.get("finalize", True):
            if "rows_out" not in call:
                raise ValueError("finalize is False without rows_out, wanted an array for the rows")
            if result is not None or call.get("accumulate"):
                raise ValueError("finalize is False, wanted neither out nor accumulate: no sums")
            return call["rows_out"]
        if result is not None:
            require_not_float32(result, "out")
            return result
        if call.get("accumulate"):
            raise ValueError("accumulate is set without out, wanted an array to add to")
        shape = (int(hidden.shape[0]), self._spec.hidden_size)
        fill = 0 if "num_tokens" in call else None
        return empty_like_kind(hidden, shape, "bfloat16", fill=fill, stream=stream)

    def _outputs(self, result: Array, call: dict[str, Any], stream: int) -> dict[str, Any]:
        outputs: dict[str, Any] = {"accumulate": bool(call.get("accumulate", False))}
        if call.get("finalize", True):
            outputs["output"] = as_output(result, "out", stream)
        for name, array in call.items():
            if name in _OUTPUT_NAMES:
                outputs[_OUTPUT_NAMES[name]] = as_output(array, name, stream)
        return outputs

    def _refuse_gradients(self, hidden: Array, call: dict[str, Any]) -> None:
        refuse_gradients({"hidden": hidden, **call})
        if self._weights._trainable is not None:
            raise_requires_grad(self._weights._trainable)

    def __call__(self, hidden: Array, **call: Unpack[CallOptions]) -> Array:
        """Run the layer.

        Args:
            hidden: [T, H] bfloat16 (uint16 bits in NumPy), T <= max_tokens; or codes of the spec's
                activation format with `hidden_scales`.
            **call: see `CallOptions`.

        Returns:
            `out`, or a new array [T, H] bfloat16 of the kind of `hidden`; rows at and beyond
            `num_tokens` of a new array are zero. `rows_out` where `finalize` is False.

        Raises:
            ValueError: before anything is written, naming the argument, what it is and what was
                wanted; also where torch records gradients and a tensor, or one that the weights
                were made of, requires one: there is no backward.
            MemoryError: there is no memory for the workspace (torch's OutOfMemoryError where the
                memory is torch's).
        """
        given: dict[str, Any] = {k: v for k, v in call.items() if v is not None}
        if not given.keys() <= CallOptions.__optional_keys__:
            unknown = sorted(given.keys() - CallOptions.__optional_keys__)
            raise TypeError(f"a layer got unexpected arguments {unknown}")
        if gradients_enabled():
            self._refuse_gradients(hidden, given)
        uses_torch = is_torch(hidden)
        stream = stream_of(self._device, given.get("stream"), uses_torch=uses_torch)
        inputs = self._inputs(hidden, given, stream)
        result = self._result(hidden, given, stream)
        outputs = self._outputs(result, given, stream)
        workspace = self._workspaces.take(stream, uses_torch=uses_torch)
        try:
            lib.forward(self._plan, self._weights._handle, inputs, outputs, workspace, stream)
        finally:
            self._workspaces.give(workspace, stream, uses_torch=uses_torch)
        return result
