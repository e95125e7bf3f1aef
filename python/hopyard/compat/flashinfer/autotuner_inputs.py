# SPDX-License-Identifier: Apache-2.0
"""Inputs to measure with: made anew where a dimension is dynamic, and in memory that is cold."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from hopyard.arrays import is_torch, without_memory
from hopyard.compat.flashinfer.autotuner_config import (
    DynamicDim,
    OptimizationProfile,
    TuningConfig,
)

_ALIGNMENT = 256  # of a tensor in an arena: the largest that a kernel of ours or cuBLAS asks for
_HOST_CACHE = 64 << 20  # bytes: the last-level cache of today's servers, by socket
_KEPT = 64  # made tensors: a profile of the widest MoE operation has 9


def _torch() -> Any:
    import torch

    return torch


def autotuner_initializer_empty(shape: Any, dtype: Any, device: Any) -> Any:
    """Whatever lies there."""
    return _torch().empty(shape, dtype=dtype, device=device)


def autotuner_initializer_zeros(shape: Any, dtype: Any, device: Any) -> Any:
    """Zeros."""
    return _torch().zeros(shape, device=device).to(dtype)


def autotuner_initializer_ones(shape: Any, dtype: Any, device: Any) -> Any:
    """Ones."""
    return _torch().ones(shape, device=device).to(dtype)


def autotuner_initializer_randn(shape: Any, dtype: Any, device: Any) -> Any:
    """Normal values."""
    return _torch().randn(shape, device=device).to(dtype)


def autotuner_initializer_rand(shape: Any, dtype: Any, device: Any) -> Any:
    """Uniform in 0 .. 1."""
    return _torch().rand(shape, device=device).to(dtype)


def autotuner_initializer_rand_scaled(shape: Any, dtype: Any, device: Any) -> Any:
    """Uniform in -5 .. 5."""
    return (_torch().rand(shape, device=device) * 10 - 5).to(dtype)


class MadeTensors:
    """Tensors that were made for measurements, least recently used first to go."""

    def __init__(self, size: int = _KEPT) -> None:
        self._size = size
        self._items: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The tensor of a key, made where it is missing."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        made = make()
        with self._lock:
            self._items[key] = made
            while len(self._items) > self._size:
                self._items.popitem(last=False)
        return made

    def clear(self) -> None:
        """Let all of them go."""
        with self._lock:
            self._items.clear()

    def __len__(self) -> int:
        return len(self._items)


def require_memory(inputs: Sequence[Any]) -> None:
    """Refuse tensors without memory: no kernel may see one.

    Raises:
        RuntimeError: a meta or fake tensor.
    """
    for index, value in enumerate(inputs):
        kind = without_memory(value)
        if kind:
            raise RuntimeError(
                f"input {index} is a {kind} tensor, which has no memory and cannot be measured "
                "with; an input that is not there is None"
            )


def make_inputs(
    profile: OptimizationProfile, inputs: Sequence[Any], made: MadeTensors
) -> list[Any]:
    """Inputs of a profile: None stays None, static ones are reused, the others made."""
    require_memory(inputs)
    result = []
    for index, (given, dims) in enumerate(zip(inputs, profile.shapes, strict=True)):
        if not is_torch(given) or not any(isinstance(dim, DynamicDim) for dim in dims):
            result.append(given)
            continue
        maker = profile.tensor_initializers[index] if profile.tensor_initializers else None
        maker = maker or autotuner_initializer_rand_scaled
        shape = tuple(dim.opt for dim in dims)
        # The place is part of the key: inputs of one shape must not become one tensor.
        key = (index, shape, given.dtype, given.device, maker)
        place = (shape, given.dtype, given.device)
        result.append(made.get(key, lambda maker=maker, place=place: maker(*place)))
    require_memory(result)
    return result


def _align(size: int, to: int = _ALIGNMENT) -> int:
    return -(-size // to) * to


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def cache_bytes(device: Any) -> int:
    """Bytes of the cache that a measurement must not find its inputs in."""
    if device.type != "cuda":
        return _HOST_CACHE
    return int(_torch().cuda.get_device_properties(device).L2_cache_size)


class ValueProfileArena:
    """Copies of inputs in two allocations, so that a call's inputs are in no cache.

    Iteration i uses lane `i % lanes` of allocation `i % 2`.

    Args:
        inputs: of a call.
        indices: places of those that are copied.
        lanes: copies in each allocation.

    Raises:
        ValueError: no lanes, a place twice, a tensor with gaps or of no bytes, several devices.
        IndexError: a place beyond the inputs.
        TypeError: not a tensor.
    """

    def __init__(self, inputs: Sequence[Any], indices: Sequence[int], lanes: int) -> None:
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}, wanted at least 1")
        if len(set(indices)) != len(indices):
            raise ValueError(f"profile_arena_input_indices {tuple(indices)} has a place twice")
        self._inputs = list(inputs)
        self._indices = tuple(indices)
        self._lanes = lanes
        tensors = [self._tensor(index) for index in indices]
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1:
            raise ValueError(f"inputs of an arena are on {len(devices)} devices, wanted one")
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._offsets, end = [], 0
        for tensor in tensors:
            self._offsets.append(end)
            end = _align(end + _bytes(tensor))
        device = devices.pop()
        # Between two uses of a lane, both allocations have passed: twice the cache.
        cold = -(-(2 * cache_bytes(device) + _ALIGNMENT) // lanes)
        self._stride = _align(max(end, cold))
        torch = _torch()
        self._memory = [
            torch.empty(lanes * self._stride, dtype=torch.uint8, device=device) for _ in range(2)
        ]
        self.fill(self._inputs)

    def _tensor(self, index: int) -> Any:
        if not 0 <= index < len(self._inputs):
            raise IndexError(f"input {index} is not there: a call has {len(self._inputs)}")
        tensor = self._inputs[index]
        if not is_torch(tensor):
            raise TypeError(f"input {index} is a {type(tensor).__name__}, wanted a tensor")
        if not tensor.is_contiguous():
            raise ValueError(f"input {index} has gaps, wanted a contiguous tensor")
        if _bytes(tensor) == 0:
            raise ValueError(f"input {index} has no bytes")
        return tensor

    def _view(self, memory: Any, lane: int, which: int) -> Any:
        shape, dtype = self._shapes[which]
        begin = lane * self._stride + self._offsets[which]
        size = shape.numel() * dtype.itemsize
        return memory[begin : begin + size].view(dtype).view(shape)

    def fill(self, inputs: Sequence[Any]) -> None:
        """Copy inputs of the same shapes into every lane.

        Raises:
            ValueError: a shape or type has changed.
        """
        for which, index in enumerate(self._indices):
            given = inputs[index]
            if (given.shape, given.dtype) != self._shapes[which]:
                raise ValueError(
                    f"input {index} is {given.dtype} {tuple(given.shape)}, the arena was made for "
                    f"{self._shapes[which][1]} {tuple(self._shapes[which][0])}"
                )
            for memory in self._memory:
                for lane in range(self._lanes):
                    self._view(memory, lane, which).copy_(given)

    def inputs(self, iteration: int) -> list[Any]:
        """The inputs of an iteration."""
        result = list(self._inputs)
        memory = self._memory[iteration % 2]
        for which, index in enumerate(self._indices):
            result[index] = self._view(memory, iteration % self._lanes, which)
        return result


def batches_of(config: TuningConfig, inputs: list[Any], repeat: int) -> list[list[Any]]:
    """Inputs of one call after the other, to be cycled through.

    Raises:
        ValueError: a value-aware input that is not in the arena.
    """
    arena = config.profile_arena_input_indices
    outside = set(config.value_aware_input_indices) - set(arena)
    if outside:
        raise ValueError(
            f"value_aware_input_indices {sorted(outside)} are not in profile_arena_input_indices"
        )
    if not config.use_cold_l2_cache:
        return [inputs]
    present = [index for index in arena if inputs[index] is not None]
    if present:
        lanes = ValueProfileArena(inputs, present, repeat)
        # Lanes and allocations turn together: after twice the lanes, if odd, all pairs have been.
        return [lanes.inputs(i) for i in range(2 * repeat)]
    tensors = [x for x in inputs if is_torch(x)]
    size = sum(_bytes(x) for x in tensors)
    if size == 0:
        return [inputs]
    count = min(3 * cache_bytes(tensors[0].device) // size + 1, repeat + 1)
    clones = [[x.clone() if is_torch(x) else x for x in inputs] for _ in range(count - 1)]
    return [inputs, *clones]
