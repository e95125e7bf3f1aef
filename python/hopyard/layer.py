# SPDX-License-Identifier: Apache-2.0
"""The layer: a plan, its weights and a workspace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from hopyard._library import call_layer, lib
from hopyard.arrays import (
    Array,
    as_argument,
    as_tensor,
    crosses_as_it_is,
    empty_like_kind,
    gradients_enabled,
    is_torch,
    raise_requires_grad,
    refuse_gradients,
)
from hopyard.calls import CallOptions, Form, converted, fault_of, form_of, option_value
from hopyard.devices import CPU, Device, device_name, parse_device, stream_of
from hopyard.spec import MoeSpec, spec_to_map
from hopyard.weights import WeightOrders, Weights
from hopyard.workspace import Workspaces

if TYPE_CHECKING:
    from hopyard.tuning import TuningTable


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
        given_ids: calls give experts and weights; else logits. This and the next two choose among
            measurements; a layer runs calls of every kind.
        unfinalised: calls get the rows instead of the output.
        records_replay: calls record the selected ids.
        weight_orders: `Weights.orders` of the weights to come, for measurements, too; a layer's own
            without. Packed ones are refused where there are no kernels for them.
        tuning: a table to look into before those that `hopyard.use_tuning` has given.
        untuned: choose kernels without any measurements.
    """

    max_tokens: int
    tactic: str
    batch_invariant: bool
    workspace_cap: int
    num_threads: int
    overlap_launches: bool
    given_ids: bool
    unfinalised: bool
    records_replay: bool
    weight_orders: WeightOrders
    tuning: TuningTable | None
    untuned: bool


def options_to_map(options: PlanOptions) -> dict[str, Any]:
    """Options as the extension reads them."""
    fields: dict[str, Any] = dict(options)
    tuning = fields.get("tuning")
    orders = fields.get("weight_orders", WeightOrders())
    return {**fields, "tuning": getattr(tuning, "_handle", tuning), "weight_orders": vars(orders)}


def make_plan(spec: MoeSpec, device: int, options: PlanOptions) -> Any:
    """A plan of the extension, for the device of this number."""
    return lib.make_plan(spec_to_map(spec), options_to_map(options), device)


# What looks at a layer and the arguments of a call before it runs; the last one counts. None but
# inside `hopyard.autotune`.
before_calls: list[Callable[[MoeLayer, Mapping[str, Any]], None]] = []


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


def explain(spec: MoeSpec, device: Device = "cpu", **options: Unpack[PlanOptions]) -> Explanation:
    """Say which kernels would run a spec, and why not the others; needs no weights and no GPU.

    Args:
        spec: the layer.
        device: "cpu", "cuda", "cuda:1" or a torch.device.
        **options: as for `MoeLayer`.

    Raises:
        ValueError: the spec means nothing. An unsupported spec is an answer, not an error.
    """
    answer = lib.explain(
        spec_to_map(spec), options_to_map({"max_tokens": 1, **options}), parse_device(device)
    )
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
        self._options: PlanOptions = {
            "weight_orders": weights.orders,
            **options,
            "max_tokens": max_tokens,
        }
        self._device = parse_device(weights.device if device is None else device, weights._device)
        self._plan = self.new_plan()
        self._require_fit(weights)
        self._workspaces = Workspaces(self.workspace_bytes, self._device)

    @property
    def spec(self) -> MoeSpec:
        """The layer."""
        return self._spec

    @property
    def options(self) -> PlanOptions:
        """The options that it runs with."""
        return self._options.copy()

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

    def new_plan(self, changes: PlanOptions | None = None) -> Any:
        """A plan of the extension with some options changed, for whatever needs one beside ours."""
        return make_plan(self._spec, self._device, {**self._options, **(changes or {})})

    def replan(self, **changes: Unpack[PlanOptions]) -> None:
        """Choose the kernels again, with other options.

        Calls that are under way keep their kernels, captured ones for good; layers of
        `with_weights` do, too.

        Raises:
            ValueError: an option that means nothing, or one that changes what a call needs.
        """
        plan = self.new_plan(changes)
        if int(plan.workspace_bytes) != self.workspace_bytes:
            raise ValueError(
                f"{', '.join(changes)} would change the workspace from {self.workspace_bytes} to "
                f"{int(plan.workspace_bytes)} bytes; make another layer"
            )
        self._options = {**self._options, **changes}
        self._plan = plan

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

    def _result(
        self, hidden: Array, call: dict[str, Any], form: Form, stream: int | None
    ) -> tuple[Array, Any]:
        """What a call returns, and where it is new, as the extension takes it."""
        if form.makes_output:
            return self._new_output(hidden, None, stream)
        if not call.get("finalize", True):
            if "rows_out" not in call:
                raise ValueError("finalize is False without rows_out, wanted an array for the rows")
            if "out" in call or call.get("accumulate"):
                raise ValueError("finalize is False, wanted neither out nor accumulate: no sums")
            return call["rows_out"], None
        if "out" in call:
            return call["out"], None
        if call.get("accumulate"):
            raise ValueError("accumulate is set without out, wanted an array to add to")
        return self._new_output(hidden, 0 if "num_tokens" in call else None, stream)

    def _new_output(self, hidden: Array, fill: int | None, stream: int | None) -> tuple[Array, Any]:
        tokens = hidden.shape[0] if len(hidden.shape) > 0 else 0  # a scalar is refused later
        shape = (int(tokens), self._spec.hidden_size)
        made = empty_like_kind(hidden, shape, "bfloat16", fill=fill, stream=stream)
        return made, as_argument(made, "output")

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
        uses_torch = is_torch(hidden)
        if gradients_enabled():
            self._refuse_gradients(hidden, call)
        if self._device == CPU and "stream" not in call:
            stream = 0
        else:
            stream = stream_of(self._device, call.get("stream"), uses_torch=uses_torch)
        given: dict[str, Any] = call
        for value in call.values():
            if type(value) not in crosses_as_it_is:
                call = {k: v for k, v in call.items() if v is not None}
                given = converted(call, stream)
                break
        form = form_of(tuple(given))
        if form.options:
            given |= {name: option_value(name, given[name], stream) for name in form.options}
        # Torch allocates in the order of its current stream, which is the one unless one is named.
        current = uses_torch and "stream" not in call
        as_it_is = uses_torch and type(hidden) in crosses_as_it_is
        states = hidden if as_it_is else as_tensor(hidden, "hidden", stream)
        result, output = self._result(hidden, call, form, None if current else stream)
        if before_calls:
            fault = fault_of(hidden, call, stream)  # before anything is measured for the call
            if fault is not None:
                raise fault
            for before in before_calls[-1:]:  # another thread may have left `autotune` since
                before(self, call)
        workspace = self._workspaces.take(stream, uses_torch=uses_torch, current=current)
        try:
            call_layer(
                self._plan,
                self._weights._handle,
                form.handle,
                workspace,
                stream,
                states,
                output,
                *given.values(),
            )
        except Exception:
            fault = fault_of(hidden, call, stream)
            if fault is None:
                raise
            raise fault from None
        finally:
            self._workspaces.give(workspace, stream, uses_torch=uses_torch)
        return result
