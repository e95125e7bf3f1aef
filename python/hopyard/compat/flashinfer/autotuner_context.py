# SPDX-License-Identifier: Apache-2.0
"""What the open `autotune` contexts of a thread ask for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_local = threading.local()


@dataclass(frozen=True)
class Override:
    """Changes to every operation's own tuning.

    Attributes:
        buckets: numbers of tokens instead of an operation's own.
        round_up: whether numbers between buckets use the larger one.
        skip: operations that are left alone.
    """

    buckets: tuple[int, ...] | None = None
    round_up: bool | None = None
    skip: frozenset[str] = frozenset()


def current() -> Override:
    """That of the innermost context of this thread."""
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else Override()


def nested(
    tuning_buckets: Iterable[int] | None,
    round_up: bool | None,
    skip_ops: str | Iterable[str] | None,
) -> Override:
    """A context inside the current one, whose values it has where it names none.

    Raises:
        ValueError: `tuning_buckets` is empty.
    """
    outer = current()
    buckets = None if tuning_buckets is None else tuple(sorted(set(tuning_buckets)))
    if buckets == ():
        raise ValueError("tuning_buckets is empty, wanted at least one number of tokens or None")
    skip = (skip_ops,) if isinstance(skip_ops, str) else tuple(skip_ops or ())
    return Override(
        outer.buckets if buckets is None else buckets,
        outer.round_up if round_up is None else round_up,
        outer.skip | frozenset(skip),
    )


@contextlib.contextmanager
def pushed(override: Override) -> Iterator[None]:
    """Within it, `current` answers `override` on this thread."""
    stack = _local.__dict__.setdefault("stack", [])
    stack.append(override)
    try:
        yield
    finally:
        stack.pop()
