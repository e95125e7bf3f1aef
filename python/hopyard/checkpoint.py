# SPDX-License-Identifier: Apache-2.0
"""Layers of Hugging Face checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hopyard._library import lib
from hopyard.spec import ActivationFormat, MoeSpec, spec_from_map
from hopyard.weights import Weights


@dataclass(frozen=True)
class LoadedLayer:
    """One MoE layer of a checkpoint.

    Attributes:
        name: "model.layers.3.mlp".
        spec: as the checkpoint stores it.
        weights: views of the mapped files, read-only.
        router_weight: [E, H] float32.
        router_bias: [E] float32, or None: linear bias of the router.
        routing_bias: [E] float32, or None: selection bias, given to each call of the layer.
    """

    name: str
    spec: MoeSpec
    weights: Weights
    router_weight: npt.NDArray[np.float32]
    router_bias: npt.NDArray[np.float32] | None
    routing_bias: npt.NDArray[np.float32] | None

    def router_logits(self, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits [T, E] float32 of hidden states [T, H] float32: a plain FP32 product."""
        logits = np.asarray(hidden, np.float32) @ self.router_weight.T
        return logits if self.router_bias is None else logits + self.router_bias


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

    def layer(self, index: int, activations: ActivationFormat | None = None) -> LoadedLayer:
        """Read one layer.

        Args:
            index: one of `moe_layers`.
            activations: format that activations are rounded to; None for the one that goes with the
                weights ("fp8_block128" for FP8 blocks, else "bf16").

        Raises:
            ValueError: the layer has no experts, or a tensor is missing or wrong.
        """
        found = lib.checkpoint_layer(self._handle, index, activations or "")
        spec = spec_from_map(found["spec"])

        def array(name: str) -> Any:
            return np.from_dlpack(found[name]) if name in found else None

        return LoadedLayer(
            name=str(found["name"]),
            spec=spec,
            weights=Weights._from_handle(spec, found["weights"]),
            router_weight=array("router_weight"),
            router_bias=array("router_bias"),
            routing_bias=array("routing_bias"),
        )


def load_layer(
    directory: str | os.PathLike[str], index: int, activations: ActivationFormat | None = None
) -> LoadedLayer:
    """Read one MoE layer of a checkpoint directory; see `Checkpoint.layer`."""
    return Checkpoint(directory).layer(index, activations)
