# SPDX-License-Identifier: Apache-2.0
"""Measures which kernels of a layer are fast, and has its calls use them.

    table = hopyard.tune(layer)                     # one layer, now
    with hopyard.autotune(cache="tuned.json"):      # every layer, at its first call inside
        model(tokens)

docs/tuning.md tells how it is measured.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict, Unpack
from weakref import WeakKeyDictionary

from hopyard._library import lib
from hopyard.arrays import Array, as_tensor
from hopyard.devices import CPU, stream_of, torch_module
from hopyard.layer import MoeLayer, PlanOptions, before_calls
from hopyard.spec import MoeSpec
from hopyard.tuning import (
    CallPath,
    TunedLayer,
    TuningKey,
    TuningMachine,
    TuningTable,
    use_tuning,
    wait_for_tuning,
)
from hopyard.weights import Weights

_LOG = logging.getLogger("hopyard")
# A rank that waits looks for Ctrl-C this often.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class TuneProgress:
    """How far a run is.

    Attributes:
        done: numbers of tokens that are measured, of `total`.
        total: how many there are.
        tokens: being measured.
        candidates: kernels still in the race.
        best: the fastest so far, at `tokens`.
        best_us: its time.
        seconds: since the start.
        seconds_left: expected.
    """

    done: int
    total: int
    tokens: int
    candidates: int
    best: str
    best_us: float
    seconds: float
    seconds_left: float


class TuneOptions(TypedDict, total=False):
    """What is measured, and for how long.

    Attributes:
        tokens: numbers of tokens to measure at; `token_buckets(max_tokens)` without.
        routings: that calls rotate over, "uniform", "zipf", "balanced", "hot"; the first two
            without.
        recorded: replay of real tokens [n, top_k] int16 or int32 on the host, instead of these.
        max_seconds: then what was measured is kept; 60 without.
        margin: a winner is faster by this part of the time, and by twice the noise; 0.01 without.
        max_bytes: memory that inputs, outputs and workspace may take; half the free without.
        blocklist: tactics, or kernels of them, that are never run.
        seed: of the inputs.
        progress: called between measurements; False ends the run and keeps what was measured.
        measured: called with (tactic, tokens, microseconds) of each candidate that was measured.
    """

    tokens: Sequence[int]
    routings: Sequence[str]
    recorded: Array
    max_seconds: float
    margin: float
    max_bytes: int
    blocklist: Sequence[str]
    seed: int
    progress: Callable[[TuneProgress], bool | None]
    measured: Callable[[str, int, float], None]


def path_of(call: Mapping[str, Any]) -> CallPath:
    """How a call gives and gets, by the arguments of `MoeLayer`."""
    given = {name for name in ("packed", "ids", "logits") if call.get(name) is not None}
    return CallPath(
        ids="packed" in given or ("ids" in given and "logits" not in given),
        unfinalised=call.get("finalize") is False,
        replay=call.get("replay_out") is not None,
    )


def options_of(path: CallPath) -> PlanOptions:
    """The options that say how a layer's calls give and get."""
    return {
        "given_ids": path.ids,
        "unfinalised": path.unfinalised,
        "records_replay": path.replay,
    }


def _path_in(options: PlanOptions) -> CallPath:
    return CallPath(
        options.get("given_ids", False),
        options.get("unfinalised", False),
        options.get("records_replay", False),
    )


class _CtrlC:
    """Within it the first Ctrl-C is noted, the second does what it did before.

    Python runs handlers when a callback of the run begins, before any `try` of it: an exception
    there would lose what was measured. Only the main thread has handlers.
    """

    def __init__(self) -> None:
        self._usual: Any = None
        self._noted: tuple[int, FrameType | None] | None = None

    @property
    def noted(self) -> bool:
        return self._noted is not None

    def __enter__(self) -> _CtrlC:
        if threading.current_thread() is threading.main_thread():
            usual = signal.getsignal(signal.SIGINT)
            if callable(usual):  # else it is ignored, ends the process, or is not Python's
                self._usual = usual
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._usual is not None:
            signal.signal(signal.SIGINT, self._usual)
        if kind is not None and self._noted is not None:  # who handles that shall hear of this, too
            self._usual(*self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number, frame
        signal.signal(signal.SIGINT, self._usual)

    def error(self) -> BaseException | None:
        """What the usual handler makes of it: KeyboardInterrupt, or nothing."""
        if self._noted is None:
            return None
        try:
            self._usual(*self._noted)
        except BaseException as error:  # the caller raises it
            return error
        return None


class _Progress:
    """The caller's function; an error in it, Ctrl-C too, is the run's orderly end."""

    def __init__(
        self, progress: Callable[[TuneProgress], bool | None] | None, ctrl_c: _CtrlC
    ) -> None:
        self._progress = progress
        self._ctrl_c = ctrl_c
        self.error: BaseException | None = None

    def __call__(self, given: Any) -> bool:
        try:
            if self._progress is None or self._ctrl_c.noted:
                return not self._ctrl_c.noted
            progress = TuneProgress(**{str(name): value for name, value in given.items()})
            return self._progress(progress) is not False and not self._ctrl_c.noted
        except BaseException as error:  # raised again once what was measured is safe
            self.error = error
            return False


def _converted(options: TuneOptions) -> dict[str, Any]:
    """Options as the extension takes them, without the functions."""
    unknown = set(options) - set(TuneOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"tune() got unknown options {sorted(unknown)}, wanted some of "
            f"{sorted(TuneOptions.__annotations__)}"
        )
    result: dict[str, Any] = {
        name: value
        for name, value in options.items()
        if value is not None and name not in ("progress", "measured")
    }
    for name in ("tokens", "routings", "blocklist"):
        if name in result:
            result[name] = list(result[name])
    if "recorded" in result:
        result["recorded"] = as_tensor(result["recorded"], "recorded")
    return result


def measure_plan(
    plan: Any, weights: Weights, options: TuneOptions, stream: Any = None
) -> tuple[TuningTable, BaseException | None]:
    """Measure a plan's layer.

    Args:
        plan: of the extension.
        weights: of the layer.
        options: see `TuneOptions`.
        stream: GPU: handle of the stream to measure on; without it torch's current one where torch
            uses a GPU, whatever the weights were made of: the calls are torch's then, and a capture
            of theirs must be seen.

    Returns:
        The table, and the error of `progress` (also Ctrl-C) that ended the run early.
    """
    ctrl_c = _CtrlC()
    progress = _Progress(options.get("progress"), ctrl_c)
    measured = options.get("measured") or (lambda *_: None)
    torch, handle = torch_module(), 0
    if weights._device != CPU:
        uses_torch = torch is not None and torch.cuda.is_initialized()
        handle = stream_of(weights._device, stream, uses_torch=uses_torch)
    converted = _converted(options)
    with ctrl_c:
        found = TuningTable(lib.tune(plan, weights._handle, converted, progress, measured, handle))
    interrupt = ctrl_c.error()
    return found, progress.error if interrupt is None else interrupt


def tune(layer: MoeLayer, **options: Unpack[TuneOptions]) -> TuningTable:
    """Measure the kernels of a layer, on its device with its weights, on torch's current stream.

    What is measured are calls as the layer's options say: `given_ids`, `unfinalised` and
    `records_replay`. The layer goes on with the kernels that it has: `layer.replan(tuning=table)`
    changes that, `use_tuning(table)` that of all layers that are made from now on.

    Args:
        layer: what to tune.
        **options: see `TuneOptions`.

    Returns:
        A table of one layer. Candidates that failed are in it, with the reason.

    Raises:
        ValueError: an option that means nothing, or a stream that is being captured.
        KeyboardInterrupt: Ctrl-C, or whatever `progress` raises; what was measured is the
            attribute `table` of it.
    """
    table, error = measure_plan(layer.new_plan(), layer.weights, options)
    if error is not None:
        error.table = table  # type: ignore[attr-defined]
        raise error
    return table


def _reaches(found: TunedLayer, tokens: int) -> bool:
    return bool(found.ranges) and found.ranges[-1].last >= tokens


def knows(table: TuningTable | None, spec: MoeSpec, options: PlanOptions, tokens: int = 1) -> bool:
    """Whether a table has the layer itself, not one that is alike, up to a number of tokens."""
    found = None if table is None else table.find(spec, **options)
    if found is None or not _reaches(found, tokens):
        return False
    path = _path_in(options)
    return found.key.path == path and (path.ids or found.key.routing == spec.routing)


class Session:
    """An open `autotune`.

    Attributes:
        tables: what is known, of the file and of this process, by machine: the CPU with a number of
            threads is one, a GPU model another.
        table: that of the machine of the layer that came last; before the first, the file's.
    """

    def __init__(
        self,
        cache: str | os.PathLike[str] | None,
        ranks: tuple[int, int],
        timeout: float,
        options: TuneOptions,
    ) -> None:
        self._cache = None if cache is None else Path(cache)
        self._rank, self._ranks = ranks
        self._timeout = timeout
        self._options = options
        self._lock = threading.RLock()
        self._prepared: WeakKeyDictionary[MoeLayer, CallPath] = WeakKeyDictionary()
        self._writes = self._cache is not None and self._rank == 0
        self._dirty = False
        self._warned = False  # of a file that cannot be written
        self._tried: set[Any] = set()  # measured, or waited for, in this session
        self._taken: dict[TuningKey, TunedLayer] = {}  # what this rank has waited for
        self.table: TuningTable | None = None
        self.tables: dict[TuningMachine, TuningTable] = {}
        self._machine: TuningMachine | None = None  # the file's
        if not 0 <= self._rank < self._ranks:
            raise ValueError(f"rank is {self._rank}, wanted 0 .. {self._ranks - 1}")
        if self._ranks > 1 and self._cache is None:
            raise ValueError(
                "cache is None with several ranks, wanted a file that all of them see: rank 0 "
                "writes what the others use"
            )
        if self._cache is not None and self._cache.exists():
            self._take_file(TuningTable.load(self._cache))
        self._opened = self.table

    def prepare(self, layer: MoeLayer, call: Mapping[str, Any]) -> None:
        """Have a layer run the kernels that are fast for calls like this one."""
        path = path_of(call)
        if self._prepared.get(layer) == path:
            return
        given = layer.options
        if given.get("tactic") or given.get("untuned"):
            return
        with self._lock:
            error = self._settle(layer, {**given, **options_of(path)}, call.get("stream"))
            layer.replan(**options_of(path), tuning=self._beside(given.get("tuning")))
            if error is not None:
                raise error
            self._prepared[layer] = path

    def _beside(self, own: TuningTable | None) -> TuningTable | None:
        """What the session knows, and the rest of a layer's own table of this machine."""
        if own is None or self.table is None:
            return own if self.table is None else self.table
        return own.merge(self.table) if own.machine == self.table.machine else self.table

    def _settle(self, layer: MoeLayer, options: PlanOptions, stream: Any) -> BaseException | None:
        """Have the layer in the table; the error that ended a measurement early."""
        tokens = max(self._options.get("tokens") or [layer.tokens_per_chunk])
        machine = TuningTable.empty(layer.device, layer.options.get("num_threads", 0)).machine
        self._refuse_other(machine)
        self.table = self.tables.get(machine)
        if knows(self.table, layer.spec, options, tokens):
            return None
        # A run that ended early by its limits is not repeated for every layer that is alike.
        how = [options.get(name) for name in ("overlap_launches", "num_threads", "weight_orders")]
        about = (layer.spec, layer.device, _path_in(options), tokens, *how)
        error = None
        if about not in self._tried:
            if self._rank == 0:
                error = self._measure(layer, options, stream)
            else:
                self._wait(layer, options, tokens)
                self._refuse_other(machine)
        if error is None:
            self._tried.add(about)
        return error

    def _measure(self, layer: MoeLayer, options: PlanOptions, stream: Any) -> BaseException | None:
        plan = layer.new_plan(options)
        found, error = measure_plan(plan, layer.weights, self._options, stream)
        (tuned,) = found.layers
        if tuned.ranges:  # merging keeps what an earlier run has measured beyond
            self._add(found)
            self.save()
        return error

    def _refuse_other(self, machine: TuningMachine) -> None:
        """Ranks have nothing but the file, which holds one machine's measurements."""
        if self._ranks > 1 and self._machine not in (None, machine):
            raise ValueError(
                f"cache is {self._cache}, which holds for {self._machine}; this layer runs on "
                f"{machine}: with several ranks tune layers of another machine in a context with a "
                "file of its own"
            )

    def _take_file(self, table: TuningTable) -> None:
        self._machine = table.machine
        self.table = self.tables[table.machine] = table

    def _wait(self, layer: MoeLayer, options: PlanOptions, tokens: int) -> None:
        assert self._cache is not None
        old = None if self._opened is None else self._opened.find(layer.spec, **options)
        end = time.monotonic() + self._timeout
        while True:
            left = max(end - time.monotonic(), 0.0)
            look = min(left, _LOOK_SECONDS)
            try:
                found = wait_for_tuning(self._cache, layer.spec, look, **options)
            except TimeoutError as error:
                why = str(error)
            else:
                # What falls short but is new is all that rank 0 measured in its time.
                new = bool(found.ranges) and found != self._taken.get(found.key, old)
                if new or _reaches(found, tokens):
                    self._taken[found.key] = found
                    self._take_file(TuningTable.load(self._cache))
                    return
                last = found.ranges[-1].last if found.ranges else 0
                why = f"{self._cache} has it up to {last} tokens, wanted {tokens}"
                time.sleep(look)
            if left <= _LOOK_SECONDS:
                raise TimeoutError(
                    f"rank {self._rank} of {self._ranks} waited {self._timeout:g} s for rank 0 "
                    f"to tune a layer; every rank must call the same layers: {why}"
                )

    def _add(self, found: TuningTable) -> None:
        machine = found.machine
        known = self.tables.get(machine)
        self.table = self.tables[machine] = found if known is None else known.merge(found)
        self._machine = self._machine or machine
        if machine == self._machine:
            self._dirty = True
        elif self._cache is not None and known is None:
            _LOG.warning(
                "hopyard.autotune: cache=%s holds for %s; what is measured on %s stays in this "
                "process",
                self._cache,
                self._machine,
                machine,
            )

    def save(self) -> None:
        """Merge what was measured into the file; where that fails the process keeps it."""
        if not (self._writes and self._dirty and self._machine and self._cache):
            return
        try:
            self.tables[self._machine].save(self._cache)
            self._dirty = False
        except (ValueError, TimeoutError, OSError) as error:  # the next layer tries again
            if not self._warned:
                _LOG.warning("hopyard.autotune: measurements are not saved: %s", error)
            self._warned = True


@contextlib.contextmanager
def autotune(
    cache: str | os.PathLike[str] | None = None,
    tokens: Sequence[int] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = 600.0,
    **options: Unpack[TuneOptions],
) -> Iterator[Session]:
    """Within it every `MoeLayer` is tuned at its first call, and runs what won from then on.

    What is tuned is how that call gets its routing (logits or ids) and gives its result. Layers
    that are made later find the measurements, too. Layers with a `tactic` are left alone. A call
    that measures waits, allocates, and cannot be captured.

    Args:
        cache: file of a `TuningTable`, loaded first, written after every layer; what it has, up to
            the largest of `tokens`, is not measured again. It is of one machine, the first layer's
            where it is new: what is measured on others, or cannot be written, stays in this
            process, with a warning.
        tokens: numbers of tokens to measure at; `token_buckets(max_tokens)` of the layer without.
        rank: of this process; others than 0 never measure, and wait for what rank 0 writes.
        world_size: number of ranks, which share `cache`.
        timeout: seconds that a rank waits for a layer; then TimeoutError.
        **options: see `TuneOptions`.

    Raises:
        ValueError: ranks without a file, or with layers on another machine than the file's; a file
            that is no table.
    """
    if tokens is not None:
        options["tokens"] = list(tokens)
    session = Session(cache, (rank, world_size), timeout, options)
    before_calls.append(session.prepare)
    try:
        yield session
    finally:
        before_calls.remove(session.prepare)
        for table in session.tables.values():
            use_tuning(table)
        session.save()
