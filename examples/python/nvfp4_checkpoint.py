# SPDX-License-Identifier: Apache-2.0
"""A layer of an NVFP4 checkpoint: E2M1 codes, E4M3 scales per 16 columns, one FP32 scale a matrix.

On a Hopper GPU, which has no FP4 arithmetic, the codes are decoded inside of the kernels; without
one the same layer runs on the CPU. A small checkpoint is written first, with a safetensors file's
usual names: weight, weight_scale and weight_scale_2 of each expert's projections.
Run it with torch and safetensors installed: python examples/python/nvfp4_checkpoint.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from hopper import pick_device

import hopyard

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 512, 256, 8, 2
PREFIX = "model.layers.0.mlp.experts"
PROJECTIONS = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}


def write_checkpoint(path: Path) -> None:
    """Random experts, quantised by Hopyard."""
    tensors = {}
    for expert in range(EXPERTS):
        for name, (rows, cols) in PROJECTIONS.items():
            made = hopyard.quantize(torch.randn(rows, cols) * cols**-0.5, "nvfp4")
            key = f"{PREFIX}.{expert}.{name}.weight"
            tensors[key] = made.codes
            tensors[f"{key}_scale"] = made.scales.view(torch.float8_e4m3fn)
            tensors[f"{key}_scale_2"] = torch.tensor(made.global_scale)
    safetensors.torch.save_file(tensors, path)


def read_projection(tensors: dict[str, torch.Tensor], name: str) -> hopyard.Matrix:
    """One projection of all experts: lists of tensors, nothing is stacked or copied."""
    keys = [f"{PREFIX}.{expert}.{name}.weight" for expert in range(EXPERTS)]
    return hopyard.Matrix(
        values=[tensors[key] for key in keys],
        scales=[tensors[f"{key}_scale"] for key in keys],
        global_scales=torch.stack([tensors[f"{key}_scale_2"] for key in keys]),
    )


def decoded(tensors: dict[str, torch.Tensor], expert: int, name: str) -> torch.Tensor:
    """A projection in FP32."""
    key = f"{PREFIX}.{expert}.{name}.weight"
    quantized = hopyard.Quantized(
        "nvfp4",
        tensors[key].cpu(),
        tensors[f"{key}_scale"].cpu(),
        float(tensors[f"{key}_scale_2"]),
        PROJECTIONS[name][1],
    )
    return hopyard.dequantize(quantized)


def expected(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The layer written out in torch, FP32."""
    output = torch.zeros(hidden.shape)
    for expert in range(EXPERTS):
        gate, up, down = (decoded(tensors, expert, name) for name in PROJECTIONS)
        token, slot = torch.where(ids == expert)
        rows = hidden[token].float()
        inner = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        output.index_add_(0, token, weights[token, slot, None] * (inner @ down.T))
    return output


@torch.inference_mode()
def main() -> None:
    """Write, read, run, compare."""
    torch.manual_seed(0)
    spec = hopyard.MoeSpec(HIDDEN, WIDTH, EXPERTS, TOP_K, weights="nvfp4", activations="bf16")
    device = pick_device(spec)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        write_checkpoint(path)
        tensors = safetensors.torch.load_file(path, device=device)

    experts = hopyard.ExpertWeights(
        gate=read_projection(tensors, "gate_proj"),
        up=read_projection(tensors, "up_proj"),
        gemm2=read_projection(tensors, "down_proj"),
    )
    layer = hopyard.MoeLayer(spec, hopyard.Weights(spec, experts), max_tokens=TOKENS)
    size = layer.weights.bytes_per_expert
    print(f"{size} bytes an expert, {8 * size / (3 * HIDDEN * WIDTH):.2f} bits a weight")

    hidden = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    logits = torch.randn(TOKENS, EXPERTS, device=device)
    output = layer(hidden, logits=logits).cpu()
    ids, weights = hopyard.route(logits.cpu(), spec.routing, TOP_K)
    wanted = expected(hidden.cpu(), ids, weights, tensors)
    worst = float(((output - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    print(f"worst relative error of a token on {device}: {worst:.2e}")
    if worst > 0.02:
        raise SystemExit("the output is wrong")


if __name__ == "__main__":
    main()
