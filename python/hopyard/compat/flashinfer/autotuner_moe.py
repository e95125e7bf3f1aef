# SPDX-License-Identifier: Apache-2.0
"""The MoE operations under `autotune`: the library's tuner measures, the tuner's file keeps it.

The library tunes a layer, not a call: one run finds which kernels win from which number of tokens
on, for one way of routing (logits or ids) and of giving the result. What it finds is a
`hopyard.TuningTable`, a record of the tuner's file, so that one file has the choices of the user's
runners and those of the operations.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hopyard
from hopyard.autotune import TuneOptions, knows, measure_plan, options_of
from hopyard.compat.flashinfer import autotuner_context as context
from hopyard.compat.flashinfer.autotuner import AutoTuner
from hopyard.compat.flashinfer.autotuner_group import Choices
from hopyard.compat.flashinfer.autotuner_log import LOG
from hopyard.compat.flashinfer.autotuner_measure import out_of_memory
from hopyard.compat.flashinfer.autotuner_profiling import refuse_capture
from hopyard.compat.flashinfer.autotuner_store import ChoiceStore
from hopyard.devices import torch_module
from hopyard.layer import PlanOptions, make_plan
from hopyard.tuning import CallPath, TuningMachine, TuningTable, token_buckets

NAMESPACE = "hopyard.moe"
_RUNNER = "MoERunner"  # FlashInfer's name of the operations' runner, in blocklists and statistics
_TABLES = "tables"


@dataclass(frozen=True)
class Operation:
    """What of a call of an operation the tuner needs.

    Attributes:
        name: of the function.
        max_tokens: the largest number of tokens to measure at.
    """

    name: str
    max_tokens: int

    @property
    def names(self) -> tuple[str, str]:
        """As in `skip_ops`: with FlashInfer's prefix, and without."""
        return f"flashinfer::{self.name}", self.name

    @property
    def skipped(self) -> bool:
        """Whether a context of this thread leaves it alone."""
        skip = context.current().skip
        return bool(skip) and any(name in skip for name in self.names)

    def tokens(self) -> list[int]:
        """Numbers of tokens to measure at."""
        most = max(self.max_tokens, 1)
        given = context.current().buckets
        if given is None:
            return token_buckets(most)
        return [b for b in given if 1 <= b <= most] or [most]

    def blocked(self) -> list[str]:
        """Tactics that are never run."""
        blocklist = AutoTuner.get().blocklist
        scopes = (f"{name}::{_RUNNER}" for name in self.names)
        tactics = (tactic for scope in scopes for tactic in blocklist.tactics(scope))
        return sorted(tactic for tactic in tactics if isinstance(tactic, str))


def _parsed(record: dict[str, Any]) -> list[TuningTable]:
    tables = record.get(_TABLES, [])
    return [TuningTable.from_json(json.dumps(table)) for table in tables]


def merge_records(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Both records' tables, one for each machine; our layers win."""
    by_machine = {table.machine: table for table in _parsed(theirs)}
    for table in _parsed(ours):
        same = by_machine.get(table.machine)
        by_machine[table.machine] = table if same is None else same.merge(table)
    return {_TABLES: [json.loads(table.to_json()) for table in by_machine.values()]}


@functools.cache
def _machine(device: str) -> TuningMachine:
    return TuningTable.empty(device).machine


def _of_machine(tables: list[TuningTable], device: str) -> TuningTable | None:
    return next((t for t in tables if t.machine == _machine(device)), None)


class _Tables:
    """The record as tables, read again when it has changed."""

    def __init__(self) -> None:
        self._store: ChoiceStore | None = None
        self._version = -1
        self._tables: list[TuningTable] = []
        self._of_file: list[TuningTable] = []
        self.settled: set[Any] = set()
        self.reported: set[Any] = set()
        self.generation = 0

    def current(self) -> int:
        """A number that is another one after every change."""
        store = AutoTuner.get().store
        if store is not self._store or store.version != self._version:
            self._read(store)
        return self.generation

    def _read(self, store: ChoiceStore) -> None:
        store.mergers[NAMESPACE] = merge_records
        self._store, self._version = store, store.version
        self.generation += 1
        self.settled = set()
        self.reported = set()
        self._tables, self._of_file = [], []
        try:
            self._of_file = _parsed(store.file.records.get(NAMESPACE, {}))
        except ValueError as error:  # of a later version, say: it stays in the file as it is
            LOG.warning("[Autotuner]: the file's MoE choices are not used: %s", error)
            del store.file.records[NAMESPACE]
        self._tables = _parsed(store.record(NAMESPACE))

    def add(self, record: dict[str, Any]) -> None:
        """Add tables, and have them written with the next save."""
        store = AutoTuner.get().store
        store.publish(NAMESPACE, merge_records(store.record(NAMESPACE), record))

    def of(self, device: str) -> TuningTable | None:
        """The table of the machine that a device is."""
        return _of_machine(self._tables, device)

    def in_file(self, device: str) -> TuningTable | None:
        """As `of`, without what this process has measured since."""
        return _of_machine(self._of_file, device)


_tables = _Tables()


def generation() -> tuple[int, int]:
    """What is another one when plans must be made anew: the tuner's tables, the process's."""
    return _tables.current(), hopyard.tuning.generation()


def make_layer(
    operation: Operation, spec: hopyard.MoeSpec, weights: hopyard.Weights, options: PlanOptions
) -> hopyard.MoeLayer:
    """A layer that runs what was measured for calls like this one."""
    if operation.skipped:
        options = {**options, "untuned": True}
    elif not options.get("tactic"):
        table = _tables.of(weights.device)
        if table is not None:
            options = {**options, "tuning": table}
        orders = weights.orders
        if knows(_tables.in_file(weights.device), spec, {**options, "weight_orders": orders}):
            _report_hit(operation, spec)
    return hopyard.MoeLayer(spec, weights, **options)


def _report_hit(operation: Operation, spec: hopyard.MoeSpec) -> None:
    scope = f"{operation.names[0]}::{_RUNNER}"
    if (scope, spec) not in _tables.reported:
        _tables.reported.add((scope, spec))
        LOG.info("[Autotuner]: file hit: %s from the cache file", scope)


def tune_once(
    operation: Operation, spec: hopyard.MoeSpec, weights: hopyard.Weights, path: CallPath
) -> None:
    """Measure the layer of a call, where an `autotune(True)` is open and nothing is known of it.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    tuner = AutoTuner.get()
    if not tuner.is_tuning_mode or operation.skipped:
        return
    tokens = operation.tokens()
    about = (operation.name, spec, weights.device, weights.orders, path, tokens[-1])
    with tuner._lock:
        _tables.current()
        if about in _tables.settled:
            return
        settled = _tables.settled
        error = _settle(_Task(operation, spec, weights, path, tokens))
        _tables.current()
        _tables.settled = settled  # what was measured now is no reason to ask for the others again
        if error is not None:
            raise error
        settled.add(about)


@dataclass(frozen=True)
class _Task:
    """A layer to measure."""

    operation: Operation
    spec: hopyard.MoeSpec
    weights: hopyard.Weights
    path: CallPath
    tokens: Sequence[int]

    @property
    def device(self) -> Any:
        """Torch's name of the weights' GPU; None for the CPU."""
        name = self.weights.device
        return None if name == "cpu" else torch_module().device(name)

    @property
    def options(self) -> PlanOptions:
        """Of a plan that takes every number of tokens."""
        orders = self.weights.orders
        return {**options_of(self.path), "max_tokens": self.tokens[-1], "weight_orders": orders}


def _settle(task: _Task) -> BaseException | None:
    """Have the layer in the tables, on every rank; the error that ended the run early."""
    tuner = AutoTuner.get()
    group = tuner._group
    if group is None:
        return _measure(task)
    whole = replace(task.spec, local=hopyard.ExpertMap())  # ranks share their tables
    stored = repr((whole, task.weights.orders))
    identity = (NAMESPACE, task.operation.name, stored, task.path, tuple(task.tokens), False)
    if identity in group.settled:
        return None
    refuse_capture(task.device)
    mine, error = Choices((identity,)), None
    if group.rank == 0:
        try:
            error = _measure(task)
        except BaseException as failure:
            group.share(mine.failed(failure))
            raise
        mine = mine.of((tuner.store.record(NAMESPACE),))
    answer = group.share(mine)
    if group.rank != 0:
        _tables.add(answer.winners[0])
    group.settled.add(identity)
    return error


def _measure(task: _Task) -> BaseException | None:
    if knows(_tables.of(task.weights.device), task.spec, task.options, task.tokens[-1]):
        return None
    refuse_capture(task.device)
    name = task.operation.names[0]
    LOG.info("[AutoTuner]: Tuning %s at %d numbers of tokens", name, len(task.tokens))
    stats = AutoTuner.get().stats
    stats.tuned_op_total_configs[name] = stats.tuned_op_total_configs.get(name, 0) + 1
    plan = make_plan(task.spec, task.weights._device, task.options)
    options: TuneOptions = {
        "tokens": task.tokens,
        "blocklist": task.operation.blocked(),
        "margin": AutoTuner.get().how.margin,
        "max_seconds": AutoTuner.get().how.max_seconds,
    }
    try:
        found, error = measure_plan(plan, task.weights, options)
    except Exception as failure:
        if not out_of_memory(failure):
            raise
        if task.device is not None:
            torch_module().cuda.empty_cache()
        LOG.warning("[Autotuner]: OOM detected, falling back to default tactic of %s", name)
        return None
    _count(name, found)
    if found.layers[0].ranges:
        _tables.add({_TABLES: [json.loads(found.to_json())]})
    return error


def _count(name: str, found: TuningTable) -> None:
    stats = AutoTuner.get().stats
    for layer in found.layers:
        good = stats.tuned_op_successful_configs
        good[name] = good.get(name, 0) + bool(layer.ranges)
        failed = {fault.tactic for fault in layer.faults}
        if failed:
            stats.failed_tactics.setdefault(f"{name}::{_RUNNER}", set()).update(failed)
