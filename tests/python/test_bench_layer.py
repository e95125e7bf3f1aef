# SPDX-License-Identifier: Apache-2.0
"""The layer beside torch's: what the benchmark reads from bench/*.h, and a line of each part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from devices import needs_gpu

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import bench_layer  # noqa: E402


def run(*args):
    command = [sys.executable, BENCH / "bench_layer.py", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_models_are_those_of_the_c_benchmarks():
    specs = bench_layer.specs()
    sizes = {
        name: (s.hidden_size, s.intermediate_size, s.num_experts, s.top_k)
        for name, s in specs.items()
    }
    assert sizes == {
        "qwen3-30b-a3b": (2048, 768, 128, 8),
        "qwen3-235b-a22b": (4096, 1536, 128, 8),
        "mixtral-8x7b": (4096, 14336, 8, 2),
    }


def test_ceilings_are_those_of_the_c_benchmarks():
    h100 = bench_layer.ceilings("NVIDIA H100 80GB HBM3")
    h200 = bench_layer.ceilings("NVIDIA H200")
    assert set(h100) == {"launch_us", "bytes_per_us", "flops_per_us", "fp8_flops_per_us"}
    assert set(h200) == set(h100)
    assert h200["bytes_per_us"] > h100["bytes_per_us"] > 1e6


def test_unknown_models_are_named():
    done = run("commit", "no-such-model")
    assert done.returncode == 2
    assert "no model no-such-model; known: qwen3-30b-a3b" in done.stderr


# Both formats: the benchmark compares the outputs before it times them.
@needs_gpu
def test_both_peers_are_timed_in_one_process():
    done = run("abc1234", "qwen3-30b-a3b", "--tokens", "8", "--peer", "torch")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    parts = [(line["weights"], line["peer"], line["part"]) for line in lines]
    assert parts == [
        (weights, *part)
        for weights in ("bf16", "fp8_per_channel")
        for part in (("hopyard", "layer"), ("torch", "layer"), ("torch", "gemms"))
    ]
    for line in lines:
        assert line["commit"] == "abc1234"
        assert 0 < line["floor_us"] < line["median_us"]
