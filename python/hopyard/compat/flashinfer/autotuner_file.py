# SPDX-License-Identifier: Apache-2.0
"""The tuner's JSON file: choices by key, the machine they hold for, records of products."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hopyard.compat.flashinfer.autotuner_keys import hashable
from hopyard.compat.flashinfer.autotuner_log import LOG, warn_once

METADATA_KEY = "_metadata"
RECORDS_KEY = "_records"
GENERATION_KEY = "_generation"
_RESERVED = (METADATA_KEY, RECORDS_KEY, GENERATION_KEY)
# What the library's own tables say of themselves (src/tune/table_json.cc).
_TABLE_FORMAT = "hopyard tuning table"
_UNKNOWN = (None, "unknown", "None")
_WILDCARD = "*"

Configs = dict[str, tuple[str, Any]]
# What becomes of a record that is there in the file and in this process: (file's, ours) -> merged.
Merger = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def collect_metadata() -> dict[str, str | None]:
    """What a measured choice holds for: versions, and the GPU (or CPU) of this process."""
    import hopyard

    try:  # torch, if it is installed: the answer must not depend on what has been imported so far
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    on_gpu = torch is not None and torch.cuda.is_available()
    return {
        "hopyard_version": hopyard.__version__,
        "cuda_version": str(torch.version.cuda) if torch is not None else "unknown",
        "gpu": torch.cuda.get_device_name() if on_gpu else f"cpu: {_cpu_name()}",
    }


def mismatches(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """(hard, soft) differences, each (saved, current): soft where the file does not know."""
    hard, soft = {}, {}
    for name, value in current.items():
        given = saved.get(name)
        if given in (value, _WILDCARD):
            continue
        (soft if given in _UNKNOWN else hard)[name] = (given, value)
    return hard, soft


def _report(path: Path, hard: dict[str, Any], soft: dict[str, Any], what: str) -> None:
    for severity, found in (("hard", hard), ("soft", soft)):
        if found:
            differing = ", ".join(f"{n}: {a!r} there, {b!r} here" for n, (a, b) in found.items())
            warn_once(
                ("metadata", severity),
                "[Autotuner]: %s: %s metadata mismatch (%s): %s",
                path,
                severity,
                differing,
                what,
            )
            return


def generation_of(document: Mapping[str, Any]) -> str:
    """A hash of everything else in a file."""
    rest = {name: value for name, value in document.items() if name != GENERATION_KEY}
    dump = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(dump.encode()).hexdigest()


def check_namespace(namespace: str) -> str:
    """A record's name, or ValueError for one that is empty or reserved."""
    if not namespace or namespace.startswith("_"):
        raise ValueError(f"namespace is {namespace!r}, wanted a name that does not begin with _")
    return namespace


def read_document(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        FileNotFoundError: there is no file.
        json.JSONDecodeError: it is no JSON.
        ValueError: it is no object, or a table of the library's.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(
            f"{path} is no tuning file: {error.msg}", error.doc, error.pos
        ) from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}, wanted a JSON object")
    if document.get("format") == _TABLE_FORMAT:
        raise ValueError(
            f"{path} is a table of hopyard.autotune, wanted a file of this tuner: "
            "give another name here, and the table to hopyard.use_tuning"
        )
    return document


def _entry(path: Path, key: str, value: Any) -> tuple[str, Any] | None:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        LOG.warning("[Autotuner]: %s: entry %s is no [runner, tactic]; skipped", path, key)
        return None
    runner, tactic = value[0], hashable(value[1])
    positional = isinstance(tactic, int) and not isinstance(tactic, bool) and tactic >= 0
    if runner.startswith("Cudnn") and positional:
        LOG.warning(
            "[Autotuner]: %s: entry %s names plan %s of %s by its place, which is another in "
            "every process; skipped",
            path,
            key,
            tactic,
            runner,
        )
        return None
    return runner, tactic


def configs_of(path: Path, document: Mapping[str, Any]) -> Configs:
    """The choices of a file; malformed entries are skipped with a warning."""
    result: Configs = {}
    for key, value in document.items():
        entry = None if key in _RESERVED else _entry(path, key, value)
        if entry is not None:
            result[key] = entry
    return result


def records_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of a file."""
    records = document.get(RECORDS_KEY)
    if not isinstance(records, dict):
        return {}
    return {name: record for name, record in records.items() if isinstance(record, dict)}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, of all processes on this machine; readers need no lock."""
    try:
        import fcntl
    except ImportError:  # no POSIX: the last writer wins
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old one or the new one, whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's are private
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


@dataclass
class Loaded:
    """What a file holds for this process.

    Attributes:
        configs: choices by file key.
        records: by namespace.
        generation: of the file, None where there was none.
        accepted: whether it holds for this machine.
    """

    configs: Configs = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation: str | None = None
    accepted: bool = False


def load(path: Path) -> Loaded:
    """Read a file; one of another machine or version is reported once and ignored.

    Raises:
        FileNotFoundError: there is no file.
        json.JSONDecodeError: it is no JSON.
        ValueError: it is no object, or a table of the library's.
    """
    document = read_document(path)
    generation = generation_of(document)
    saved = document.get(METADATA_KEY)
    if isinstance(saved, dict):
        hard, soft = mismatches(saved, collect_metadata())
        if hard or soft:
            _report(path, hard, soft, "the file is ignored")
            return Loaded(generation=generation)
    return Loaded(configs_of(path, document), records_of(document), generation, True)


@dataclass
class Changes:
    """What a save adds to a file.

    Attributes:
        configs: choices, which win over the file's.
        kept: choices that were loaded from some file and stay.
        records: by namespace.
        mergers: of records that several processes write.
        generation: of the file when it was loaded.
    """

    configs: Configs
    kept: Configs
    records: dict[str, dict[str, Any]]
    mergers: Mapping[str, Merger]
    generation: str | None


def _existing(path: Path) -> tuple[dict[str, Any], bool]:
    """What a file holds that a save goes on from, and whether it may be written."""
    try:
        document = read_document(path)
    except FileNotFoundError:
        return {}, True
    saved = document.get(METADATA_KEY)
    if not isinstance(saved, dict):
        return document, True
    hard, soft = mismatches(saved, collect_metadata())
    if hard:
        _report(path, hard, {}, "the file is not written")
        return document, False
    if soft:
        _report(path, {}, soft, "the file is replaced")
        return {}, True
    return document, True


def _merged_records(path: Path, document: dict[str, Any], changes: Changes) -> dict[str, Any]:
    records = records_of(document)
    alone = [name for name in changes.records if name not in changes.mergers]
    now = generation_of(document) if document else None
    if alone and now != changes.generation:
        raise RuntimeError(
            f"{path} has been changed since it was loaded, and the records {alone} have one writer "
            f"each: it is of generation {now}, was {changes.generation}; load it again, then "
            "publish the records"
        )
    for name, record in changes.records.items():
        both = name in changes.mergers and name in records
        records[name] = changes.mergers[name](records[name], record) if both else record
    return records


def save(path: Path, changes: Changes) -> str | None:
    """Merge into a file and replace it in one step.

    Returns:
        The file's generation; None where it holds for another machine and was left alone.

    Raises:
        RuntimeError: a record of one writer, and the file has been changed since it was loaded.
        json.JSONDecodeError: the file is no JSON; it is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        document, writable = _existing(path)
        if not writable:
            return None
        records = _merged_records(path, document, changes)
        merged = changes.kept | configs_of(path, document) | changes.configs
        result: dict[str, Any] = {key: list(merged[key]) for key in sorted(merged)}
        result[METADATA_KEY] = document.get(METADATA_KEY) or collect_metadata()
        if records:
            result[RECORDS_KEY] = records
        result[GENERATION_KEY] = generation = generation_of(json.loads(json.dumps(result)))
        write_atomically(path, json.dumps(result, indent=2, sort_keys=True) + "\n")
        return generation
