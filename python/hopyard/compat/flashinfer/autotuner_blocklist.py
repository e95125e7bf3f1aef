# SPDX-License-Identifier: Apache-2.0
"""Tactics that are never run."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hopyard.compat.flashinfer import autotuner_file
from hopyard.compat.flashinfer.autotuner_keys import hashable
from hopyard.compat.flashinfer.autotuner_log import LOG

_GENERATOR_VERSION = "1.0"
_TACTICS_KEY = "invalid_tactics"
# Of the file itself, not of the machine it holds for.
_ABOUT_THE_FILE = ("generated_at", "generator_version")


def scope_of(custom_op: str, runner: Any) -> str:
    """The name that an operation's runner has in blocklists and statistics."""
    return f"{custom_op}::{type(runner).__name__}"


class TacticsBlocklist:
    """Tactics by operation and runner; several files add up."""

    def __init__(self) -> None:
        self._blocked: dict[str, set[Any]] = {}
        self._loaded = False

    @property
    def is_loaded(self) -> bool:
        """Whether a file was accepted."""
        return self._loaded

    def load(self, path: str | Path) -> bool:
        """Add a file's tactics; False where it holds for another machine, or is malformed.

        Raises:
            FileNotFoundError: there is no file.
            json.JSONDecodeError: it is no JSON.
        """
        document = autotuner_file.read_document(Path(path))
        saved = document.get(autotuner_file.METADATA_KEY, {})
        if not isinstance(saved, dict) or not isinstance(document.get(_TACTICS_KEY, {}), dict):
            LOG.warning("[Autotuner]: blocklist %s is malformed, wanted objects; skipped", path)
            return False
        current = autotuner_file.collect_metadata()
        for name, value in saved.items():
            if name in _ABOUT_THE_FILE or value in ("*", current.get(name)):
                continue
            LOG.warning(
                "[Autotuner]: blocklist %s holds for %s=%r, this is %r; skipped",
                path,
                name,
                value,
                current.get(name),
            )
            return False
        for scope, tactics in document.get(_TACTICS_KEY, {}).items():
            if not isinstance(tactics, list):
                LOG.warning("[Autotuner]: blocklist %s: %s is no list; skipped", path, scope)
                continue
            self._add(scope, tactics)
        self._loaded = True
        return True

    def _add(self, scope: str, tactics: Iterable[Any]) -> None:
        for tactic in map(hashable, tactics):
            try:
                self._blocked.setdefault(scope, set()).add(tactic)
            except TypeError:  # an object of JSON is no tactic
                LOG.warning("[Autotuner]: blocklist: %s names no tactic: %r", scope, tactic)

    def load_or_warn(self, path: str | Path) -> bool:
        """`load`, where a missing or broken file is a warning."""
        try:
            return self.load(path)
        except (OSError, ValueError) as error:
            LOG.warning("[Autotuner]: blocklist %s is not used: %s", path, error)
            return False

    def filter(self, custom_op: str, runner: Any, tactics: Iterable[Any]) -> list[Any]:
        """The tactics that are not blocked."""
        blocked = self._blocked.get(scope_of(custom_op, runner))
        if not blocked:
            return list(tactics)
        return [tactic for tactic in tactics if hashable(tactic) not in blocked]

    def tactics(self, scope: str) -> set[Any]:
        """The tactics of "op::Runner" that are blocked."""
        return set(self._blocked.get(scope, ()))

    def summary(self) -> dict[str, int]:
        """Number of tactics by "op::Runner"."""
        return {scope: len(tactics) for scope, tactics in self._blocked.items()}

    @staticmethod
    def save(
        path: str | Path,
        invalid_tactics: Mapping[str, Iterable[Any]],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a blocklist, for instance of `AutoTuner.get().stats.failed_tactics`."""
        about = dict(autotuner_file.collect_metadata() if metadata is None else metadata)
        about["generated_at"] = datetime.datetime.now(datetime.UTC).isoformat()
        about["generator_version"] = _GENERATOR_VERSION
        tactics = {
            scope: sorted((hashable(tactic) for tactic in given), key=repr)
            for scope, given in invalid_tactics.items()
        }
        document = {autotuner_file.METADATA_KEY: about, _TACTICS_KEY: tactics}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        autotuner_file.write_atomically(target, text)
