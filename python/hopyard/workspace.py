# SPDX-License-Identifier: Apache-2.0
"""Workspaces of a layer: one for every call under way.

On a GPU a call is under way until the device has done its work, and calls on one stream follow each
other there. So a workspace is used again on the stream that it was made for, and on no other.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import numpy as np

from hopyard._library import lib
from hopyard.arrays import as_argument, as_tensor, torch_stream
from hopyard.devices import CPU

_ALIGNMENT = 256


def _on_host(size: int) -> Any:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return as_tensor(memory[offset : offset + size], "workspace")


def _of_torch(size: int, device: int, stream: int | None) -> Any:
    """Memory of torch's allocator, which itself keeps it to the stream, or the captured graph."""
    torch = sys.modules["torch"]
    # At least a byte, so that there is a pointer; the allocator aligns to 512 bytes.
    shape, place = max(size, 1), torch.device("cuda", device)
    with nullcontext() if stream is None else torch_stream(device, stream):
        return torch.empty(shape, dtype=torch.uint8, device=place)


class Workspaces:
    """Workspaces of one size on one device.

    Args:
        size: bytes.
        device: number of the GPU, or -1.

    Raises:
        MemoryError: there is no memory for the first one on the CPU.
    """

    def __init__(self, size: int, device: int) -> None:
        self._size = size
        self._device = device
        self._free: dict[int, list[Any]] = {}
        if device == CPU:
            self._free[0] = [_on_host(size)]

    def take(self, stream: int, *, uses_torch: bool, current: bool = False) -> Any:
        """A workspace that nothing else uses until it is given back.

        Args:
            stream: that uses it.
            uses_torch: whether torch's allocator is to make it.
            current: the stream is known to be torch's current one.
        """
        if self._device != CPU and uses_torch:
            place = None if current else stream
            return as_argument(_of_torch(self._size, self._device, place), "workspace")
        try:
            return self._free.setdefault(stream, []).pop()
        except IndexError:  # all of this stream are in use by other threads
            if self._device == CPU:
                return _on_host(self._size)
            return lib.new_tensor([self._size], "uint8", self._device)

    def give(self, workspace: Any, stream: int, *, uses_torch: bool) -> None:
        """For later calls on the stream; torch's allocator keeps what is its own."""
        if self._device == CPU or not uses_torch:
            self._free[stream].append(workspace)
