# SPDX-License-Identifier: Apache-2.0
"""Argument checks with FlashInfer's exception classes: RuntimeError for what its C++ refuses,
ValueError and AssertionError for what its Python does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hopyard.arrays import (
    Array,
    dtype_name,
    gradients_enabled,
    refuse_backward,
    without_memory,
)
from hopyard.compat.flashinfer import ops
from hopyard.compat.flashinfer.signature import Arguments


class MissingArgument(AssertionError, RuntimeError):
    """An argument is missing or of the wrong type; AssertionError in some of FlashInfer's
    functions, RuntimeError in others."""


class BadOutput(ValueError, AssertionError):
    """`output` has the wrong shape, type or device; FlashInfer's functions differ in the class."""


class WithoutMemory(NotImplementedError, ValueError):
    """A tensor has no memory: NotImplementedError of FlashInfer's fake operations, a RuntimeError
    like what its C++ refuses, ValueError like what its Python does."""


def check(condition: bool, message: str, error: type[Exception] = RuntimeError) -> None:
    """Raise `error(message)` unless the condition holds."""
    if not condition:
        raise error(message)


def require(array: Any, name: str, wanted: str) -> None:
    """Refuse a missing or wrong kind of argument by name."""
    if array is None:
        raise MissingArgument(f"{name} is required; got None, wanted {wanted}")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise MissingArgument(f"{name} is a {type(array).__name__}; wanted {wanted}")


def check_type(
    array: Array,
    name: str,
    types: Sequence[str],
    error: type[Exception] = RuntimeError,
) -> None:
    """The elements are of one of `types`."""
    wanted = " or ".join(types).replace("float8_e4m3fn", "float8_e4m3fn (fp8)")
    if not ops.is_type(array, *types):
        raise error(f"{name} must be {wanted}; got {dtype_name(array)}")


def check_shape(
    array: Array,
    name: str,
    shape: Sequence[int],
    error: type[Exception] = RuntimeError,
) -> None:
    """The shape is exactly `shape`."""
    got = ops.shape_of(array)
    if got != tuple(shape):
        raise error(
            f"{name} has incorrect shape: got {list(got)}, {name} must have shape {list(shape)}"
        )


def check_ndim(array: Array, name: str, ndim: int, error: type[Exception] = RuntimeError) -> None:
    """The array has `ndim` dimensions."""
    got = ops.shape_of(array)
    if len(got) != ndim:
        raise error(f"{name} must be {ndim}D; got shape {list(got)}")


def check_contiguous(array: Array, name: str, error: type[Exception] = RuntimeError) -> None:
    """Row-major without gaps."""
    if not ops.is_contiguous(array):
        raise error(
            f"{name} must be contiguous; got shape {list(ops.shape_of(array))} with gaps or in "
            f"another order: pass {name}.contiguous()"
        )


def refuse_gradients(a: Arguments) -> None:
    """Refuse tensors that require grad where gradients are enabled: the results have none.

    Raises:
        NotImplementedError: naming the function and the tensor.
    """
    if not gradients_enabled():
        return
    arrays = dict(vars(a))
    given = arrays.get("topk_ids")
    if isinstance(given, (tuple, list)):
        arrays["expert_weights"] = given[-1]
    refuse_backward(a.operation, arrays)


def require_memory(array: Array, name: str) -> None:
    """Refuse torch's meta and fake tensors, which have no elements to compute with."""
    kind = without_memory(array)
    if kind:
        raise WithoutMemory(
            f"{name} is a {kind} tensor, which has no memory; wanted one with values. These "
            "functions run at once and cannot be traced: under torch.compile or torch.export use "
            "hopyard.torch_ops"
        )


def check_device(
    array: Array, name: str, like: Array, error: type[Exception] = RuntimeError
) -> None:
    """The array lies where hidden_states lies, and has memory there."""
    got, wanted = ops.place_of(array), ops.place_of(like)
    if got == wanted:
        require_memory(array, name)
        return
    kind = "must be a CUDA tensor on" if wanted.startswith("cuda") else "must be on"
    raise error(f"{name} {kind} the same device as hidden_states: got {got}, wanted {wanted}")
