# SPDX-License-Identifier: Apache-2.0
"""From a checked call to a layer: plans by the value of a spec, views of weights by descriptors.

Nothing is remembered about what weights hold. A view of weights is found by the address, shape,
strides, type and device of every one of their arrays, and is right for whatever lies there. What
follows from the content of small arrays (scalars, biases in other units) is computed again by every
call, into memory that belongs to the view. What cannot be expressed is refused by the content that
a call finds, not by what an earlier one found; that scales are finite, and positive where they must
be, is looked at where a view is made.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import hopyard
from hopyard.arrays import Array, is_torch
from hopyard.autotune import options_of, path_of
from hopyard.compat.flashinfer import autotuner_moe as tuned
from hopyard.compat.flashinfer import checks, ops
from hopyard.devices import torch_module

_MAX_PLANS = 32
_MAX_VIEWS = 1024
_LEAST_TOKENS = 16

Buffers = dict[str, Array]
Groups = tuple[hopyard.ExpertWeights, hopyard.ExpertWeights | None]


def _derive_nothing(_: Buffers) -> None:
    pass


@dataclass(frozen=True)
class Experts:
    """The experts of a call, before they are described to the library.

    Attributes:
        key: descriptors and layouts of all their arrays.
        build: makes routed and shared `hopyard.ExpertWeights` of views and of the buffers.
        buffers: shapes of derived float32 arrays, which start as ones.
        derive: writes what follows from the arrays of this call into the buffers.
        check: refuses what the buffers or the checked arrays hold.
        checked: the caller's arrays whose content `check` depends on.
        cacheable: False where the library keeps something that it read from the weights.
    """

    key: Hashable
    build: Callable[[Buffers], Groups]
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    derive: Callable[[Buffers], None] = _derive_nothing
    check: Callable[[Buffers], None] = _derive_nothing
    checked: tuple[Array, ...] = ()
    cacheable: bool = True


def _version(array: Array) -> int | None:
    """Torch's count of writes to a tensor on a GPU; None where every call must look.

    Looking costs nothing on the CPU. On a GPU it waits, but torch counts the writes there, except
    those to tensors that were made in inference mode.
    """
    if not is_torch(array) or array.device.type != "cuda" or array.is_inference():
        return None
    return int(array._version)


class _Seen:
    """Which tensors were found right: while they are the same and unwritten they need no look."""

    def __init__(self) -> None:
        self._tokens: tuple[tuple[weakref.ref[Any], int | None], ...] = ()

    def ensure(self, arrays: tuple[Array, ...], look: Callable[[], None]) -> None:
        """Call `look`, which may refuse, unless it accepted these very contents before."""
        versions = [_version(array) for array in arrays]
        if len(self._tokens) == len(arrays) and all(
            ref() is array and seen == version
            for array, version, (ref, seen) in zip(arrays, versions, self._tokens, strict=True)
        ):
            return
        self._tokens = ()
        look()
        if None not in versions:
            refs = [weakref.ref(array) for array in arrays]
            self._tokens = tuple(zip(refs, versions, strict=True))


@dataclass(frozen=True)
class _View:
    """Weights as the library sees them, what they point to, and which contents were looked at."""

    weights: hopyard.Weights
    buffers: Buffers
    seen: _Seen = field(default_factory=_Seen)


class _Cache:
    """A dictionary of bounded size that forgets what was used least recently."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._pinned: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], pin: bool = False) -> Any:
        """The item of a key, made where it is missing; pinned items are never forgotten."""
        with self._lock:
            item = self._pinned.get(key)
            if item is None and key in self._items:
                item = self._items[key]
                self._items.move_to_end(key)
        if item is None:
            item = make()
        with self._lock:
            if pin:
                self._pinned[key] = item
            else:
                self._items[key] = item
                while len(self._items) > self._size:
                    self._items.popitem(last=False)
        return item

    def clear(self) -> None:
        """Forget everything that is not pinned."""
        with self._lock:
            self._items.clear()

    def __len__(self) -> int:
        return len(self._items.keys() | self._pinned.keys())


_plans = _Cache(_MAX_PLANS)
_views = _Cache(_MAX_VIEWS)
_local = threading.local()


def clear_caches() -> None:
    """Forget plans, workspaces and descriptions of weights, but for those in captured graphs."""
    _plans.clear()
    _views.clear()


@contextlib.contextmanager
def tactic(name: str) -> Iterator[None]:
    """Calls of this thread run with the kernel of this name ("" = the library chooses)."""
    previous = getattr(_local, "tactic", "")
    _local.tactic = name
    try:
        yield
    finally:
        _local.tactic = previous


@contextlib.contextmanager
def flashinfer_errors() -> Iterator[None]:
    """Refusals of the library as FlashInfer's class for what its C++ refuses."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def _make_view(
    spec: hopyard.MoeSpec, experts: Experts, like: Array, capturing: bool = False
) -> _View:
    if capturing:
        remedy = "make one call with the same arrays before the capture"
        if not experts.cacheable:
            remedy = "MXFP4 weights with FP8 hidden states cannot be captured; use MXFP8 or BF16"
        raise RuntimeError(
            f"a stream is being captured, and describing weights waits for the GPU: {remedy}"
        )
    with ops.written_later(like):
        buffers = {name: ops.full(like, shape, 1.0) for name, shape in experts.buffers.items()}
        experts.derive(buffers)
    if is_torch(like) and like.device.type == "cuda":  # scales are about to be read by the host
        torch_module().cuda.current_stream(like.device).synchronize()
    return _View(hopyard.Weights(spec, *experts.build(buffers)), buffers)


def _look(experts: Experts, buffers: Buffers, capturing: bool) -> None:
    if capturing:
        raise RuntimeError(
            "a stream is being captured, and the scalars of MXFP4 weights must be looked at, which "
            "waits for the GPU: before the capture make one call with the same tensors (the same "
            "objects, not views of them made anew, nor made in inference mode), or pass None"
        )
    experts.check(buffers)


def _capacity(tokens: int) -> int:
    return max(_LEAST_TOKENS, 1 << max(tokens - 1, 0).bit_length())


def run(
    operation: tuned.Operation,
    spec: hopyard.MoeSpec,
    experts: Experts,
    hidden: Array,
    call: dict[str, Any],
) -> Array:
    """Run a layer on FlashInfer's arrays.

    Args:
        operation: which function was called.
        spec: the layer.
        experts: its weights.
        hidden: hidden states [T, ..].
        call: arguments of `hopyard.MoeLayer`.

    Raises:
        NotImplementedError: the result has no memory, as under a mode of fake tensors.
        RuntimeError: what the library refuses; new arrays while a stream is captured.
    """
    checks.require_memory(call["rows_out" if "rows_out" in call else "out"], "the result")
    capacity = _capacity(ops.shape_of(hidden)[0])
    device = ops.place_of(hidden)
    kernel = getattr(_local, "tactic", "")
    pin = ops.is_capturing(hidden)
    with flashinfer_errors():
        if experts.cacheable:
            key = (spec, device, is_torch(hidden), experts.key)
            view = _views.get(key, lambda: _make_view(spec, experts, hidden, pin), pin)
            experts.derive(view.buffers)
        else:
            view = _make_view(spec, experts, hidden, pin)
        if experts.checked:
            view.seen.ensure(experts.checked, lambda: _look(experts, view.buffers, pin))
        path = path_of(call)
        if not kernel:
            tuned.tune_once(operation, spec, view.weights, path)
        options = {**options_of(path), "max_tokens": capacity, "tactic": kernel}
        layer = _plans.get(
            (spec, device, capacity, kernel, path, operation.skipped, tuned.generation()),
            lambda: tuned.make_layer(operation, spec, view.weights, options),
            pin,
        )
        return layer.with_weights(view.weights)(hidden, **call)
