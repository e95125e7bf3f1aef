# SPDX-License-Identifier: Apache-2.0
"""Layers of Hugging Face checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hopyard._library import lib, tvm_ffi
from hopyard.arrays import Array, is_torch
from hopyard.devices import CPU, Device, device_name, parse_device, torch_module
from hopyard.spec import ActivationFormat, MoeSpec, spec_from_map
from hopyard.weights import Weights


@dataclass(frozen=True)
class LoadedLayer:
    """One MoE layer of a checkpoint.

    Attributes:
        name: "model.layers.3.mlp".
        spec: as the checkpoint stores it.
        weights: views of the mapped files, read-only; or copies of them on a GPU.
        router_weight: [E, H] float32.
        router_bias: [E] float32, or None: linear bias of the router.
        routing_bias: [E] float32, or None: selection bias, given to each call of the layer.

    The three arrays are NumPy's. Of a layer on a GPU they are torch's where the process has
    imported torch; otherwise only `routing_bias` is there, as a `tvm_ffi.Tensor`.
    """

    name: str
    spec: MoeSpec
    weights: Weights
    router_weight: Array
    router_bias: Array | None
    routing_bias: Array | None

    def router_logits(self, hidden: Array) -> Array:
        """Logits [T, E] float32 of hidden states [T, H]: a plain FP32 product.

        Args:
            hidden: float32, a NumPy array or what converts to one; a torch tensor of any float
                dtype where `router_weight` is torch's.
        """
        if is_torch(self.router_weight):
            logits = hidden.to(self.router_weight.dtype) @ self.router_weight.T
        else:
            logits = np.asarray(hidden, np.float32) @ self.router_weight.T
        return logits if self.router_bias is None else logits + self.router_bias

    def to(self, device: Device, *, packed: bool = False) -> LoadedLayer:
        """This layer with weights and routing bias on a device; see `Weights.to`."""
        index = parse_device(device, self.weights._device)
        weights = self.weights.to(device_name(index), packed=packed)
        if index == self.weights._device:
            return self
        moved = replace(self, weights=weights)
        torch = torch_module()
        if torch is None:
            return replace(moved, routing_bias=_on_gpu(self.routing_bias, index))

        def tensor(array: npt.NDArray[np.float32] | None) -> Any:
            return None if array is None else torch.tensor(array, device=device_name(index))

        return replace(
            moved,
            router_weight=tensor(self.router_weight),
            router_bias=tensor(self.router_bias),
            routing_bias=tensor(self.routing_bias),
        )


def _on_gpu(array: npt.NDArray[np.float32] | None, index: int) -> Any:
    """A copy in the library's own memory."""
    if array is None or index == CPU:
        return array
    copy = lib.new_tensor(list(array.shape), "float32", index)
    lib.copy_tensor(tvm_ffi.from_dlpack(array), copy)
    return copy


class Checkpoint:
    """A directory with config.json and .safetensors files; files are mapped, not read.

    Families: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, Llama-4 (text), GLM-4.5.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: a file is missing, unknown, corrupt or inconsistent; the message names file,
            tensor, what it is and what was wanted.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._handle = lib.open_checkpoint(os.fspath(directory))

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(self._handle.model_type)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        return [int(i) for i in self._handle.moe_layers]

    def layer(
        self,
        index: int,
        activations: ActivationFormat | None = None,
        device: Device = "cpu",
        *,
        packed: bool = False,
    ) -> LoadedLayer:
        """Read one layer.

        Args:
            index: one of `moe_layers`.
            activations: format that activations are rounded to; None for the one that goes with the
                weights ("fp8_block128" for FP8 blocks, else "bf16").
            device: where its weights shall be; on a GPU they are copies of the files'.
            packed: as of `Weights`, for those on a GPU.

        Raises:
            ValueError: the layer has no experts, or a tensor is missing or wrong.
            NotImplementedError, MemoryError: as `Weights.to`.
        """
        found = lib.checkpoint_layer(self._handle, index, activations or "")
        spec = spec_from_map(found["spec"])

        def array(name: str) -> Any:
            return np.from_dlpack(found[name]) if name in found else None

        loaded = LoadedLayer(
            name=str(found["name"]),
            spec=spec,
            weights=Weights._from_handle(spec, found["weights"]),
            router_weight=array("router_weight"),
            router_bias=array("router_bias"),
            routing_bias=array("routing_bias"),
        )
        return loaded.to(device, packed=packed)


def load_layer(
    directory: str | os.PathLike[str],
    index: int,
    activations: ActivationFormat | None = None,
    device: Device = "cpu",
    *,
    packed: bool = False,
) -> LoadedLayer:
    """Read one MoE layer of a checkpoint directory; see `Checkpoint.layer`."""
    return Checkpoint(directory).layer(index, activations, device, packed=packed)
