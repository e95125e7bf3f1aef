# SPDX-License-Identifier: Apache-2.0
"""Times whole layers through Python beside the same layer in torch, on a Hopper GPU.

    python bench/bench_layer.py COMMIT qwen3-30b-a3b [--peer torch] [--formats bf16,fp8]
        [--tokens 1,8,64,512,4096]

Prints JSON lines with the fields of bench_forward and `peer` and `part`. Peer "hopyard" is
`hopyard.MoeLayer`. Peer "torch" has `torch._grouped_mm` (bf16) or `torch._scaled_grouped_mm` (fp8:
weights per channel, rows per token) for both GEMMs and plain torch operations for the rest: part
"layer" is logits in, output out; part "gemms" the two products alone, on rows already in expert
order. Everything is timed in one process by replays of CUDA graphs, peers taking turns. A graph
holds as many calls as there are routings, over weights that the L2 cache does not hold together.
Before they are timed, the two layers' outputs are compared.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hopyard

CALLS = 8
REPLAYS = 15
E4M3_MAX = 448.0
FORMATS = {"bf16": ("bf16", "bf16"), "fp8": ("fp8_per_channel", "fp8_per_token")}
# Of the worst row, between two implementations of which neither is exact.
AGREEMENT = {"bf16": 0.02, "fp8": 0.15}
_BENCH = Path(__file__).resolve().parent


def specs() -> dict[str, hopyard.MoeSpec]:
    """The models of bench/shapes.h whose routing is a softmax over the chosen logits."""
    rows = re.findall(
        r'\{"([^"]+)", (\d+), (\d+), (\d+), (\d+), RoutingRule::Renormalize\(\), kBf16\}',
        (_BENCH / "shapes.h").read_text(),
    )
    return {
        name: hopyard.MoeSpec(
            hidden_size=int(hidden),
            intermediate_size=int(width),
            num_experts=int(experts),
            top_k=int(top_k),
            routing=hopyard.RoutingRule.renormalize(),
        )
        for name, hidden, width, experts, top_k in rows
    }


def ceilings(gpu: str) -> dict[str, float]:
    """Ceilings of bench/gpu.h: its defaults are an H100's, and it has a line for the H200."""
    text = (_BENCH / "gpu.h").read_text()
    fields = dict(re.findall(r"double (\w+_us) = ([\d.e+]+);", text))
    special = re.search(r'"H200"\)[^{]*\{\s*return \{([^}]*)\}', text)
    if "H200" in gpu and special is not None:
        fields = dict(zip(fields, special[1].split(","), strict=True))
    return {name: float(value) for name, value in fields.items()}


@dataclass
class Matrices:
    """One layer's weights [E, rows, K], and scales [E, rows] for e4m3 ones."""

    gemm1: torch.Tensor
    gemm2: torch.Tensor
    scales1: torch.Tensor | None = None
    scales2: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of everything."""
        tensors = (self.gemm1, self.gemm2, self.scales1, self.scales2)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def weights(self, spec: hopyard.MoeSpec) -> hopyard.Weights:
        """Views of them."""
        return hopyard.Weights(
            spec,
            hopyard.ExpertWeights(
                gemm1=hopyard.Matrix(self.gemm1, self.scales1),
                gemm2=hopyard.Matrix(self.gemm2, self.scales2),
            ),
        )


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows rounded to e4m3 with a scale each."""
    amax = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    scales = amax / E4M3_MAX
    return (rows.float() / scales).to(torch.float8_e4m3fn), scales.squeeze(-1)


def random_matrices(spec: hopyard.MoeSpec, fp8: bool) -> Matrices:
    """N(0, 1 / K) weights."""

    def matrix(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (spec.num_experts, rows, cols)
        values = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * cols**-0.5
        if not fp8:
            return values, None
        codes = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
        scales = torch.empty(shape[:2], device="cuda")
        for expert in range(spec.num_experts):  # the whole stack in float32 would not fit
            codes[expert], scales[expert] = to_fp8(values[expert])
        return codes, scales

    gemm1, scales1 = matrix(2 * spec.intermediate_size, spec.hidden_size)
    gemm2, scales2 = matrix(spec.hidden_size, spec.intermediate_size)
    return Matrices(gemm1, gemm2, scales1, scales2)


class TorchLayer:
    """The layer in torch; nothing in it waits for the GPU, so that it can be captured."""

    def __init__(self, spec: hopyard.MoeSpec, fast_accum: bool) -> None:
        self._spec = spec
        self._fast_accum = fast_accum
        self._experts = torch.arange(spec.num_experts, device="cuda")

    def product(
        self, rows: Any, weights: torch.Tensor, scales: torch.Tensor | None, offsets: torch.Tensor
    ) -> torch.Tensor:
        """Rows [M, K], or codes and scales, times each expert's matrix."""
        transposed = weights.transpose(-2, -1)
        if scales is None:
            return torch._grouped_mm(rows, transposed, offs=offsets)
        return torch._scaled_grouped_mm(
            rows[0],
            transposed,
            rows[1],
            scales,
            offs=offsets,
            out_dtype=torch.bfloat16,
            use_fast_accum=self._fast_accum,
        )

    def permute(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Weights [T, K], slots in expert order, and where each expert's rows end."""
        chosen, ids = torch.topk(logits, self._spec.top_k)
        weights = torch.softmax(chosen, -1)
        sorted_ids, order = torch.sort(ids.flatten(), stable=True)
        offsets = torch.searchsorted(sorted_ids, self._experts, right=True, out_int32=True)
        return weights, order, offsets

    def activate(self, products: torch.Tensor) -> torch.Tensor:
        """SwiGLU."""
        gate, up = products.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor, m: Matrices) -> torch.Tensor:
        """The layer."""
        weights, order, offsets = self.permute(logits)
        tokens, top_k = weights.shape
        prepare = (lambda rows: rows) if m.scales1 is None else to_fp8
        # FP8: a token is rounded once, then gathered.
        rows = prepare(hidden)
        at = order // top_k
        rows = rows[at] if m.scales1 is None else (rows[0].view(torch.uint8)[at], rows[1][at])
        if m.scales1 is not None:
            rows = (rows[0].view(torch.float8_e4m3fn), rows[1])
        inner = self.activate(self.product(rows, m.gemm1, m.scales1, offsets))
        outer = self.product(prepare(inner), m.gemm2, m.scales2, offsets)
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device="cuda")
        )
        slots = outer[back].view(tokens, top_k, -1).float()
        return (slots * weights.unsqueeze(-1)).sum(1).bfloat16()

    def gemms(self, prepared: Any, m: Matrices) -> torch.Tensor:
        """Both products on prepared rows."""
        rows, inner, offsets = prepared
        self.product(rows, m.gemm1, m.scales1, offsets)
        return self.product(inner, m.gemm2, m.scales2, offsets)

    def prepare(self, hidden: torch.Tensor, logits: torch.Tensor, m: Matrices) -> Any:
        """What `gemms` takes."""
        _, order, offsets = self.permute(logits)
        rows: Any = hidden[order // self._spec.top_k]
        rows = rows if m.scales1 is None else to_fp8(rows)
        inner: Any = self.activate(self.product(rows, m.gemm1, m.scales1, offsets))
        return rows, inner if m.scales1 is None else to_fp8(inner), offsets


def capture(run: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)  # whatever is loaded or chosen once
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            run(i)
    return graph


def time_in_turns(graphs: dict[Any, torch.cuda.CUDAGraph]) -> dict[Any, list[float]]:
    """Microseconds of one call, sorted, for every graph."""
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 2):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if replay >= 2:
                times[name].append(1e3 * start.elapsed_time(stop) / CALLS)
    return {name: sorted(values) for name, values in times.items()}


def worst_row(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error of a row."""
    error = (got.float() - wanted.float()).norm(dim=-1)
    return float((error / wanted.float().norm(dim=-1)).max())


@dataclass
class Case:
    """One model in one format with its weights, several times over."""

    model: str
    spec: hopyard.MoeSpec
    format: str
    matrices: list[Matrices]
    options: argparse.Namespace

    def run(self, tokens: int) -> None:
        """Compare, time and print one number of tokens."""
        spec, copies = self.spec, len(self.matrices)
        hidden = torch.randn(tokens, spec.hidden_size, device="cuda").bfloat16()
        # Gumbel noise: every token draws its experts uniformly.
        draws = torch.rand(CALLS, tokens, spec.num_experts, device="cuda").clamp(1e-6, 1 - 1e-6)
        logits = -torch.log(-torch.log(draws))
        layers = [
            hopyard.MoeLayer(spec, m.weights(spec), tokens, batch_invariant=True)
            for m in self.matrices
        ]
        out = torch.empty(tokens, spec.hidden_size, device="cuda", dtype=torch.bfloat16)

        def ours(i: int) -> torch.Tensor:
            return layers[i % copies](hidden, logits=logits[i], out=out)

        graphs = {("hopyard", "layer"): capture(ours)}
        if self.options.peer == "torch":
            peer = TorchLayer(spec, self.options.fast_accum)
            error = worst_row(ours(0), peer(hidden, logits[0], self.matrices[0]))
            if not error < AGREEMENT[self.format]:
                raise SystemExit(
                    f"{self.model} {self.format} T={tokens}: the peers differ by {error:.3g} of a "
                    f"row's norm, more than {AGREEMENT[self.format]}"
                )
            ready = [peer.prepare(hidden, logits[i], self.matrices[0]) for i in range(CALLS)]
            graphs["torch", "layer"] = capture(
                lambda i: peer(hidden, logits[i], self.matrices[i % copies])
            )
            graphs["torch", "gemms"] = capture(
                lambda i: peer.gemms(ready[i], self.matrices[i % copies])
            )
        touched = [int(torch.topk(one, spec.top_k).indices.unique().numel()) for one in logits]
        share = sum(touched) / CALLS / spec.num_experts
        tactic = "+".join(c.kernel for c in layers[0].explain().candidates if c.chosen)
        for (peer_name, part), times in time_in_turns(graphs).items():
            self.print_line(tokens, share, times, peer_name, part, tactic)

    def print_line(
        self,
        tokens: int,
        share: float,
        times: list[float],
        peer: str,
        part: str,
        tactic: str,
    ) -> None:
        """One JSON line."""
        spec = self.spec
        gpu = torch.cuda.get_device_name()
        limits = ceilings(gpu)
        moved = share * self.matrices[0].bytes + 4 * tokens * spec.hidden_size
        flops = 6.0 * tokens * spec.top_k * spec.hidden_size * spec.intermediate_size
        peak = limits["fp8_flops_per_us" if self.format == "fp8" else "flops_per_us"]
        floor = max(limits["launch_us"] + moved / limits["bytes_per_us"], flops / peak)
        median = times[len(times) // 2]
        line = {
            "gpu": gpu,
            "commit": self.options.commit,
            "model": self.model,
            "weights": spec.weights,
            "activations": spec.activations,
            "tokens": tokens,
            "routing": "uniform",
            "median_us": median,
            "p10_us": times[len(times) // 10],
            "p90_us": times[len(times) * 9 // 10],
            "floor_us": floor,
            "of_floor": floor / median,
            "tflops": flops / median * 1e-6,
            "tactic": tactic if peer == "hopyard" else f"torch {torch.__version__}",
            "graph": True,
            "cold_l2": True,
            "peer": peer,
            "part": part,
        }
        if peer == "torch" and self.format == "fp8":
            line["fast_accum"] = self.options.fast_accum
        print(json.dumps(line), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    known = ", ".join(specs())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="goes into every line")
    parser.add_argument("models", nargs="+", help=known)
    parser.add_argument("--peer", choices=["torch", "none"], default="torch")
    parser.add_argument("--formats", default="bf16,fp8", help="of " + ", ".join(FORMATS))
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument(
        "--exact-accum",
        dest="fast_accum",
        action="store_false",
        help="torch's FP8 products without use_fast_accum",
    )
    options = parser.parse_args()
    for model in options.models:
        if model not in specs():
            parser.error(f"no model {model}; known: {known}")
    for name in options.formats.split(","):
        if name not in FORMATS:
            parser.error(f"no format {name}; known: {', '.join(FORMATS)}")
    return options


def main() -> int:
    """Every case of the command line."""
    options = parse()
    if not torch.cuda.is_available():
        print("bench_layer: torch finds no GPU", file=sys.stderr)
        return 2
    torch.manual_seed(3)
    cold = 3 * torch.cuda.get_device_properties().L2_cache_size
    for model in options.models:
        for name in options.formats.split(","):
            weights, activations = FORMATS[name]
            base = specs()[model]
            spec = hopyard.MoeSpec(**{**vars(base), "weights": weights, "activations": activations})
            matrices: list[Matrices] = []
            while not matrices or (sum(m.bytes for m in matrices) < cold and len(matrices) < CALLS):
                matrices.append(random_matrices(spec, name == "fp8"))
            case = Case(model, spec, name, matrices, options)
            for tokens in options.tokens.split(","):
                case.run(int(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
