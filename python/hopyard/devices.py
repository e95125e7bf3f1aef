# SPDX-License-Identifier: Apache-2.0
"""Devices and streams by their names and numbers; never imports torch.

Inside the package a device is a number: -1 for the CPU, n for GPU n, as the extension takes it.
"""

from __future__ import annotations

import operator
import re
import sys
from typing import Any, TypeAlias

# "cpu", "cuda", "cuda:1", or a torch.device.
Device: TypeAlias = Any

CPU = -1
_WANTED = "wanted 'cpu', 'cuda', 'cuda:N' or a torch.device"
# Numbers of DLPack device types: https://dmlc.github.io/dlpack/latest/c_api.html
_DLPACK_CPU = (1, 3)  # host memory, and host memory that CUDA has pinned
_DLPACK_CUDA = 2
# cudaStreamLegacy and cudaStreamPerThread of the CUDA runtime.
_LEGACY_STREAM, _PER_THREAD_STREAM = 1, 2


def torch_module() -> Any:
    """Torch, where the process has imported it, else None."""
    return sys.modules.get("torch")


def _current_gpu() -> int:
    torch = torch_module()
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.current_device())
    return 0


def parse_device(device: Device, like: int | None = None) -> int:
    """The number of a device.

    Args:
        device: "cuda" without a number is GPU `like`, else torch's current one, else 0.
        like: where the arrays in question lie.

    Raises:
        ValueError: it is no device.
    """
    kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if isinstance(device, str):
        match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device)
        if match is None or (match[1] == "cpu" and match[2] not in (None, "0")):
            raise ValueError(f"device is {device!r}, {_WANTED}")
        kind, index = match[1], None if match[2] is None else int(match[2])
    if kind == "cpu":
        return CPU
    if kind != "cuda":
        raise ValueError(f"device is {device!r}, {_WANTED}")
    if index is not None:
        return int(index)
    return like if like is not None and like >= 0 else _current_gpu()


def device_name(index: int) -> str:
    """ "cpu" or "cuda:1"."""
    return "cpu" if index < 0 else f"cuda:{index}"


def device_of(array: Any) -> int:
    """Where an array is: torch, or anything with `__dlpack_device__`; else the CPU.

    Raises:
        ValueError: on a device that is neither the CPU nor a CUDA GPU.
    """
    torch = torch_module()
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type in ("cpu", "cuda"):
            return CPU if array.device.type == "cpu" else int(array.device.index)
        raise ValueError(f"an array is on device {array.device}, wanted the CPU or a CUDA GPU")
    if not hasattr(array, "__dlpack_device__"):
        return CPU
    kind, index = array.__dlpack_device__()
    if int(kind) in _DLPACK_CPU:
        return CPU
    if int(kind) == _DLPACK_CUDA:
        return int(index)
    raise ValueError(f"an array is on DLPack device type {int(kind)}, wanted the CPU or a CUDA GPU")


def is_capturing(array: Any) -> bool:
    """Whether the current stream of a torch tensor's GPU is being captured."""
    torch = torch_module()
    if torch is None or not isinstance(array, torch.Tensor) or array.device.type != "cuda":
        return False
    with torch.cuda.device(array.device):  # torch answers for the current device
        return bool(torch.cuda.is_current_stream_capturing())


def stream_of(device: int, stream: Any, *, uses_torch: bool) -> int:
    """The handle of the stream that a call's work goes to.

    Args:
        device: of the call.
        stream: as the caller gave it, or None.
        uses_torch: whether the call's arrays are torch's: its current stream is the default then;
            otherwise the legacy default stream, 0.

    Raises:
        ValueError: `stream` is no handle, or the device has none, or it is the per-thread default
            stream: one handle for a stream of each thread, whose calls would share a workspace.
    """
    if stream is None:
        if device < 0 or not uses_torch:
            return 0
        return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)
    if device < 0:
        raise ValueError("stream is given, but the device is the CPU; leave it out")
    try:
        handle = operator.index(stream)
    except TypeError:
        handle = -1
    if handle < 0:
        raise ValueError(
            f"stream is {stream!r}, wanted the handle of a CUDA stream as an int: "
            "stream.cuda_stream of torch, stream.ptr of CuPy, 0 for the legacy default stream"
        )
    if handle == _PER_THREAD_STREAM:
        raise ValueError(
            "stream is 2, CUDA's per-thread default stream (cudaStreamPerThread), which is another "
            "stream in each thread; make a stream and give its handle, or 0 for the legacy default "
            "stream"
        )
    return 0 if handle == _LEGACY_STREAM else handle


def dlpack_stream(stream: int) -> int:
    """A stream's handle as DLPack numbers it: 1 for the legacy default stream."""
    return stream if stream != 0 else 1
