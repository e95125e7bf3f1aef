# SPDX-License-Identifier: Apache-2.0
"""A small layer with its arrays, and its definition in NumPy (double)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import hopyard

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 24, 64, 32, 8, 2
# A tuning run that measures all numbers of tokens, on a busy machine too: nobody wins by 99 %, so
# there are no borders to look for, and what is left takes a hundredth of the limit.
TUNED_WHOLE = {"routings": ["uniform"], "margin": 0.99, "max_seconds": 300}


def spec(**changes):
    """The usual small layer."""
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        **changes,
    }
    return hopyard.MoeSpec(**fields)


def normal(shape, seed, scale=1.0):
    """Float32 values that are bfloat16 numbers."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return hopyard.from_bf16(hopyard.to_bf16(values))


@dataclass
class Arrays:
    """Float32 arrays of one layer; all are bfloat16 numbers."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray

    @property
    def bits(self):
        """Hidden states as bfloat16 bits."""
        return hopyard.to_bf16(self.hidden)

    @property
    def gemm1(self):
        """Gate rows, then up rows."""
        return np.concatenate([self.gate, self.up], 1)

    def weights(self, layer, **changes):
        """Weights in bfloat16, fused gate_up."""
        parts = {
            "gemm1": hopyard.to_bf16(self.gemm1),
            "gemm2": hopyard.to_bf16(self.down),
            **changes,
        }
        return hopyard.Weights(layer, hopyard.ExpertWeights(**parts))


def arrays(seed=0, experts=EXPERTS, hidden=HIDDEN, width=WIDTH):
    """Random arrays of the usual layer."""
    return Arrays(
        gate=normal((experts, width, hidden), seed, hidden**-0.5),
        up=normal((experts, width, hidden), seed + 1, hidden**-0.5),
        down=normal((experts, hidden, width), seed + 2, width**-0.5),
        hidden=normal((TOKENS, hidden), seed + 3),
        logits=np.random.default_rng(seed + 4).standard_normal((TOKENS, experts), np.float32),
    )


def make(seed=0, **options):
    """The usual layer and its arrays."""
    data = arrays(seed)
    layer = hopyard.MoeLayer(spec(), data.weights(spec()), max_tokens=TOKENS, **options)
    return layer, data


def swiglu(gate, up):
    """Silu(gate) * up."""
    return gate / (1 + np.exp(-gate)) * up


def reference(data, ids, weights, activation=swiglu):
    """Output [T, H] in double; ids outside the experts are skipped."""
    hidden = data.hidden.astype(np.float64)
    output = np.zeros_like(hidden)
    for token, slot in np.ndindex(ids.shape):
        expert = ids[token, slot]
        if not 0 <= expert < data.gate.shape[0]:
            continue
        gate = data.gate[expert].astype(np.float64) @ hidden[token]
        up = data.up[expert].astype(np.float64) @ hidden[token]
        output[token] += weights[token, slot] * (data.down[expert] @ activation(gate, up))
    return output


def softmax_route(logits, top_k=TOP_K):
    """Ids and weights of the renormalize method."""
    ids = np.argsort(-logits, -1, kind="stable")[:, :top_k]
    chosen = np.exp(np.take_along_axis(logits.astype(np.float64), ids, -1))
    return ids, chosen / chosen.sum(-1, keepdims=True)


def worst_row(output, wanted):
    """Largest relative L2 error of a row; output may be bfloat16 bits."""
    output = np.asarray(output)
    values = hopyard.from_bf16(output) if output.dtype == np.uint16 else output
    error = np.linalg.norm(values - wanted, axis=-1)
    return float((error / np.linalg.norm(wanted, axis=-1)).max())
