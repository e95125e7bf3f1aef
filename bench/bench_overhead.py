# SPDX-License-Identifier: Apache-2.0
"""What a call costs before and after the kernels: microseconds of the smallest layer.

    python bench/bench_overhead.py [--json]

One token whose only slot is skipped (id -1), so that routing, permutation and GEMMs have nothing to
do, and one token that takes the smallest expert; one thread. The least mean of many batches of
calls: what else runs on the machine only adds. "operator alone" has a layer that computes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import hopyard

try:
    import torch

    from hopyard import torch_ops
except ImportError:
    torch = None

HIDDEN, WIDTH, EXPERTS = 8, 8, 4
BATCHES, CALLS = 200, 100
GOALS_US = {"layer, torch": 8.0, "operator": 15.0, "operator, out": 15.0}


def microseconds(call: Callable[[], Any]) -> float:
    """Least mean time of a call over batches."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(BATCHES):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS)
    return 1e6 * min(times)


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
    }


def torch_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """The same in torch."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    for path, expert in (("nothing to do", -1), ("one expert", 0)):
        arrays = numpy_arrays(expert)
        calls = layer_calls(arrays, "numpy")
        if torch is not None:
            torch.set_grad_enabled(False)
            tensors = torch_arrays(arrays)
            calls |= layer_calls(tensors, "torch") | operator_calls(tensors)
        for name, call in calls.items():
            value, goal = microseconds(call), GOALS_US.get(name)
            if as_json:
                print(json.dumps({"path": path, "call": name, "us": round(value, 2), "goal": goal}))
            else:
                print(f"{path:14} {name:18} {value:7.2f} us" + (f"  goal {goal}" if goal else ""))


if __name__ == "__main__":
    main()
