# SPDX-License-Identifier: Apache-2.0
"""Functions with FlashInfer's long positional signatures, which are written down as data."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, TypeVar

from hopyard.compat.flashinfer import enums

Result = TypeVar("Result")


# Parameters that are enumerations: which, and FlashInfer's class and words for unknown values.
_ENUMS: dict[str, tuple[type[Enum], type[Exception], str]] = {
    "activation_type": (enums.ActivationType, RuntimeError, "Invalid activation type:"),
    "act_type": (enums.ActivationType, RuntimeError, "Invalid activation type:"),
    "routing_method_type": (
        enums.RoutingMethodType,
        RuntimeError,
        "Unimplemented routing method:",
    ),
    "routing_method": (enums.RoutingMethodType, ValueError, "Unimplemented routing method:"),
    "routing_input_mode": (enums.RoutingInputMode, ValueError, "unknown routing input mode:"),
    "weight_layout": (
        enums.WeightLayout,
        RuntimeError,
        "the value of weight_layout is not recognized: got",
    ),
    "fp8_quantization_type": (
        enums.Fp8QuantizationType,
        NotImplementedError,
        "unknown FP8 quantization type:",
    ),
    "dtype_act": (enums.DtypeTrtllmGen, ValueError, "unknown element type:"),
    "dtype_weights": (enums.DtypeTrtllmGen, ValueError, "unknown element type:"),
    "sfLayout": (enums.SfLayout, ValueError, "unknown scale layout:"),
    "sf_swizzle_layout": (enums.SfLayout, ValueError, "unknown scale layout:"),
}


class Arguments(SimpleNamespace):
    """The arguments of a call by name: defaults filled in, enumerations as our members.

    `operation` is the name of the function.
    """


def _default(text: str) -> Any:
    """A literal, or a member of one of the enumerations: "SfLayout.layout_linear"."""
    owner, dot, member = text.partition(".")
    if dot and owner.isidentifier():
        return getattr(getattr(enums, owner), member)
    return ast.literal_eval(text)


def parse(text: str) -> inspect.Signature:
    """A signature from "a b c=None * d=1": names in positional order, then keyword-only ones."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for item in text.split():
        if item == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        name, equals, default = item.partition("=")
        value = _default(default) if equals else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, kind, default=value))
    return inspect.Signature(parameters)


def entry(text: str) -> Callable[[Callable[[Arguments], Result]], Callable[..., Result]]:
    """Decorate a function of `Arguments` so that it is called with the parameters of `text`.

    `inspect.signature` and `help` show them; a call with wrong ones is a TypeError, as for any
    Python function.
    """
    signature = parse(text)
    positional = tuple(
        p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY
    )
    defaults = {
        p.name: p.default for p in signature.parameters.values() if p.default is not p.empty
    }
    names = frozenset(signature.parameters)
    required = [name for name in signature.parameters if name not in defaults]
    optional = frozenset(name for name, default in defaults.items() if default is None)
    kinds = [(name, *_ENUMS[name]) for name in signature.parameters if name in _ENUMS]

    def decorate(function: Callable[[Arguments], Result]) -> Callable[..., Result]:
        title = f"{function.__name__}()"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            if len(args) > len(positional):
                raise TypeError(
                    f"{title} takes {len(positional)} positional arguments but {len(args)} were "
                    "given"
                )
            # No zip with `strict`: the compiler of torch 2.9 stumbles over it.
            given = {name: args[place] for place, name in enumerate(positional[: len(args)])}
            for name in kwargs:
                if name not in names:
                    raise TypeError(f"{title} got an unexpected keyword argument {name!r}")
                if name in given:
                    raise TypeError(f"{title} got multiple values for argument {name!r}")
            values = {**defaults, **given, **kwargs}
            missing = [name for name in required if name not in values]
            if missing:
                raise TypeError(f"{title} is missing required arguments: {', '.join(missing)}")
            for name, kind, error, phrase in kinds:
                if values[name] is not None or name not in optional:
                    values[name] = enums.member(kind, values[name], name, error, phrase)
            return function(Arguments(operation=function.__name__, **values))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
