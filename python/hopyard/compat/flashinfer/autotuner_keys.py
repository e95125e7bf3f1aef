# SPDX-License-Identifier: Apache-2.0
"""What a measurement is filed under: the operation, the runner with all its fields, the shapes.

FlashInfer's file keys leave the runner's fields out, so that layers which differ in nothing but
their activation or layout overwrite each other. Here every field is part of the key, as a text that
is the same in every process. A field without such a text (a lambda, a lock, a C object) keeps a
runner's measurements out of the file; they stay in memory.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hopyard.arrays import is_torch
from hopyard.compat.flashinfer.autotuner_log import warn_once

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic)
_MAX_DEPTH = 8


class Opaque(Exception):
    """A value has no text that is the same in every process; `args[0]` says which."""


def _stable_function(value: Any) -> str:
    name = f"{value.__module__}.{value.__qualname__}"
    if "<" in name or getattr(value, "__closure__", None):
        raise Opaque(f"{name} is a lambda or a closure")
    return name


def _stable_object(value: Any, depth: int) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    state = getattr(value, "__dict__", None)
    if state is None or isinstance(value, types.BuiltinMethodType):
        raise Opaque(f"a {name} shows no fields")
    return f"{name}{stable_text(fields_of(value), depth)}"


def fields_of(value: Any) -> dict[str, Any]:
    """Instance attributes but those whose names end in `_cache`."""
    return {name: item for name, item in vars(value).items() if not name.endswith("_cache")}


def stable_text(value: Any, depth: int = 0) -> str:
    """A text that is the same for equal values in every process, and differs for others.

    Raises:
        Opaque: there is none.
    """
    if depth > _MAX_DEPTH:
        raise Opaque(f"a {type(value).__qualname__} is nested more than {_MAX_DEPTH} deep")
    inner = depth + 1
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):  # a list and a tuple of equal items are one configuration
        return f"({', '.join(stable_text(item, inner) for item in value)},)"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(stable_text(item, inner) for item in value))},}}"
    if isinstance(value, Mapping):
        items = sorted((stable_text(k, inner), stable_text(v, inner)) for k, v in value.items())
        return f"{{{', '.join(f'{key}: {text}' for key, text in items)}}}"
    if is_torch(value):  # what it holds changes no time
        return f"tensor({value.dtype}, {tuple(value.shape)}, {value.device.type})"
    if isinstance(value, np.ndarray):
        return f"array({value.dtype}, {value.shape})"
    if type(value).__module__ == "torch":  # dtype, device, layout, memory_format
        return repr(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, functools.partial):
        return f"partial{stable_text((value.func, value.args, value.keywords), inner)}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _stable_function(value)
    return _stable_object(value, inner)


@dataclass(frozen=True)
class RunnerKey:
    """A runner's fields as text.

    Attributes:
        fields: (name, text), by name.
        portable: whether the texts are the same in every process.
    """

    fields: tuple[tuple[str, str], ...]
    portable: bool


def runner_key(runner: Any) -> RunnerKey:
    """The fields of a runner."""
    fields, portable = [], True
    for name, value in sorted(fields_of(runner).items()):
        try:
            fields.append((name, stable_text(value)))
        except Opaque as opaque:
            portable = False
            owner = type(runner).__qualname__
            warn_once(
                ("opaque", owner, name),
                "[Autotuner]: %s.%s has no text that is the same in every process (%s): "
                "measurements of this runner are not written to files. A name that ends in _cache "
                "is left out of the key",
                owner,
                name,
                opaque,
            )
            fields.append((name, f"<{id(value)}>"))
    return RunnerKey(tuple(fields), portable)


@dataclass(frozen=True)
class ProfilingCacheKey:
    """What one measured choice is filed under.

    Attributes:
        custom_op: name of the operation.
        runner_class_name: of the runner that won.
        runner_hash: of this process.
        nearest_profile: shapes, dynamic dimensions as their buckets, inferred ones as -1.
        extras: the runner's `get_cache_key_extras`.
        fields: the runner's fields as text.
        portable: whether `file_key` means the same in every process.
    """

    custom_op: str
    runner_class_name: str
    runner_hash: int
    nearest_profile: tuple[Any, ...]
    extras: tuple[Any, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    portable: bool = True

    @property
    def file_key(self) -> str:
        """The key in files: everything but the hash."""
        parts = (self.custom_op, self.runner_class_name, self.nearest_profile, self.extras)
        return str((*parts, self.fields)) if self.fields else str(parts)


def hashable(tactic: Any) -> Any:
    """A tactic with its lists as tuples, as it comes back from a file."""
    if isinstance(tactic, (list, tuple)):
        return tuple(hashable(item) for item in tactic)
    return tactic
