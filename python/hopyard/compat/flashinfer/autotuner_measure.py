# SPDX-License-Identifier: Apache-2.0
"""Measures candidates in turns and decides.

FlashInfer times one tactic after the other, so that a clock that changes in between decides, and
takes the smallest number, however little it is smaller. Here all candidates are measured in turns,
and one replaces the fallback only if it is faster by a margin and by twice the noise of the
difference.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hopyard.compat.flashinfer.autotuner_log import LOG, warn_once

# Turns that a decision needs: below it a median says little.
MIN_ROUNDS = 3
_ROUNDS = 5
# The fastest ones meet the fallback once more, alone, and that many at most.
_DUEL_ROUNDS, _DUELS = 11, 2
# A sample on the host is at least this long, so that the clock's steps (~50 ns) and a call of
# Python (~1 us) weigh below a percent of it.
_SAMPLE_SECONDS = 2e-4
_MOST_CALLS = 200
# A candidate whose best turn is slower than this many times the best median is measured no more.
_HOPELESS = 1.3
# One whose fastest warm-up is slower than this many times the fastest of all takes no turn.
_FAR_TOO_LATE = 10
# Cycles of an SM in a microsecond, at most: H100's boost clock is 1.98 GHz.
_CYCLES_PER_MICROSECOND = 2000

_local = threading.local()


def is_in_profile_measurement() -> bool:
    """Whether this thread is inside a measurement of the tuner."""
    return bool(getattr(_local, "measuring", False))


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    before = is_in_profile_measurement()
    _local.measuring = True
    try:
        yield
    finally:
        _local.measuring = before


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, by torch or by the library."""
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def recover(device: Any) -> None:
    """Bring a GPU back to order after an error, as far as that is possible."""
    if device is None or device.type != "cuda":
        return
    torch = sys.modules["torch"]
    with contextlib.suppress(Exception):
        torch.cuda.synchronize(device)
    # A launch that failed outside of torch is found by torch's next one, which is not to blame.
    with contextlib.suppress(Exception):
        torch.ones(1, device=device)


@dataclass
class Candidate:
    """One way to run an operation, and how long it took.

    Attributes:
        runner: place in the list of runners.
        tactic: of that runner.
        call: runs it once, with the inputs of an iteration.
        samples: milliseconds a call, one for each turn.
        fault: the error that took it out of the race.
        dropped: it cannot win and is measured no more.
        calls: that a sample consists of.
        replay: runs them from a captured graph.
    """

    runner: int
    tactic: Any
    call: Callable[[int], Any]
    samples: list[float] = field(default_factory=list)
    fault: str | None = None
    dropped: bool = False
    calls: int = 0
    replay: Callable[[], None] | None = None

    @property
    def running(self) -> bool:
        """Whether it is still measured."""
        return self.fault is None and not self.dropped

    @property
    def median(self) -> float:
        """Milliseconds a call; infinite for what failed or was never measured."""
        if self.fault is not None or not self.samples:
            return math.inf
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Timing:
    """How calls are timed.

    Attributes:
        device: of the inputs, and torch's current one; None for the CPU.
        batches: different inputs that calls go round.
        warmup: calls before the first turn.
        repeat: timed calls of a candidate, over all turns, at least.
        use_graph: replay calls from a CUDA graph.
        delay_us: the GPU waits so long before a sample, which hides the launches.
    """

    device: Any = None
    batches: int = 1
    warmup: int = 3
    repeat: int = 10
    use_graph: bool = False
    delay_us: int = 5000

    @property
    def on_gpu(self) -> bool:
        """Whether the inputs are on a GPU."""
        return self.device is not None and self.device.type == "cuda"


def check_timer() -> None:
    """Say so where the environment asks for a timer that is not there."""
    wanted = os.environ.get("FLASHINFER_AUTOTUNE_TIMER", "cuda_event")
    if wanted != "cuda_event":
        warn_once(
            ("timer", wanted),
            "[Autotuner]: FLASHINFER_AUTOTUNE_TIMER=%s: there is no such timer here; wanted "
            "cuda_event, which is used",
            wanted,
        )


class _Stopwatch:
    """Milliseconds that calls of one candidate take, on the host's or the GPU's clock."""

    def __init__(self, timing: Timing, calls: int = 0) -> None:
        self._timing = timing
        self.calls = calls or max(timing.repeat // _ROUNDS, 1)

    def attempt(self, candidate: Candidate, action: Callable[[], Any]) -> Any:
        """Run a step of a candidate; an error takes it out of the race.

        No memory is everybody's error, and passed on.
        """
        try:
            return action()
        except Exception as error:
            recover(self._timing.device)
            if out_of_memory(error):
                raise
            LOG.debug("[Autotuner]: tactic %s failed: %s", candidate.tactic, error)
            LOG.debug("[Autotuner]: the error in full", exc_info=error)
            # Not the error: its frames would keep inputs and graphs, in a cycle with the candidate.
            candidate.fault = f"{type(error).__name__}: {error}"
            return None

    def warm_up(self, candidate: Candidate, fastest: float) -> float:
        """Run a candidate the first times; seconds of its fastest call.

        One that is far too late is left alone after the second call: the first may compile.
        """
        best = math.inf
        for number in range(max(self._timing.warmup, 1)):
            begin = time.perf_counter()
            candidate.call(self._timing.repeat - 1)  # the last of the cold inputs
            self._wait()
            best = min(best, time.perf_counter() - begin)
            if number >= 1 and best > max(_FAR_TOO_LATE * fastest, _SAMPLE_SECONDS):
                break
        return best

    def fit(self, seconds: float) -> None:
        """Choose the calls of a sample by how long one takes; a graph has all the inputs."""
        if self._timing.on_gpu:
            if self._timing.use_graph:
                self.calls = max(self.calls, self._timing.batches)
        else:
            needed = math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9))
            self.calls = min(max(self.calls, needed), _MOST_CALLS)

    def capture(self, candidate: Candidate) -> None:
        """Record a sample's calls as a graph."""
        torch = sys.modules["torch"]
        graph, device = torch.cuda.CUDAGraph(), self._timing.device
        # Torch's own stream for captures is one of whichever GPU was the first; other threads may
        # allocate meanwhile; and where a capture fails, older torch stays on its stream.
        capture = {"stream": torch.cuda.Stream(device), "capture_error_mode": "thread_local"}
        usual = torch.cuda.current_stream(device)
        with torch.cuda.stream(usual), torch.cuda.graph(graph, **capture):
            for i in range(self.calls):
                candidate.call(i)
        candidate.replay = graph.replay

    def _wait(self) -> None:
        if self._timing.on_gpu:
            sys.modules["torch"].cuda.current_stream(self._timing.device).synchronize()

    def _run(self, candidate: Candidate, first: int) -> None:
        if candidate.replay is not None:
            candidate.replay()
            return
        for i in range(self.calls):
            candidate.call(first + i)

    def sample(self, candidate: Candidate, turn: int) -> float:
        """Milliseconds a call."""
        first = turn * self.calls
        if not self._timing.on_gpu:
            begin = time.perf_counter()
            self._run(candidate, first)
            return (time.perf_counter() - begin) * 1e3 / self.calls
        torch = sys.modules["torch"]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._timing.delay_us * _CYCLES_PER_MICROSECOND)
        start.record()
        self._run(candidate, first)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self.calls


def _drop_hopeless(candidates: Sequence[Candidate], fallback: Candidate) -> None:
    best = min(c.median for c in candidates)
    for candidate in candidates:
        if candidate.running and min(candidate.samples) > _HOPELESS * best:
            candidate.dropped = candidate is not fallback


def _turns(
    candidates: Sequence[Candidate], watch: _Stopwatch, rounds: int, drop: bool = False
) -> None:
    """Measure every candidate that is running once in each round."""
    with _measuring():
        for turn in range(rounds):
            for candidate in (c for c in candidates if c.running):
                sample = watch.attempt(candidate, lambda c=candidate, t=turn: watch.sample(c, t))
                if sample is not None:
                    candidate.samples.append(sample)
            if drop and turn >= 1:
                _drop_hopeless(candidates, candidates[0])


def _warm_up(candidates: Sequence[Candidate], watch: _Stopwatch, drop: bool) -> None:
    took, fastest = {}, math.inf
    for place, candidate in enumerate(candidates):
        seconds = watch.attempt(candidate, lambda c=candidate, best=fastest: watch.warm_up(c, best))
        if seconds is not None:
            took[place], fastest = seconds, min(fastest, seconds)
    for place, seconds in took.items():
        too_late = seconds > max(_FAR_TOO_LATE * fastest, _SAMPLE_SECONDS)
        candidates[place].dropped = drop and place > 0 and too_late
    watch.fit(fastest)


def race(candidates: Sequence[Candidate], timing: Timing, *, drop: bool = True) -> None:
    """Measure candidates in turns; the first one is the fallback.

    What was measured is in their samples, also where this is interrupted.

    Args:
        candidates: of one set of inputs.
        timing: how.
        drop: leave off measuring those that cannot win.
    """
    check_timer()
    watch = _Stopwatch(timing)
    with _measuring():
        _warm_up(candidates, watch, drop)
        for candidate in candidates:
            if timing.use_graph and timing.on_gpu and candidate.running:
                watch.attempt(candidate, lambda c=candidate: watch.capture(c))
    for candidate in candidates:
        candidate.calls = watch.calls
    _turns(candidates, watch, _ROUNDS, drop)


def _noise(ratios: Sequence[float]) -> float:
    """Standard error of a median, by the median absolute deviation: 1.4826 makes it a standard
    deviation of normal values, whose median has 1.2533 times the error of their mean."""
    middle = statistics.median(ratios)
    spread = statistics.median(abs(ratio - middle) for ratio in ratios)
    return 1.4826 * 1.2533 * spread / math.sqrt(len(ratios))


def beats(mine: Sequence[float], fallback: Sequence[float], margin: float) -> bool:
    """Whether samples are below the fallback's of the same turns by more than chance."""
    ratios = [a / max(b, 1e-12) for a, b in zip(mine, fallback, strict=False)]
    if len(ratios) < MIN_ROUNDS:
        return False
    return 1 - statistics.median(ratios) > max(margin, 2 * _noise(ratios))


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that were measured, fastest first; equal ones in their order."""
    return sorted((c for c in candidates if c.median < math.inf), key=lambda c: c.median)


def decide(candidates: Sequence[Candidate], margin: float) -> Candidate | None:
    """By the samples of a race: the fastest that beats the fallback (the first), else the fallback.

    None if all failed.
    """
    fallback = candidates[0]
    for candidate in ranked(candidates):
        if candidate is fallback or fallback.median == math.inf:
            return candidate
        if beats(candidate.samples, fallback.samples, margin):
            return candidate
    return None


def confirmed(candidates: Sequence[Candidate], timing: Timing, margin: float) -> Candidate | None:
    """`decide` by measuring once more: who was fastest of many was also lucky.

    The fastest ones meet the fallback alone, and what was measured before does not count.
    """
    fallback = candidates[0]
    if fallback.median == math.inf:
        return next(iter(ranked(candidates)), None)
    enough = fallback.median * (1 - margin)
    for candidate in [c for c in ranked(candidates) if c.median < enough][:_DUELS]:
        duel = [replace(c, samples=[], dropped=False) for c in (fallback, candidate)]
        _turns(duel, _Stopwatch(timing, duel[0].calls), _DUEL_ROUNDS)
        candidate.fault = duel[1].fault
        if candidate.fault is None and beats(duel[1].samples, duel[0].samples, margin):
            return candidate
    return fallback
