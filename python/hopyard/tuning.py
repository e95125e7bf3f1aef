# SPDX-License-Identifier: Apache-2.0
"""Measured choices of kernels: tables of them, and which of them plans look into.

A table is a file; docs/tuning.md tells what is in it and which table a plan takes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Unpack

from hopyard._library import lib
from hopyard.devices import Device, parse_device
from hopyard.layer import PlanOptions, options_to_map
from hopyard.spec import (
    ActivationFormat,
    ActivationKind,
    ExpertMapKind,
    MoeSpec,
    RoutingRule,
    SharedExperts,
    WeightFormat,
    spec_to_map,
)
from hopyard.weights import WeightOrders

Path: TypeAlias = str | os.PathLike[str]

_lock = threading.Lock()
_generation = 0


@dataclass(frozen=True)
class TuningMachine:
    """What times were measured on.

    Attributes:
        device: model name of the GPU or CPU.
        units: multiprocessors; threads of a CPU plan.
        isa: instruction set of a CPU, "" for a GPU.
        library: Hopyard's version.
    """

    device: str
    units: int
    isa: str
    library: str


@dataclass(frozen=True)
class CallPath:
    """How the calls give and get.

    Attributes:
        ids: experts and weights are given; else logits.
        unfinalised: rows instead of the output.
        replay: the selected ids are recorded.
    """

    ids: bool
    unfinalised: bool
    replay: bool


@dataclass(frozen=True)
class TuningKey:
    """Everything that changes which kernels a layer has, or which of them is fast.

    Attributes are those of `MoeSpec` and `PlanOptions`; `local` is the kind of the expert map,
    `local_experts` how many live on a rank.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    local_experts: int
    local: ExpertMapKind
    top_k: int
    routing: RoutingRule
    activation: ActivationKind
    weights: WeightFormat
    activations: ActivationFormat
    shared: SharedExperts
    router_weight_on_input: bool
    overlap_launches: bool
    path: CallPath
    weight_orders: WeightOrders


@dataclass(frozen=True)
class TunedRange:
    """Numbers of tokens that one kernel won: from the range before it on up to `last`.

    Attributes:
        last: the largest of them.
        tokens: where it was measured.
        tactic: name of the kernel, or of one for each GEMM.
        us: microseconds of a call, median; 0 where nothing was measured and the untuned choice
            runs.
        untuned: what a plan would take without a table.
        untuned_us: its microseconds; 0 where it may not run, or nothing was measured.
        noise: relative, of the difference.
    """

    last: int
    tokens: int
    tactic: str
    us: float
    untuned: str
    untuned_us: float
    noise: float


@dataclass(frozen=True)
class TuningFault:
    """A candidate that was not measured to the end.

    Attributes:
        tactic: its name.
        tokens: where.
        reason: why.
    """

    tactic: str
    tokens: int
    reason: str


@dataclass(frozen=True)
class TunedLayer:
    """What is known of one layer.

    Attributes:
        key: which layer.
        ranges: ascending; batches above the last take the untuned choice.
        faults: candidates that failed.
        routing: what the calls were routed by: "uniform,zipf" or "recorded".
    """

    key: TuningKey
    ranges: tuple[TunedRange, ...]
    faults: tuple[TuningFault, ...]
    routing: str


@dataclass(frozen=True)
class TuningStats:
    """What plans of this process found in tables.

    Attributes:
        hits: plans that found their layer.
        misses: plans that did not; a named tactic or `untuned` looks nothing up.
        stale: tactics found that this build does not have; the untuned choice ran.
        measured: candidates measured.
        missed: keys of the misses, once each.
        ignored: tables not used, and why.
    """

    hits: int
    misses: int
    stale: int
    measured: int
    missed: tuple[str, ...]
    ignored: tuple[str, ...]


def _key_of(fields: Mapping[str, Any]) -> TuningKey:
    """A key from the fields of a file, where "routing.score" is a field of `routing`."""
    parts: dict[str, Any] = {}
    for name, value in fields.items():
        owner, dot, member = name.partition(".")
        if dot:
            parts.setdefault(owner, {})[member] = value
        else:
            parts[name] = value
    parts["routing"] = RoutingRule(**parts["routing"])
    parts["shared"] = SharedExperts(**parts["shared"])
    parts["path"] = CallPath(**parts["path"])
    parts["weight_orders"] = WeightOrders(**parts["weight_orders"])
    return TuningKey(**parts)


def _layer_of(fields: Mapping[str, Any]) -> TunedLayer:
    return TunedLayer(
        key=_key_of(fields["key"]),
        ranges=tuple(TunedRange(**entry) for entry in fields["ranges"]),
        faults=tuple(TuningFault(**entry) for entry in fields["faults"]),
        routing=fields["routing"],
    )


class TuningTable:
    """Measured layers of one machine; never changes.

    Make one with `empty`, `load` or `from_json`. Equal tables have equal text.
    """

    def __init__(self, handle: Any) -> None:
        """Wrap what the extension returned."""
        self._handle = handle

    @staticmethod
    def empty(device: Device = "cpu", num_threads: int = 0) -> TuningTable:
        """A table without layers for this machine.

        Args:
            device: that of the plans.
            num_threads: of CPU plans; 0 = all that OpenMP gives.
        """
        return TuningTable(lib.new_tuning_table(parse_device(device), num_threads))

    @staticmethod
    def load(path: Path) -> TuningTable:
        """Read a file.

        Raises:
            ValueError: it cannot be read, is no table, or is of a later format.
        """
        return TuningTable(lib.load_tuning_table(os.fspath(path)))

    @staticmethod
    def from_json(text: str) -> TuningTable:
        """Inverse of `to_json`.

        Raises:
            ValueError: the text is no table, or of a later format.
        """
        return TuningTable(lib.read_tuning_table(text))

    def to_json(self) -> str:
        """The text of a file: sorted and complete."""
        return str(lib.tuning_table_text(self._handle))

    def save(self, path: Path) -> None:
        """Merge into what the file holds, this table's layers winning, and replace it in one step.

        Other processes may save to it at the same time: nothing is lost, and readers see the old
        file or the new one.

        Raises:
            ValueError: the file is of another machine or no table, or cannot be written; it stays
                as it is.
            TimeoutError: another writer does not end.
        """
        lib.save_tuning_table(self._handle, os.fspath(path))

    def merge(self, other: TuningTable) -> TuningTable:
        """A table of both; layers of `other` win.

        Raises:
            ValueError: `other` is of another machine.
        """
        return TuningTable(lib.merge_tuning_tables(self._handle, other._handle))

    def find(self, spec: MoeSpec, **options: Unpack[PlanOptions]) -> TunedLayer | None:
        """The layer that plans of `spec` would take, or None.

        It may have been measured with another routing rule, or other ways of giving and getting:
        its key tells.
        """
        found = lib.find_tuning(self._handle, spec_to_map(spec), options_to_map(options))
        layers = TuningTable(found).layers
        return layers[0] if layers else None

    @property
    def machine(self) -> TuningMachine:
        """What it was measured on."""
        return TuningMachine(**json.loads(self.to_json())["machine"])

    @property
    def layers(self) -> tuple[TunedLayer, ...]:
        """Its layers, sorted by key."""
        return tuple(_layer_of(fields) for fields in json.loads(self.to_json())["layers"])

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TuningTable) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"TuningTable({self.machine}, {len(self)} layers)"


def use_tuning(table: TuningTable | Path) -> None:
    """Let plans that this process makes from now on look into a table.

    They look into the `tuning` of their options first, then into the tables given here, the last
    one first, then into the file that the environment's HOPYARD_TUNING_FILE names, then into those
    that come with the library. A table of another machine is not used; `tuning_stats` says so.

    Args:
        table: a table, or the path of a file, which is read now and never written.

    Raises:
        ValueError: the file cannot be read, is no table, or is of a later format.
    """
    if not isinstance(table, TuningTable):
        table = TuningTable.load(table)
    lib.use_tuning(table._handle)
    _advance()


def forget_tuning() -> None:
    """Let later plans look into no table that `use_tuning` has given."""
    lib.forget_tuning()
    _advance()


def _advance() -> None:
    global _generation
    with _lock:
        _generation += 1


def generation() -> int:
    """A number that is another one after every `use_tuning` and `forget_tuning`.

    Who keeps plans makes them anew then: a plan goes on with what it found when it was made.
    """
    return _generation


def tuning_stats() -> TuningStats:
    """What plans found since the process began, or since `reset_tuning_stats`."""
    stats = lib.tuning_stats()
    return TuningStats(
        hits=int(stats["hits"]),
        misses=int(stats["misses"]),
        stale=int(stats["stale"]),
        measured=int(stats["measured"]),
        missed=tuple(str(key) for key in stats["missed"]),
        ignored=tuple(str(reason) for reason in stats["ignored"]),
    )


def reset_tuning_stats() -> None:
    """Start counting again."""
    lib.reset_tuning_stats()


def token_buckets(max_tokens: int) -> list[int]:
    """Numbers of tokens that a tuning run measures at, ascending.

    Powers of two up to 256, then in steps of 256 to 2048 and of 512 to 4096, then powers of two,
    and `max_tokens`.

    Raises:
        ValueError: `max_tokens` is below 1.
    """
    return [int(tokens) for tokens in lib.token_buckets(max_tokens)]


def wait_for_tuning(
    path: Path, spec: MoeSpec, seconds: float, **options: Unpack[PlanOptions]
) -> TunedLayer:
    """Wait for a layer in a file that another process saves to: one rank measures, others load.

    Args:
        path: the file; it need not exist yet.
        spec: the layer.
        seconds: how long to wait.
        **options: of the plan: how its calls give and get is part of the key.

    Raises:
        TimeoutError: the layer is not there in time.
        ValueError: the file is no table.
    """
    found = lib.wait_for_tuning(
        os.fspath(path), spec_to_map(spec), options_to_map(options), float(seconds)
    )
    return TuningTable(found).layers[0]
