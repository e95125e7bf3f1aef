# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's autotuner for runners of the user's own, over torch tensors of the CPU or a GPU.

    class Runner(TunableRunner):
        def get_valid_tactics(self, inputs, profile): return [0, 1, 2]
        def forward(self, inputs, tactic=-1, do_preparation=False): ...

    with autotune(cache="tuned.json"):
        runner, tactic = AutoTuner.get().choose_one("my::op", [Runner()], TuningConfig(), inputs)
    output = runner(inputs, tactic=tactic)

The MoE operations of this package have a tuner in the library, which the same `autotune` drives.
docs/compat-flashinfer.md tells what differs from FlashInfer.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from hopyard.compat.flashinfer import autotuner_context as context
from hopyard.compat.flashinfer.autotuner_blocklist import TacticsBlocklist
from hopyard.compat.flashinfer.autotuner_buckets import (
    get_hybrid_num_tokens_buckets,
    get_last_power_of_2_num_tokens_buckets,
    last_positive_power_of_2,
    make_bucket_mapper,
    make_hybrid_bucket_mapper,
    map_to_hybrid_bucket,
    next_positive_power_of_2,
    round_to_nearest_bucket,
)
from hopyard.compat.flashinfer.autotuner_config import (
    ConstraintSpec,
    DynamicDim,
    DynamicTensorSpec,
    OptimizationProfile,
    StaticDim,
    TunableRunner,
    TuningConfig,
    cache_key,
    nearest_profile,
    overridden,
    profiles_of,
    shapes_of,
)
from hopyard.compat.flashinfer.autotuner_group import Choices, Group, Winner
from hopyard.compat.flashinfer.autotuner_inputs import (
    ValueProfileArena,
    autotuner_initializer_empty,
    autotuner_initializer_ones,
    autotuner_initializer_rand,
    autotuner_initializer_rand_scaled,
    autotuner_initializer_randn,
    autotuner_initializer_zeros,
)
from hopyard.compat.flashinfer.autotuner_keys import ProfilingCacheKey
from hopyard.compat.flashinfer.autotuner_log import LOG, forget_warnings, warn_once
from hopyard.compat.flashinfer.autotuner_measure import is_in_profile_measurement
from hopyard.compat.flashinfer.autotuner_profiling import (
    AutoTunerStatistics,
    Call,
    Measuring,
    Profiler,
    device_of,
    refuse_capture,
)
from hopyard.compat.flashinfer.autotuner_store import FALLBACK, ChoiceStore, Found

__all__ = [
    "AutoTuner",
    "AutoTunerStatistics",
    "ConstraintSpec",
    "DynamicDim",
    "DynamicTensorSpec",
    "OptimizationProfile",
    "ProfilingCacheKey",
    "StaticDim",
    "TacticsBlocklist",
    "TunableRunner",
    "TuningConfig",
    "ValueProfileArena",
    "autotune",
    "autotuner_initializer_empty",
    "autotuner_initializer_ones",
    "autotuner_initializer_rand",
    "autotuner_initializer_rand_scaled",
    "autotuner_initializer_randn",
    "autotuner_initializer_zeros",
    "get_hybrid_num_tokens_buckets",
    "get_last_power_of_2_num_tokens_buckets",
    "is_in_profile_measurement",
    "last_positive_power_of_2",
    "make_bucket_mapper",
    "make_hybrid_bucket_mapper",
    "map_to_hybrid_bucket",
    "next_positive_power_of_2",
    "round_to_nearest_bucket",
    "set_autotune_process_group",
]

_BLOCKLIST = "FLASHINFER_TACTICS_BLOCKLIST"


def _require_runners(call: Call) -> None:
    assert call.runners, f"runners of {call.op} is empty, wanted at least one"
    for runner in call.runners:
        assert isinstance(runner, TunableRunner), (
            f"a runner of {call.op} is a {type(runner).__name__}, wanted a TunableRunner"
        )


class AutoTuner:
    """Chooses tactics, measures them under `autotune(True)`, and keeps the choices; one a process.

    Attributes:
        how: how much is measured, and the margin of a winner.
        store: choices and records, of this process and of files.
    """

    _instance: ClassVar[AutoTuner | None] = None
    _instance_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, warmup: int = 3, repeat: int = 10, stream_delay_micro_secs: int = 5000
    ) -> None:
        self.how = Measuring(warmup, repeat, stream_delay_micro_secs)
        self.store = ChoiceStore()
        self._profiler = Profiler(self.how, self.store)
        self._lock = threading.RLock()
        self._open = 0
        self._group: Group | None = None
        path = os.environ.get(_BLOCKLIST)
        if path:
            self.blocklist.load_or_warn(path)

    @classmethod
    def get(cls) -> AutoTuner:
        """The tuner of this process."""
        if cls._instance is None:
            with cls._instance_lock:
                if cls._instance is None:
                    cls._instance = cls()
        return cls._instance

    # --- state

    @property
    def is_tuning_mode(self) -> bool:
        """Whether an `autotune(True)` is open on any thread."""
        return self._open > 0

    @property
    def profiling_cache(self) -> dict[ProfilingCacheKey, tuple[Any, Any]]:
        """Choices of this process: key -> (tactic, profile)."""
        return self.store.measured

    @property
    def stats(self) -> AutoTunerStatistics:
        """What was done."""
        return self._profiler.stats

    @property
    def blocklist(self) -> TacticsBlocklist:
        """Tactics that are never measured."""
        return self._profiler.blocklist

    def clear_cache(self) -> None:
        """Forget every choice, what files said, and what was reported."""
        with self._lock:
            self.store.clear()
            self._profiler.rankings.clear()
            self._profiler.made.clear()
            if self._group is not None:
                self._group.settled.clear()
            forget_warnings()

    def reset_statistics(self) -> None:
        """Start counting anew."""
        with self._lock:
            self._profiler.stats = AutoTunerStatistics()

    # --- files

    def load_configs(self, path: str | os.PathLike[str]) -> bool:
        """Use a file's choices and records; False where it holds for another machine.

        Raises:
            FileNotFoundError: there is no file.
            json.JSONDecodeError: it is no JSON.
        """
        with self._lock:
            return self.store.load(path)

    def save_configs(self, path: str | os.PathLike[str]) -> bool:
        """Merge every choice and record into a file; False where it is of another machine.

        Raises:
            RuntimeError: a published record, and the file has been changed since it was loaded.
            json.JSONDecodeError: the file is no JSON; it stays as it is.
        """
        with self._lock:
            return self.store.save(path)

    def publish_namespaced_records(self, namespace: str, records: dict[str, Any]) -> None:
        """Have a product's own object written with the next save.

        Raises:
            ValueError: the name is empty or begins with _.
            TypeError: no dict, or one that is no JSON.
        """
        with self._lock:
            self.store.publish(namespace, records)

    def get_namespaced_records(self, namespace: str) -> dict[str, Any]:
        """A product's own object: as published here, else as loaded, else empty.

        Raises:
            ValueError: the name is empty or begins with _.
        """
        with self._lock:
            return self.store.record(namespace)

    # --- choices

    def search_cache(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        inputs: Sequence[Any] = (),
    ) -> Found:
        """The choice for these shapes: of this process, of the file, of the bundled one.

        Returns:
            (found, place of the runner, tactic, profile); (False, 0, -1, None) where there is none.
        """
        keys = [cache_key(custom_op, r, shapes, tuning_config, inputs) for r in runners]
        with self._lock:
            return self.store.search(keys, bundled=not self.is_tuning_mode)

    def _search(self, call: Call, shapes: Sequence[Sequence[int]]) -> Found:
        return self.store.search(call.keys(shapes), bundled=not self.is_tuning_mode)

    def choose_one(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        tuning_config: TuningConfig,
        inputs: Sequence[Any],
        **kwargs: Any,
    ) -> tuple[TunableRunner, Any]:
        """The runner and tactic for these inputs; under `autotune(True)` measured where unknown.

        Args:
            custom_op: name of the operation.
            runners: the first is the one whose tactic -1 is the fallback.
            tuning_config: how to measure.
            inputs: tensors, or None and other values as they are.
            **kwargs: for the runners' `forward`.

        Raises:
            RuntimeError: something must be measured while a CUDA graph is captured, or with a
                tensor that has no memory.
            ValueError: the operation is skipped and there is no runner.
            AssertionError: no runner, or one of another class.
        """
        override = context.current()
        if custom_op in override.skip:
            if not runners:
                raise ValueError(f"runners of {custom_op} is empty, wanted at least one")
            return runners[0], FALLBACK
        config = overridden(tuning_config, override.buckets, bool(override.round_up))
        with self._lock:
            call = Call(custom_op, tuple(runners), config, list(inputs), kwargs)
            if self.is_tuning_mode:
                _require_runners(call)
                if not self._tune(call, profiles_of(config, call.inputs)):
                    return runners[0], FALLBACK
            found, place, tactic, _ = self._search(call, shapes_of(inputs))
            if not found:
                self._count_miss(call, shapes_of(inputs))
            return runners[place], tactic

    def rank_tactics(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        tuning_config: TuningConfig,
        inputs: Sequence[Any],
        k: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """Up to `k` tactics, the best first, of those that did not fail; [-1] without any.

        Under `autotune(True)` and with k > 1 the bucket of these inputs alone is measured.

        Raises:
            ValueError: k < 1, or not one runner.
        """
        if k < 1:
            raise ValueError(f"k is {k}, wanted at least 1")
        if len(runners) != 1:
            raise ValueError(f"runners has {len(runners)} entries, wanted one")
        if k == 1:
            _, tactic = self.choose_one(custom_op, runners, tuning_config, inputs, **kwargs)
            return [tactic]
        override = context.current()
        if custom_op in override.skip:
            return [FALLBACK]
        config = overridden(tuning_config, override.buckets, bool(override.round_up))
        with self._lock:
            call = Call(custom_op, tuple(runners), config, list(inputs), kwargs)
            key = call.key(runners[0], shapes_of(inputs))
            if self.is_tuning_mode:
                _require_runners(call)
                profiles = [p for p in profiles_of(config, call.inputs) if _stands_for(call, p)]
                self._tune(call, profiles, ranking=True)
            known = self._profiler.rankings.get(key)
            return known[:k] if known else [self._search(call, shapes_of(inputs))[2]]

    def _count_miss(self, call: Call, shapes: Sequence[Sequence[int]]) -> None:
        self.stats.cache_misses += 1
        nearest = nearest_profile(shapes, call.config)
        self.stats.cache_miss_config_collection.setdefault(call.op, set()).add(nearest)
        if not self.is_tuning_mode and self.store.knows(call.op):
            warn_once(
                ("untuned shape", call.op, nearest),
                "[Autotuner]: %s has tuned choices, but none for %s: the fallback runs",
                call.op,
                nearest,
            )

    def _tune(
        self, call: Call, profiles: list[OptimizationProfile], *, ranking: bool = False
    ) -> bool:
        """Measure what is unknown; False where there was no memory."""
        if self._group is None:
            unknown = [p for p in profiles if not self._knows(call, p, ranking)]
            return self._profiler.measure_all(call, unknown, ranking=ranking)
        identities = tuple((*call.identity(p), ranking) for p in profiles)
        if not all(identity in self._group.settled for identity in identities):
            self._share(self._group, call, profiles, Choices(identities))
            self._group.settled.update(identities)
        return True

    def _knows(self, call: Call, profile: OptimizationProfile, ranking: bool) -> bool:
        shapes = profile.get_opt_shapes()
        if ranking:
            return call.key(call.runners[0], shapes) in self._profiler.rankings
        found = self._search(call, shapes)[0]
        if not found:
            self._count_miss(call, shapes)
        return found

    def _share(
        self, group: Group, call: Call, profiles: list[OptimizationProfile], mine: Choices
    ) -> None:
        """Have rank 0 measure, and take what it chose."""
        refuse_capture(device_of(call.inputs))
        ranking = mine.ranking
        if group.rank == 0:
            try:
                unknown = [p for p in profiles if not self._knows(call, p, ranking)]
                self._profiler.measure_all(call, unknown, ranking=ranking)
            except BaseException as error:
                group.share(mine.failed(error))
                raise
            mine = mine.of(tuple(self._winner(call, p) for p in profiles))
        answer = group.share(mine)
        for profile, winner in zip(profiles, answer.winners, strict=True):
            if group.rank != 0:
                self._take(call, profile, winner)

    def _winner(self, call: Call, profile: OptimizationProfile) -> Winner | None:
        shapes = profile.get_opt_shapes()
        found, place, tactic, _ = self._search(call, shapes)
        ranking = self._profiler.rankings.get(call.key(call.runners[0], shapes), [])
        return Winner(place, tactic, tuple(ranking)) if found else None

    def _take(self, call: Call, profile: OptimizationProfile, winner: Winner | None) -> None:
        for key in call.keys(profile.get_opt_shapes()):  # whatever this rank knew before
            self.store.forget(key)
        if winner is None:
            return
        self._profiler.keep(call, profile, winner.runner, winner.tactic)
        if winner.ranking:
            self._profiler.keep_ranking(call, profile, list(winner.ranking))

    @contextlib.contextmanager
    def _tuning(self, tune_mode: bool) -> Iterator[None]:
        """Tuning mode, while at least one context asks for it."""
        with self._lock:
            self._open += tune_mode
            if tune_mode and self._open == 1:
                LOG.info("[Autotuner]: Autotuning process starts ...")
        try:
            yield
        finally:
            with self._lock:
                self._open -= tune_mode
                if tune_mode and self._open == 0:
                    LOG.info("[Autotuner]: Autotuning process ends")
                    self._profiler.made.clear()


def _stands_for(call: Call, profile: OptimizationProfile) -> bool:
    """Whether a profile is the one that a call's own shapes use."""
    wanted = nearest_profile(shapes_of(call.inputs), call.config)
    return nearest_profile(profile.get_opt_shapes(), call.config) == wanted


def set_autotune_process_group(group: Any = None, timeout: float = 600.0) -> None:
    """Let the ranks of a torch.distributed group use what its rank 0 chooses; None ends that.

    Rank 0 measures, or takes what its files say; the others never measure and wait for it. Every
    rank must make the same calls under `autotune(True)`, in the same order, with the same runners
    and buckets; their caches may differ.

    Args:
        group: a process group; `torch.distributed.group.WORLD` is all ranks.
        timeout: seconds that a rank waits, at least what measuring one call takes; then
            TimeoutError.
    """
    tuner = AutoTuner.get()
    with tuner._lock:
        tuner._group = None if group is None else Group(group, timeout)


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache: str | os.PathLike[str] | None = None,
    tuning_buckets: Iterable[int] | None = None,
    round_up: bool | None = None,
    skip_ops: str | Iterable[str] | None = None,
) -> Iterator[None]:
    """Within it, operations whose choice is unknown are measured (`tune_mode`) and keep it.

    Contexts nest; an inner one has the outer one's buckets and rounding where it names none, and
    skips what any of them does. They belong to a thread, tuning mode to the process.

    Args:
        tune_mode: measure; without, choices that are known are used.
        cache: JSON file to load first, and to save to where something new was measured, also when
            the context is left by an error or Ctrl-C.
        tuning_buckets: numbers of tokens to measure at, instead of an operation's own.
        round_up: a number between buckets uses the next larger one; else the next smaller.
        skip_ops: names of operations that are left alone.

    Raises:
        ValueError: `tuning_buckets` is empty.
        json.JSONDecodeError: `cache` is no JSON.
    """
    override = context.nested(tuning_buckets, round_up, skip_ops)
    tuner = AutoTuner.get()
    if cache is not None:
        with tuner._lock:
            tuner.store.forget_file()
            with contextlib.suppress(FileNotFoundError):
                tuner.load_configs(cache)
    try:
        with context.pushed(override), tuner._tuning(tune_mode):
            yield
    finally:
        if cache is not None and tune_mode and tuner.store.dirty:
            tuner.save_configs(cache)
