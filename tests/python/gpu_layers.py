# SPDX-License-Identifier: Apache-2.0
"""The same layer on the CPU (NumPy) and on a GPU (torch), in every pair of formats."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

import hopyard
import layers

HIDDEN, WIDTH, TOKENS = 256, 128, 40

# README.md's support table.
PAIRS = [
    ("bf16", "bf16"),
    ("fp8_block128", "bf16"),
    ("fp8_block128", "fp8_block128"),
    ("fp8_per_tensor", "bf16"),
    ("fp8_per_tensor", "fp8_per_tensor"),
    ("fp8_per_tensor", "fp8_per_token"),
    ("fp8_per_channel", "bf16"),
    ("fp8_per_channel", "fp8_per_tensor"),
    ("fp8_per_channel", "fp8_per_token"),
    ("mxfp8", "bf16"),
    ("mxfp8", "mxfp8"),
    ("nvfp4", "bf16"),
    ("nvfp4", "fp8_per_token"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "nvfp4_per_token"),
    ("mxfp4", "bf16"),
    ("mxfp4", "fp8_block128"),
    ("mxfp4", "fp8_per_tensor"),
    ("mxfp4", "fp8_per_token"),
    ("mxfp4", "mxfp8"),
    ("mxint4", "bf16"),
]
# Of the worst row; tests/numerics.cc has the same numbers.
_TOLERANCE = {"bf16": 0.012, "nvfp4": 0.40, "nvfp4_per_token": 0.40}
_FLOOR = 5e-4
INPUT_SCALES = ("gemm1_input_scale", "gemm2_input_scale")


def to_gpu(array, device="cuda"):
    """A torch tensor on the GPU with the bits of a NumPy array; uint16 is bfloat16."""
    if array is None:
        return None
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def bits(tensor):
    """A tensor's bits in NumPy; bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.cpu().numpy()


def on_gpu(matrix):
    """A matrix of torch tensors on the GPU."""
    parts = ("values", "scales", "global_scales")
    return replace(matrix, **{name: to_gpu(getattr(matrix, name)) for name in parts})


def _matrix(values, weight_format):
    if weight_format == "bf16":
        return hopyard.Matrix(hopyard.to_bf16(values)), values
    name = "fp8_per_row" if weight_format == "fp8_per_channel" else weight_format
    done = hopyard.quantize(values, name)
    return hopyard.Matrix.from_quantized(done), hopyard.dequantize(done)


@dataclass
class Twins:
    """One layer's arrays and its weights in both places."""

    spec: hopyard.MoeSpec
    data: layers.Arrays
    experts: hopyard.ExpertWeights
    made: dict = field(default_factory=dict)

    @cached_property
    def cpu(self):
        """The weights on the host."""
        return hopyard.Weights(self.spec, self.experts)

    @cached_property
    def gpu(self):
        """The weights on the GPU."""
        parts = {name: on_gpu(getattr(self.experts, name)) for name in ("gemm1", "gemm2")}
        parts |= {name: to_gpu(getattr(self.experts, name)) for name in INPUT_SCALES}
        return hopyard.Weights(self.spec, replace(self.experts, **parts))

    def layer(self, device="cuda", tokens=TOKENS, **options):
        """The layer on a device; made once for the same options."""
        key = (device, tokens, tuple(options.items()))
        if key not in self.made:
            weights = self.cpu if device == "cpu" else self.gpu
            self.made[key] = hopyard.MoeLayer(self.spec, weights, tokens, device, **options)
        return self.made[key]

    def hidden(self, tokens=TOKENS):
        """Hidden states as bfloat16 bits, and logits, in NumPy."""
        return hopyard.to_bf16(self.data.hidden[:tokens]), self.data.logits[:tokens]

    def call(self, device="cuda", tokens=TOKENS, **more):
        """Bits of one call's output."""
        hidden, logits = self.hidden(tokens)
        if device == "cpu":
            return self.layer("cpu")(hidden, logits=logits, **more)
        return bits(self.layer()(to_gpu(hidden), logits=to_gpu(logits), **more))

    def judge(self, output, tokens=TOKENS):
        """The three conditions of tests/numerics.h, with the CPU's error for the plain one's."""
        ids, weights = layers.softmax_route(self.data.logits)
        wanted = layers.reference(self.data, ids, weights)[:tokens]
        cpu = hopyard.from_bf16(self.call("cpu", tokens))
        values = hopyard.from_bf16(output)
        assert np.isfinite(values).all()
        rms = np.sqrt(np.mean(wanted**2))
        assert rms > 100 * _FLOOR, "this test means nothing"
        assert np.abs(values - wanted).max() <= 2 * np.abs(cpu - wanted).max() + _FLOOR
        assert layers.worst_row(values, cpu) < _TOLERANCE.get(self.spec.activations, 0.12)


def twins(weights="bf16", activations="bf16", seed=3, **changes):
    """A layer of gate, up and down projections in these formats."""
    data = layers.arrays(seed, hidden=HIDDEN, width=WIDTH)
    rng = np.random.default_rng(seed)
    data.hidden = layers.normal((TOKENS, HIDDEN), seed + 3)
    data.logits = rng.standard_normal((TOKENS, layers.EXPERTS), np.float32)
    spec = layers.spec(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        weights=weights,
        activations=activations,
        **changes,
    )
    gemm1, decoded = _matrix(data.gemm1, weights)
    data.gate, data.up = decoded[:, :WIDTH], decoded[:, WIDTH:]
    gemm2, data.down = _matrix(data.down, weights)
    scales = {}
    if activations in ("fp8_per_tensor", "nvfp4"):
        most = 448.0 * (6.0 if activations == "nvfp4" else 1.0)
        scales["gemm1_input_scale"] = np.array([np.abs(data.hidden).max() / most], np.float32)
        scales["gemm2_input_scale"] = np.array([4.0 / most], np.float32)
    return Twins(spec, data, hopyard.ExpertWeights(gemm1=gemm1, gemm2=gemm2, **scales))
