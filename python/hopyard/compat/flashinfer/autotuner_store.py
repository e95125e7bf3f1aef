# SPDX-License-Identifier: Apache-2.0
"""The choices that a process knows: its own, those of the cache file, those of a deployment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hopyard.compat.flashinfer import autotuner_file as files
from hopyard.compat.flashinfer.autotuner_keys import ProfilingCacheKey
from hopyard.compat.flashinfer.autotuner_log import LOG

FALLBACK = -1
_BUNDLED = "FLASHINFER_AUTOTUNER_LOAD_FROM_FILE"

# (found, place of the runner, tactic, profile)
Found = tuple[bool, int, Any, Any]


class ChoiceStore:
    """Choices by key, and records of products; the tuner's lock guards it.

    Attributes:
        measured: choices of this process: key -> (tactic, profile).
        file: what the cache file holds.
        mergers: of records that several processes write.
        dirty: whether there is something that no file has.
        version: another number whenever records have changed.
    """

    def __init__(self) -> None:
        self.measured: dict[ProfilingCacheKey, tuple[Any, Any]] = {}
        self.file = files.Loaded()
        self.mergers: dict[str, files.Merger] = {}
        self.dirty = False
        self.version = 0
        self._published: dict[str, dict[str, Any]] = {}
        self._bundled: files.Configs | None = None
        self._reported: set[Any] = set()

    def clear(self) -> None:
        """Forget everything but how records are merged."""
        mergers, version = self.mergers, self.version
        self.__init__()  # type: ignore[misc]
        self.mergers, self.version = mergers, version + 1

    def forget_file(self) -> None:
        """Forget what files said."""
        self.file = files.Loaded()
        self.version += 1

    # --- files

    def load(self, path: str | os.PathLike[str]) -> bool:
        """Add a file's choices and records; False where it holds for another machine."""
        loaded = files.load(Path(path))
        self.file.configs |= loaded.configs
        self.file.records |= loaded.records
        self.file.generation = loaded.generation
        self.version += 1
        return loaded.accepted

    def save(self, path: str | os.PathLike[str]) -> bool:
        """Merge everything into a file; False where it is of another machine."""
        own = {
            key.file_key: (key.runner_class_name, tactic)
            for key, (tactic, _) in self.measured.items()
            if key.portable
        }
        changes = files.Changes(
            own, self.file.configs, self._published, self.mergers, self.file.generation
        )
        generation = files.save(Path(path), changes)
        if generation is None:
            return False
        self.file.generation = generation
        self.dirty = False
        return True

    def publish(self, namespace: str, records: dict[str, Any]) -> None:
        """Have an object written with the next save."""
        files.check_namespace(namespace)
        if not isinstance(records, dict):
            raise TypeError(f"records is a {type(records).__name__}, wanted a dict")
        self._published[namespace] = json.loads(json.dumps(records))
        self.dirty = True
        self.version += 1

    def record(self, namespace: str) -> dict[str, Any]:
        """An object as published here, else as loaded, else empty; both merged where possible."""
        files.check_namespace(namespace)
        loaded = self.file.records.get(namespace, {})
        records = self._published.get(namespace, loaded)
        if namespace in self.mergers and records is not loaded and loaded:
            records = self.mergers[namespace](loaded, records)
        copied: dict[str, Any] = json.loads(json.dumps(records))
        return copied

    def _bundled_configs(self) -> files.Configs:
        """The choices that a deployment ships, of lower rank than those of the cache file."""
        where = os.environ.get(_BUNDLED, "0")
        if where in ("", "0"):
            return {}
        if self._bundled is None:
            default = Path(__file__).parent / "tuning_configs.json"
            self._bundled = {}
            try:
                self._bundled = files.load(default if where == "1" else Path(where)).configs
            except (OSError, ValueError) as error:
                LOG.warning("[Autotuner]: %s=%s is not used: %s", _BUNDLED, where, error)
        return self._bundled

    # --- choices

    def search(self, keys: Sequence[ProfilingCacheKey], *, bundled: bool) -> Found:
        """The first choice for one of the keys, source by source."""
        for place, key in enumerate(keys):
            if key in self.measured:
                return (True, place, *self.measured[key])
        sources = [("the cache file", self.file.configs)]
        if bundled:
            sources.append((_BUNDLED, self._bundled_configs()))
        for name, configs in sources:
            for place, key in enumerate(keys):
                found = configs.get(key.file_key) if key.portable and configs else None
                if found is not None and found[0] == key.runner_class_name:
                    self._report_hit(key, name)
                    return True, place, found[1], None
        return False, 0, FALLBACK, None

    def forget(self, key: ProfilingCacheKey) -> None:
        """Know nothing for a key any more."""
        self.measured.pop(key, None)
        self.file.configs.pop(key.file_key, None)

    def _report_hit(self, key: ProfilingCacheKey, source: str) -> None:
        about = (key.custom_op, key.runner_class_name, source)
        if about not in self._reported:
            self._reported.add(about)
            LOG.info("[Autotuner]: file hit: %s::%s from %s", *about)

    def knows(self, op: str) -> bool:
        """Whether there is a choice for some shape of an operation."""
        prefix = f"({op!r}, "
        return any(key.custom_op == op for key in self.measured) or any(
            key.startswith(prefix) for key in self.file.configs
        )
