# SPDX-License-Identifier: Apache-2.0
"""The tuner's log."""

from __future__ import annotations

import logging
import threading

LOG = logging.getLogger("hopyard.compat.flashinfer")

_once: set[object] = set()
_lock = threading.Lock()


def warn_once(about: object, message: str, *args: object) -> None:
    """A warning the first time that something is reported in this process, then debug."""
    with _lock:
        level = logging.DEBUG if about in _once else logging.WARNING
        _once.add(about)
    LOG.log(level, message, *args)


def forget_warnings() -> None:
    """Report everything anew."""
    with _lock:
        _once.clear()
