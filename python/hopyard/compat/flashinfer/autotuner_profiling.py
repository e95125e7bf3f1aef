# SPDX-License-Identifier: Apache-2.0
"""Measures the profiles of a call: inputs, candidates, the race, what is counted and stored."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hopyard.arrays import is_torch
from hopyard.compat.flashinfer.autotuner_blocklist import TacticsBlocklist, scope_of
from hopyard.compat.flashinfer.autotuner_config import (
    OptimizationProfile,
    TunableRunner,
    TuningConfig,
    cache_key,
    nearest_profile,
)
from hopyard.compat.flashinfer.autotuner_inputs import MadeTensors, batches_of, make_inputs
from hopyard.compat.flashinfer.autotuner_keys import ProfilingCacheKey, hashable
from hopyard.compat.flashinfer.autotuner_log import LOG
from hopyard.compat.flashinfer.autotuner_measure import (
    MIN_ROUNDS,
    Candidate,
    Timing,
    confirmed,
    decide,
    out_of_memory,
    race,
    ranked,
    recover,
)
from hopyard.compat.flashinfer.autotuner_store import FALLBACK, ChoiceStore

_MAX_RANKINGS = 1024


@dataclass
class AutoTunerStatistics:
    """What the tuner did, by operation; printable.

    Attributes:
        cache_misses: calls and profiles without a known choice.
        cache_miss_config_collection: their shapes.
        failed_profiling_count: keys with a tactic that failed.
        tuned_op_total_configs: profiles measured.
        tuned_op_successful_configs: those that a choice came of.
        failed_tactics: by "op::Runner".
    """

    cache_misses: int = 0
    cache_miss_config_collection: dict[str, set[Any]] = field(default_factory=dict)
    failed_profiling_count: dict[str, set[ProfilingCacheKey]] = field(default_factory=dict)
    tuned_op_total_configs: dict[str, int] = field(default_factory=dict)
    tuned_op_successful_configs: dict[str, int] = field(default_factory=dict)
    failed_tactics: dict[str, set[Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"cache misses: {self.cache_misses}"]
        for op, shapes in sorted(self.cache_miss_config_collection.items()):
            lines.append(f"  {op}: {len(shapes)} shapes missed")
        for op, total in sorted(self.tuned_op_total_configs.items()):
            good = self.tuned_op_successful_configs.get(op, 0)
            failed = len(self.failed_profiling_count.get(op, ()))
            lines.append(f"  {op}: {good} of {total} profiles tuned, {failed} with failures")
        for scope, tactics in sorted(self.failed_tactics.items()):
            lines.append(f"  {scope}: failed {sorted(tactics, key=repr)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Call:
    """A call of `choose_one`."""

    op: str
    runners: tuple[TunableRunner, ...]
    config: TuningConfig
    inputs: list[Any]
    kwargs: dict[str, Any]

    def key(self, runner: TunableRunner, shapes: Sequence[Sequence[int]]) -> ProfilingCacheKey:
        """What a choice of this runner for these shapes is filed under."""
        return cache_key(self.op, runner, shapes, self.config, self.inputs)

    def keys(self, shapes: Sequence[Sequence[int]]) -> list[ProfilingCacheKey]:
        """The keys of all runners."""
        return [self.key(runner, shapes) for runner in self.runners]

    def identity(self, profile: OptimizationProfile) -> tuple[Any, ...]:
        """What is the same on every rank."""
        names = tuple(type(runner).__name__ for runner in self.runners)
        return self.op, names, nearest_profile(profile.get_opt_shapes(), self.config)


def device_of(inputs: Iterable[Any]) -> Any:
    """The GPU of the first input that lies on one; None for the CPU."""
    for value in inputs:
        if is_torch(value) and value.device.type == "cuda":
            return value.device
    return None


def on_device(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Within it a GPU is torch's current one: its streams, events and captures are meant.

    Args:
        device: of inputs; None for the CPU, where nothing changes.
    """
    if device is None:
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = sys.modules["torch"].cuda.device(device)
    return guard


def refuse_capture(device: Any) -> None:
    """Nothing can be measured while a CUDA graph is captured, of this GPU or of the current one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # asking fails without a driver
        return
    capturing = torch.cuda.is_current_stream_capturing()
    with on_device(device):
        capturing = capturing or torch.cuda.is_current_stream_capturing()
    if capturing:
        raise RuntimeError(
            "AutoTuner profiling cannot begin during an active outer CUDA Graph capture; make one "
            "call of each size under autotune before the capture"
        )


def _takes_preparation(runner: TunableRunner) -> bool:
    parameters = inspect.signature(runner.forward).parameters.values()
    return any(p.name == "do_preparation" or p.kind is p.VAR_KEYWORD for p in parameters)


@functools.cache
def _progress_bar() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


@dataclass
class Measuring:
    """How much is measured, and how a winner is told.

    Attributes:
        warmup: calls of a tactic before it is measured.
        repeat: timed calls of a tactic, at least.
        stream_delay_micro_secs: the GPU waits so long before a sample; 100 with CUDA graphs.
        margin: a tactic replaces the fallback if it is faster by this part of its time, and by
            twice the noise.
        max_seconds: for a layer of the MoE operations; then what was measured is kept.
    """

    warmup: int = 3
    repeat: int = 10
    stream_delay_micro_secs: int = 5000
    margin: float = 0.01
    max_seconds: float = 60.0


class Profiler:
    """Measures profiles and stores the choices.

    Attributes:
        how: how much is measured.
        store: where choices go.
        stats: what was done.
        blocklist: tactics that are never measured.
        made: inputs that were made.
        rankings: by key of a runner: its tactics, the fastest first.
    """

    def __init__(self, how: Measuring, store: ChoiceStore) -> None:
        self.how = how
        self.store = store
        self.stats = AutoTunerStatistics()
        self.blocklist = TacticsBlocklist()
        self.made = MadeTensors()
        self.rankings: OrderedDict[ProfilingCacheKey, list[Any]] = OrderedDict()

    def keep(self, call: Call, profile: OptimizationProfile, place: int, tactic: Any) -> None:
        """Store a choice."""
        key = call.key(call.runners[place], profile.get_opt_shapes())
        self.store.measured[key] = (tactic, profile)
        self.store.dirty = True

    def keep_ranking(self, call: Call, profile: OptimizationProfile, tactics: list[Any]) -> None:
        """Store a runner's tactics, the fastest first."""
        self.rankings[call.key(call.runners[0], profile.get_opt_shapes())] = tactics
        while len(self.rankings) > _MAX_RANKINGS:
            self.rankings.popitem(last=False)

    def measure_all(
        self, call: Call, profiles: list[OptimizationProfile], *, ranking: bool = False
    ) -> bool:
        """Measure profiles; False where there was no memory.

        Raises:
            RuntimeError: a CUDA graph is being captured, or an input has no memory.
        """
        if not profiles:
            return True
        device = device_of(call.inputs)
        refuse_capture(device)
        bar = _progress_bar()
        steps = profiles
        if bar is not None:
            steps = bar(profiles, desc=f"[AutoTuner]: Tuning {call.op}", leave=False)
        with on_device(device):
            try:
                for profile in steps:
                    self._measure(call, profile, ranking)
                return True
            except Exception as error:
                if not out_of_memory(error):
                    raise
            # Here the error's frames are gone, and with them the inputs that they held.
            self._give_back_memory(call, device)
            return False

    def _give_back_memory(self, call: Call, device: Any) -> None:
        self.made.clear()
        recover(device)
        if device is not None:
            sys.modules["torch"].cuda.empty_cache()
        LOG.warning(
            "[Autotuner]: OOM detected, falling back to default tactic of %s; what was measured "
            "before is kept",
            call.op,
        )

    def _measure(self, call: Call, profile: OptimizationProfile, ranking: bool) -> None:
        stats = self.stats
        stats.tuned_op_total_configs[call.op] = stats.tuned_op_total_configs.get(call.op, 0) + 1
        inputs = make_inputs(profile, call.inputs, self.made)
        if call.config.inputs_pre_hook is not None:
            inputs = list(call.config.inputs_pre_hook(inputs))
        batches = batches_of(call.config, inputs, self.how.repeat)
        candidates = self._candidates(call, profile, inputs, batches)
        if len(candidates) == 1:  # nothing but the fallback
            return
        timing = Timing(
            device=device_of(inputs),
            batches=len(batches),
            warmup=self.how.warmup,
            repeat=self.how.repeat,
            use_graph=call.config.use_cuda_graph,
            delay_us=100 if call.config.use_cuda_graph else self.how.stream_delay_micro_secs,
        )
        try:
            race(candidates, timing, drop=not ranking)
            winner = confirmed(candidates, timing, self.how.margin)
        except KeyboardInterrupt:
            running = [c for c in candidates if c.running]
            if min((len(c.samples) for c in running), default=0) >= MIN_ROUNDS:
                winner = decide(candidates, self.how.margin)
                self._finish(call, profile, candidates, winner)
            raise
        self._finish(call, profile, candidates, winner)
        if ranking:
            self.keep_ranking(call, profile, [c.tactic for c in ranked(candidates[1:])])

    def _finish(
        self,
        call: Call,
        profile: OptimizationProfile,
        candidates: list[Candidate],
        winner: Candidate | None,
    ) -> None:
        """Count the failures, and store the choice."""
        failed = [c for c in candidates if c.fault is not None]
        for candidate in failed:
            self._count_failure(call, profile, candidate.runner, candidate.tactic)
        if failed:
            LOG.info(
                "[Autotuner]: Skipped %d unsupported tactic(s) for %s (enable debug logs to see "
                "details)",
                len(failed),
                call.op,
            )
        if winner is None:
            return
        good = self.stats.tuned_op_successful_configs
        good[call.op] = good.get(call.op, 0) + 1
        self.keep(call, profile, winner.runner, winner.tactic)

    def _count_failure(
        self, call: Call, profile: OptimizationProfile, place: int, tactic: Any
    ) -> None:
        runner = call.runners[place]
        tactics = self.stats.failed_tactics.setdefault(scope_of(call.op, runner), set())
        tactics.add(hashable(tactic))
        keys = self.stats.failed_profiling_count.setdefault(call.op, set())
        keys.add(call.key(runner, profile.get_opt_shapes()))

    def _candidates(
        self,
        call: Call,
        profile: OptimizationProfile,
        inputs: list[Any],
        batches: list[list[Any]],
    ) -> list[Candidate]:
        """The fallback, then every tactic of every runner."""

        def bound(place: int, tactic: Any) -> Callable[[int], Any]:
            runner = call.runners[place]
            return lambda i: runner(batches[i % len(batches)], tactic=tactic, **call.kwargs)

        result = [Candidate(0, FALLBACK, bound(0, FALLBACK))]
        for place, runner in enumerate(call.runners):
            for tactic in self._tactics(call, profile, inputs, place):
                if not (place == 0 and tactic == FALLBACK):
                    result.append(Candidate(place, tactic, bound(place, tactic)))
            LOG.debug("[Autotuner]: %s: %d candidates", scope_of(call.op, runner), len(result))
        return result

    def _tactics(
        self, call: Call, profile: OptimizationProfile, inputs: list[Any], place: int
    ) -> list[Any]:
        """A runner's tactics, once it is prepared; none where it fails at that."""
        runner = call.runners[place]
        try:
            tactics = list(runner.get_valid_tactics(inputs, profile))
            tactics = self.blocklist.filter(call.op, runner, tactics)
            if tactics and _takes_preparation(runner):
                runner(inputs, tactic=FALLBACK, do_preparation=True, **call.kwargs)
        except Exception as error:
            recover(device_of(inputs))
            if out_of_memory(error):
                raise
            LOG.debug("[Autotuner]: %s has no tactics: %s", scope_of(call.op, runner), error)
            LOG.debug("[Autotuner]: the error in full", exc_info=error)
            self._count_failure(call, profile, place, FALLBACK)
            return []
        return tactics
