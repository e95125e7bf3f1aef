# SPDX-License-Identifier: Apache-2.0
"""An MoE layer with MXFP4 weights on NumPy arrays: quantise, run, compare.

Run it with the package installed: python examples/python/numpy_layer.py
"""

from __future__ import annotations

import time

import numpy as np

import hopyard

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 512, 256, 16, 4


def expected(
    hidden: np.ndarray, logits: np.ndarray, gemm1: np.ndarray, gemm2: np.ndarray
) -> np.ndarray:
    """Output [T, H] float32 of the layer, written out in NumPy."""
    ids, weights = hopyard.route(logits, hopyard.RoutingRule.renormalize(), TOP_K)
    output = np.zeros_like(hidden)
    for token, slot in np.ndindex(ids.shape):
        expert = ids[token, slot]
        gate, up = np.split(gemm1[expert] @ hidden[token], 2)
        inner = gate / (1 + np.exp(-gate)) * up
        output[token] += weights[token, slot] * (gemm2[expert] @ inner)
    return output


def main() -> None:
    """Build the layer, call it, and print what it chose and how far off it is."""
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((EXPERTS, 2 * WIDTH, HIDDEN), np.float32) * HIDDEN**-0.5
    down = rng.standard_normal((EXPERTS, HIDDEN, WIDTH), np.float32) * WIDTH**-0.5
    hidden = hopyard.to_bf16(rng.standard_normal((TOKENS, HIDDEN), np.float32))
    logits = rng.standard_normal((TOKENS, EXPERTS), np.float32)

    spec = hopyard.MoeSpec(HIDDEN, WIDTH, EXPERTS, TOP_K, weights="mxfp4")
    gemm1, gemm2 = hopyard.quantize(gate_up, "mxfp4"), hopyard.quantize(down, "mxfp4")
    weights = hopyard.Weights(
        spec,
        hopyard.ExpertWeights(
            gemm1=hopyard.Matrix.from_quantized(gemm1),
            gemm2=hopyard.Matrix.from_quantized(gemm2),
            row_order="gate_up",
        ),
    )
    layer = hopyard.MoeLayer(spec, weights, max_tokens=TOKENS)
    print(layer.explain())

    replay = np.empty((TOKENS, TOP_K), np.int16)
    start = time.perf_counter()
    output = layer(hidden, logits=logits, replay_out=replay)
    print(f"{TOKENS} tokens in {1e3 * (time.perf_counter() - start):.2f} ms")
    print(f"experts of token 0: {replay[0].tolist()}")

    wanted = expected(
        hopyard.from_bf16(hidden), logits, hopyard.dequantize(gemm1), hopyard.dequantize(gemm2)
    )
    error = np.linalg.norm(hopyard.from_bf16(output) - wanted, axis=1)
    worst = float((error / np.linalg.norm(wanted, axis=1)).max())
    print(f"worst relative error of a token: {worst:.2e}")
    if worst > 0.02:
        raise SystemExit("the output is wrong")


if __name__ == "__main__":
    main()
