# SPDX-License-Identifier: Apache-2.0
"""What a call costs before and after the kernels: microseconds of the smallest layer.

    taskset -c 1 python bench/bench_overhead.py [--json COMMIT] [--device cuda]

One token whose only slot is skipped (id -1), so that routing, permutation and GEMMs have nothing to
do, and one token that takes the smallest expert; one thread. The least mean of many short batches
of calls: what else runs on the machine only adds. "operator alone" has a layer that computes
nothing. On a GPU the host's time alone, launches included: the device is waited for between
batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hopyard

try:
    import torch

    from hopyard import torch_ops
except ImportError:
    torch = None

HIDDEN, WIDTH, EXPERTS = 8, 8, 4
BATCHES, CALLS = 400, 50
GOALS_US = {"layer, torch": 8.0, "operator": 15.0, "operator, out": 15.0}


def microseconds(
    calls: dict[str, Callable[[], Any]], device: str
) -> dict[str, tuple[float, float]]:
    """Least and median mean time of each call over batches.

    The calls take turns, so that each of them sees the quiet moments of the machine.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(BATCHES):
        for name, call in calls.items():
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    return {name: (min(spans[1:]), statistics.median(spans[1:])) for name, spans in times.items()}


def numpy_arrays(expert: int) -> dict[str, Any]:
    """Weights and a call's arguments in NumPy."""
    rng = np.random.default_rng(0)

    def bits(*shape: int) -> np.ndarray:
        return hopyard.to_bf16(rng.standard_normal(shape))

    return {
        "gemm1": bits(EXPERTS, 2 * WIDTH, HIDDEN),
        "gemm2": bits(EXPERTS, HIDDEN, WIDTH),
        "hidden": bits(1, HIDDEN),
        "ids": np.full((1, 1), expert, np.int32),
        "weights": np.ones((1, 1), np.float32),
        "logits": np.zeros((1, EXPERTS), np.float32),
    }


def torch_arrays(arrays: dict[str, Any], device: str) -> dict[str, Any]:
    """The same in torch."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return {n: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for n, t in tensors.items()}


def idle_layer() -> type[hopyard.MoeLayer]:
    """A layer that computes nothing."""

    class Idle(hopyard.MoeLayer):
        def __call__(self, hidden: Any, **call: Any) -> Any:
            return torch.empty_like(hidden)

    return Idle


def make_layer(
    arrays: dict[str, Any], kind: type[hopyard.MoeLayer] = hopyard.MoeLayer
) -> hopyard.MoeLayer:
    """The smallest layer, on one thread."""
    spec = hopyard.MoeSpec(HIDDEN, WIDTH, EXPERTS, 1)
    experts = hopyard.ExpertWeights(gemm1=arrays["gemm1"], gemm2=arrays["gemm2"])
    return kind(spec, hopyard.Weights(spec, experts), max_tokens=1, num_threads=1)


def layer_calls(arrays: dict[str, Any], kind: str) -> dict[str, Callable[[], Any]]:
    """A layer's call, with and without an output."""
    layer = make_layer(arrays)
    hidden, given = arrays["hidden"], {n: arrays[n] for n in ("ids", "weights")}
    out = layer(hidden, **given)
    return {
        f"layer, {kind}": lambda: layer(hidden, **given),
        f"layer, {kind}, out": lambda: layer(hidden, **given, out=out),
    }


def operator_calls(arrays: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The operators, and what torch adds to a layer."""
    layer, idle = make_layer(arrays), make_layer(arrays, kind=idle_layer())
    hidden, given = arrays["hidden"], {n: arrays[n] for n in ("ids", "weights")}
    out = layer(hidden, **given)
    moe, moe_out = torch.ops.hopyard.moe.default, torch.ops.hopyard.moe_out.default

    def alone(layer: hopyard.MoeLayer = idle, number: int = torch_ops.handle(idle)) -> Any:
        return moe(hidden, number, **given)

    def returned(layer: hopyard.MoeLayer = layer, number: int = torch_ops.handle(layer)) -> Any:
        return moe(hidden, number, **given)

    def written(layer: hopyard.MoeLayer = layer, number: int = torch_ops.handle(layer)) -> Any:
        return moe_out(hidden, number, out, **given)

    return {"operator alone": alone, "operator": returned, "operator, out": written}


def route_calls(arrays: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Routing alone, and its operators."""
    logits, rule = arrays["logits"], hopyard.RoutingRule.renormalize()
    text = torch_ops.rule_text(rule)
    ids, weights = hopyard.route(logits, rule, 1)
    made, written = torch.ops.hopyard.route.default, torch.ops.hopyard.route_out.default
    return {
        "route, torch": lambda: hopyard.route(logits, rule, 1),
        "route operator": lambda: made(logits, text, 1),
        "route operator, out": lambda: written(logits, text, 1, ids, weights),
    }


def machine(commit: str) -> dict[str, Any]:
    """What a line of results says of where it comes from."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "git": commit,
        "cpu": names[0].partition(": ")[2] if names else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": None if torch is None else torch.__version__,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="COMMIT", help="one JSON object a line, for this commit")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, which needs torch")
    given = parser.parse_args()
    for path, expert in (("nothing to do", -1), ("one expert", 0)):
        arrays = numpy_arrays(expert)
        calls = layer_calls(arrays, "numpy") if given.device == "cpu" else {}
        if torch is not None:
            torch.set_grad_enabled(False)
            tensors = torch_arrays(arrays, given.device)
            calls |= layer_calls(tensors, "torch") | operator_calls(tensors)
            calls |= route_calls(tensors) if expert == 0 else {}
        for name, (least, median) in microseconds(calls, given.device).items():
            goal = GOALS_US.get(name)
            if given.json is not None:
                times = {"us": round(least, 2), "median_us": round(median, 2), "goal_us": goal}
                line = {**machine(given.json), "device": given.device, "path": path, "call": name}
                print(json.dumps({**line, **times}))
            else:
                end = f"  goal {goal}" if goal else ""
                print(f"{path:14} {name:20} {least:7.2f} us, median {median:7.2f} us{end}")


if __name__ == "__main__":
    main()
