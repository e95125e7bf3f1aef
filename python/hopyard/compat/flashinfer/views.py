# SPDX-License-Identifier: Apache-2.0
"""Views of arrays that do not keep them alive, for weights that a cache remembers.

A cached description of weights holds addresses, shapes, strides and types, and is found by exactly
these. It is right for whatever lies at these addresses when a call names them again, so it may
outlive an array, and must not keep a model's memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import Any

from hopyard.arrays import Array, is_torch
from hopyard.compat.flashinfer import ops

_CPU, _CUDA = 1, 2
# DLPack type code and bits by element type.
_TYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float8_e4m3fn": (1, 8),
    "float8_e8m0fnu": (1, 8),
    "uint8": (1, 8),
    "bytes": (1, 8),
    "int32": (0, 32),
}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None)
_allocate = _libc.malloc
_allocate.restype = ctypes.c_void_p
_allocate.argtypes = (ctypes.c_size_t,)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def address_of(array: Array) -> int:
    """Address of the first element."""
    return int(array.data_ptr() if is_torch(array) else array.__array_interface__["data"][0])


def _strides_of(array: Array) -> tuple[int, ...]:
    """Strides in elements."""
    if is_torch(array):
        return tuple(array.stride())
    return tuple(step // array.itemsize for step in array.strides)


def describe(array: Array | None) -> Hashable:
    """Everything that a view of the array depends on."""
    if array is None:
        return None
    return (
        address_of(array),
        ops.shape_of(array),
        _strides_of(array),
        ops.type_of(array),
        ops.place_of(array),
    )


class View:
    """A DLPack view of an array's memory that does not keep it alive.

    What the consumer gets is memory of its own, which it frees: the tensors of weights may outlive
    this object, where the garbage collector ends a cycle in its own order.

    Args:
        array: NumPy array or torch tensor in host or CUDA memory.
    """

    def __init__(self, array: Array) -> None:
        self.shape = ops.shape_of(array)
        self.dtype = ops.type_of(array)
        self.ndim = len(self.shape)
        self._sizes = (*self.shape, *_strides_of(array))
        self._address = address_of(array)
        self._device = _CPU, 0
        if is_torch(array) and array.device.type == "cuda":
            self._device = _CUDA, array.device.index or 0

    def __dlpack__(self, **_: Any) -> Any:
        sizes = ctypes.c_int64 * len(self._sizes)  # the shape, then the strides
        begin = ctypes.sizeof(_Managed)
        block = _allocate(begin + ctypes.sizeof(sizes))
        if not block:
            raise MemoryError("no memory for the description of an array")
        sizes.from_address(block + begin)[:] = self._sizes
        shape, strides = (
            ctypes.cast(block + begin + offset, ctypes.POINTER(ctypes.c_int64))
            for offset in (0, ctypes.sizeof(sizes) // 2)
        )
        code, bits = _TYPES[self.dtype]
        managed = _Managed.from_address(block)
        managed.tensor = _Tensor(
            self._address, _Device(*self._device), self.ndim, code, bits, 1, shape, strides, 0
        )
        managed.context = None
        managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p)
        return _new_capsule(block, b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device
