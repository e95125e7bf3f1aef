# SPDX-License-Identifier: Apache-2.0
"""A layer in a CUDA graph that is captured once and replayed with any number of tokens.

Without a Hopper GPU, or the backend for it, the same calls run on the CPU, without a graph.
Run it with the package and torch installed: python examples/python/torch_graph.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hopper import pick_device

import hopyard
from hopyard import torch_ops

CAPACITY, HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 512, 256, 16, 4


def make_layer(spec: hopyard.MoeSpec, device: str) -> hopyard.MoeLayer:
    """A layer with random BF16 weights."""
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, device=device) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, device=device) * WIDTH**-0.5
    experts = hopyard.ExpertWeights(gemm1=gate_up.bfloat16(), gemm2=down.bfloat16())
    return hopyard.MoeLayer(spec, hopyard.Weights(spec, experts), max_tokens=CAPACITY)


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """Something that replays the call's kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.inference_mode()
def main() -> None:
    """Capture at capacity, replay with fewer tokens, compare with plain calls."""
    torch.manual_seed(0)
    spec = hopyard.MoeSpec(HIDDEN, WIDTH, EXPERTS, TOP_K)
    device = pick_device(spec)
    layer = make_layer(spec, device)
    handle = torch_ops.handle(layer)

    # All pointers of a captured call stay: inputs are written into these tensors.
    hidden = torch.zeros(CAPACITY, HIDDEN, dtype=torch.bfloat16, device=device)
    logits = torch.zeros(CAPACITY, EXPERTS, device=device)
    live = torch.tensor([CAPACITY], dtype=torch.int32, device=device)
    output = torch.empty_like(hidden)
    replay = torch.full((CAPACITY, TOP_K), -1, dtype=torch.int16, device=device)

    def call() -> None:
        torch_ops.moe(hidden, handle, logits=logits, num_tokens=live, out=output, replay_out=replay)

    step = captured(call) if device == "cuda" else call
    for tokens in (CAPACITY, 1, 7, 0):
        hidden.normal_()
        logits.normal_()
        live.fill_(tokens)
        step()
        plain = layer(hidden[:tokens], logits=logits[:tokens])
        same = torch.equal(output[:tokens], plain)
        ids = replay[0].tolist() if tokens else []
        print(f"{tokens:3} tokens on {device}: same bits as a plain call: {same}; ids {ids}")
        # Batches of another size may go to other kernels on a GPU; then bits may differ a little.
        if not torch.allclose(output[:tokens].float(), plain.float(), rtol=0.02, atol=0.02):
            raise SystemExit("the output is wrong")


if __name__ == "__main__":
    main()
