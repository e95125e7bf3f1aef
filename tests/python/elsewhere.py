# SPDX-License-Identifier: Apache-2.0
"""Arrays that say they lie on a GPU, for what can be judged without one."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np

import hopyard
import layers

_name = ctypes.pythonapi.PyCapsule_GetName
_name.argtypes, _name.restype = [ctypes.py_object], ctypes.c_char_p
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


class Elsewhere:
    """NumPy's memory under another device's name; remembers the streams it was asked for."""

    def __init__(self, array, kind=2, index=0):
        self._array = np.ascontiguousarray(array)
        self._device = (kind, index)
        self.streams = []

    @property
    def shape(self):
        return self._array.shape

    @property
    def ndim(self):
        return self._array.ndim

    @property
    def dtype(self):
        return self._array.dtype

    def __dlpack_device__(self):
        return self._device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        capsule = self._array.__dlpack__()
        # DLManagedTensor begins with DLTensor: void* data; int32 device type; int32 device number.
        device = ctypes.cast(_pointer(capsule, _name(capsule)) + 8, ctypes.POINTER(ctypes.c_int32))
        device[0], device[1] = self._device
        return capsule


def torch_elsewhere(device, *shape):
    """A tensor of torch's that says it lies on a GPU, and has no memory."""
    import torch
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=torch.bfloat16, device=device)


def capture_on(monkeypatch, number):
    """Torch answers as while a stream of this GPU is captured; GPU 0 is the current one."""
    import torch

    current = [0]

    @contextlib.contextmanager
    def device(place):
        current.append(torch.device(place).index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == number)


def has_gpu_backend():
    """Whether the extension was built with HOPYARD_CUDA=ON."""
    return hopyard.explain(layers.spec(), device="cuda").supported
