# SPDX-License-Identifier: Apache-2.0
"""The few array operations that the helpers need, on NumPy arrays and on torch tensors alike.

Types have one name each, whatever the library: a NumPy ``uint16`` array is ``bfloat16`` and a NumPy
``uint8`` array is ``bytes``, which passes for every type of one byte.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hopyard.arrays import Array, dtype_name, from_bf16, is_torch, to_bf16
from hopyard.devices import is_capturing, torch_module

_NUMPY_NAMES = {"uint16": "bfloat16", "uint8": "bytes"}
_BYTE_TYPES = ("float8_e4m3fn", "float8_e8m0fnu", "uint8")


def type_of(array: Array) -> str:
    """Element type: torch's name, or for NumPy "bfloat16" for uint16 and "bytes" for uint8."""
    name = dtype_name(array)
    return name if is_torch(array) else _NUMPY_NAMES.get(name, name)


def is_type(array: Array, *names: str) -> bool:
    """Whether the elements are of one of the types; NumPy's bytes are any type of one byte."""
    given = type_of(array)
    return given in names or (given == "bytes" and any(n in _BYTE_TYPES for n in names))


def shape_of(array: Array) -> tuple[int, ...]:
    """Shape as ints."""
    return tuple(array.shape)


def numel(array: Array) -> int:
    """Number of elements."""
    return math.prod(array.shape)


def place_of(array: Array) -> str:
    """Device as text, also of devices that the library does not know; "cpu" for NumPy."""
    return _device_name(array.device) if is_torch(array) else "cpu"


def on_host(array: Any) -> bool:
    """Whether an array, or a number, lies in host memory."""
    return not is_torch(array) or array.device.type == "cpu"


@functools.cache
def _device_name(device: Any) -> str:
    return str(device)


def is_contiguous(array: Array) -> bool:
    """Whether the elements lie in row-major order without gaps."""
    return bool(array.is_contiguous() if is_torch(array) else array.flags.c_contiguous)


def contiguous(array: Array) -> Array:
    """`array`, or a contiguous copy of it."""
    return array.contiguous() if is_torch(array) else np.ascontiguousarray(array)


def empty(like: Array, shape: Sequence[int], dtype: str) -> Array:
    """A new array of the kind and on the device of `like`."""
    if is_torch(like):
        torch = torch_module()
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)
    numpy_type: Any = np.uint16 if dtype == "bfloat16" else dtype
    if dtype == "bfloat16" and dtype_name(like) == "bfloat16":
        numpy_type = like.dtype
    return np.empty(tuple(shape), np.uint8 if dtype in _BYTE_TYPES else numpy_type)


def full(like: Array, shape: Sequence[int], value: float, dtype: str = "float32") -> Array:
    """`empty`, filled; on a GPU without a copy from the host."""
    if is_torch(like):
        torch = torch_module()
        return torch.full(tuple(shape), value, dtype=getattr(torch, dtype), device=like.device)
    result = empty(like, shape, dtype)
    result[...] = value
    return result


@contextlib.contextmanager
def written_later(like: Array) -> Iterator[None]:
    """Tensors made within may be written outside of inference mode, too."""
    if not is_torch(like):
        yield
        return
    torch = torch_module()
    with torch.inference_mode(False), torch.no_grad():
        yield


def as_bytes(array: Array) -> Array:
    """The same memory as uint8."""
    if is_torch(array):
        return array.view(torch_module().uint8)
    return array.view(np.uint8)


def view_as(array: Array, dtype: str) -> Array:
    """The same memory under a type of torch's; NumPy has no float8 and keeps its bytes, and its
    bfloat16 is uint16."""
    if is_torch(array):
        return array.view(getattr(torch_module(), dtype))
    return array.view(np.uint16) if dtype == "bfloat16" else array


def namespace(array: Array) -> Any:
    """The library whose functions take this array: torch, or NumPy."""
    return torch_module() if is_torch(array) else np


def cast(array: Array, dtype: str) -> Array:
    """The values as another type of numbers."""
    return array.to(getattr(torch_module(), dtype)) if is_torch(array) else array.astype(dtype)


def arange(like: Array, count: int) -> Array:
    """0 .. count - 1 as int64, of the kind and on the device of `like`."""
    if is_torch(like):
        return torch_module().arange(count, device=like.device)
    return np.arange(count, dtype=np.int64)


def stable_order(keys: Array) -> Array:
    """The index that sorts keys, equal ones in their order."""
    if is_torch(keys):
        return torch_module().argsort(keys, stable=True)
    return np.argsort(keys, kind="stable")


def take_rows(array: Array, rows: Array) -> Array:
    """`array[rows]` along the first dimension, for every type. An index on the host is copied."""
    if not is_torch(array):
        return array[np.asarray(rows)]
    index = rows if is_torch(rows) else torch_module().from_numpy(np.asarray(rows))
    if index.device != array.device:
        _refuse_capture(array)
    index = index.to(array.device)
    if dtype_name(array).startswith("float8"):
        return as_bytes(array)[index].view(array.dtype)
    return array[index]


def permuted(array: Array, order: Sequence[int]) -> Array:
    """Contiguous copy with its dimensions in another order."""
    if is_torch(array):
        return array.permute(tuple(order)).contiguous()
    return np.ascontiguousarray(array.transpose(tuple(order)))


def stack(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape along a new first dimension."""
    if not is_torch(arrays[0]):
        return np.stack(arrays)
    if dtype_name(arrays[0]).startswith("float8"):
        torch = torch_module()
        return torch.stack([as_bytes(a) for a in arrays]).view(arrays[0].dtype)
    return torch_module().stack(list(arrays))


def float32(array: Array) -> Array:
    """Values as float32; NumPy's uint16 are bfloat16 bits."""
    if is_torch(array):
        return array.float()
    return from_bf16(array) if type_of(array) == "bfloat16" else np.asarray(array, np.float32)


def bfloat16(array: Array) -> Array:
    """float32 values rounded to bfloat16."""
    return array.bfloat16() if is_torch(array) else to_bf16(array)


def divide(left: Array, right: Array, out: Array) -> None:
    """`out = left / right`."""
    (torch_module().div if is_torch(out) else np.divide)(left, right, out=out)


def multiply(left: Array, right: Array, out: Array) -> None:
    """`out = left * right`."""
    (torch_module().mul if is_torch(out) else np.multiply)(left, right, out=out)


def _refuse_capture(array: Array) -> None:
    if is_capturing(array):
        raise RuntimeError(
            f"a CUDA stream is being captured, and this function computes on the host: it cannot "
            f"copy {dtype_name(array)} {list(shape_of(array))} there; call it before the capture"
        )


def to_host(array: Array) -> Array:
    """The array in host memory: a copy of a CUDA tensor, everything else as it is.

    Raises:
        RuntimeError: a stream is being captured; a copy to the host cannot be.
    """
    _refuse_capture(array)
    return array if on_host(array) else array.cpu()


def on_device_of(array: Array, like: Array) -> Array:
    """A tensor where `like` is; NumPy arrays are there already."""
    return array.to(like.device) if is_torch(like) else array


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """NumPy array of the values in host memory; float8 as bytes, bfloat16 as bits."""
    if not is_torch(array):
        return np.asarray(array)
    host = to_host(array.detach())
    if dtype_name(host).startswith("float8"):
        host = as_bytes(host)
    elif dtype_name(host) == "bfloat16":
        host = host.view(torch_module().uint16)
    return host.numpy()


def like_kind(values: np.ndarray[Any, Any], like: Array) -> Array:
    """A NumPy array as an array of the kind and on the device of `like`."""
    if not is_torch(like):
        return values
    return torch_module().from_numpy(np.ascontiguousarray(values)).to(like.device)
