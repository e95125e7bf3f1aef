# SPDX-License-Identifier: Apache-2.0
"""The command's --device: what is refused without a GPU, and runs verified on one."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from command import hopyard, read_safetensors, refusal, result

TARGET = ("qwen3-30b-a3b", "--experts", 16)
NO_BACKEND = "Unsupported: this build has no CUDA backend; plan for the CPU"


def has_backend():
    return "sm90" in result("info")["backends"]


def needs_gpu():
    info = result("info")
    if not has_backend() or not any(gpu["compute"] == "9.0" for gpu in info.get("gpus", [])):
        pytest.skip("no Hopper GPU, or a command without its backend")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cpu:0"])
@pytest.mark.parametrize("command", ["run", "bench", "explain"])
def test_unknown_devices_are_refused(command, device):
    message = refusal(command, *TARGET, "--device", device)
    assert f"--device is '{device}'; wanted cpu, cuda or cuda:N" in message


def test_explain_needs_no_gpu():
    answer = result("explain", *TARGET, "--device", "cuda:3")
    assert answer["device"] == "cuda:3"
    assert answer["supported"] == has_backend()
    if has_backend():
        assert answer["workspace_bytes"] > 0
        assert any(c["chosen"] and "GEMM2" in c["reason"] for c in answer["candidates"])
    else:
        assert "HOPYARD_CUDA=ON" in answer["reason"]


def test_explain_shows_the_kernels_of_packed_weights():
    cuda = ("--device", "cuda")
    answer = result("explain", *TARGET, "--weights", "mxfp4", "--packed", *cuda)
    assert answer["supported"] == has_backend()
    chosen = [c["reason"] for c in answer["candidates"] if c["chosen"]]
    assert len(chosen) >= 2 * has_backend()
    assert all("packed, runs as mxfp4_" in reason for reason in chosen)
    nvfp4 = ("--weights", "nvfp4", "--activations", "fp8_per_token")
    answer = result("explain", *TARGET, *nvfp4, "--packed", *cuda)
    assert not answer["supported"]
    assert ("no kernel for packed nvfp4 weights" in answer["reason"]) == has_backend()


def test_a_build_without_the_backend_refuses_gpus():
    if has_backend():
        pytest.skip("this command has the backend")
    for command in ("run", "bench"):
        assert NO_BACKEND in refusal(command, *TARGET, "--device", "cuda")


def test_runs_say_where():
    options = ("--tokens", 2, "--repeat", 1, "--verify", 0)
    assert result("run", *TARGET, *options)["device"] == "cpu"
    assert "device   cpu, " in hopyard("run", *TARGET, *options).stdout


FORMATS = [
    ("bf16", "bf16"),
    ("fp8_block128", "fp8_block128"),
    ("fp8_per_tensor", "fp8_per_tensor"),
    ("mxfp8", "mxfp8"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "bf16"),
    ("mxint4", "bf16"),
]


@pytest.mark.parametrize(("weights", "activations"), FORMATS)
def test_runs_on_a_gpu_are_verified(weights, activations, tmp_path):
    needs_gpu()
    formats = ("--weights", weights, "--activations", activations)
    path = tmp_path / "out.safetensors"
    done = result("run", *TARGET, *formats, "--tokens", 24, "--device", "cuda", "--output", path)
    assert done["device"] == "cuda:0"
    assert done["verification"]["passed"], done["verification"]
    assert sum(done["expert_load"]) == 24 * 8
    on_cpu = tmp_path / "cpu.safetensors"
    hopyard("run", *TARGET, *formats, "--tokens", 24, "--output", on_cpu)
    got, wanted = read_safetensors(path), read_safetensors(on_cpu)
    assert (got["replay"] == wanted["replay"]).all()
    replayed = ("--replay", on_cpu, "--check", path, "--device", "cuda", "--tokens", 24)
    assert result("run", *TARGET, *formats, *replayed)["verification"]["passed"]


def test_bench_on_a_gpu():
    needs_gpu()
    options = ("--tokens", "1,64", "--seconds", 0.2, "--weights", "bf16,mxfp4", "--device", "cuda")
    lines = hopyard("bench", *TARGET, *options, "--progress", "off").stdout.splitlines()
    points = [json.loads(line) for line in lines]
    assert len(points) == 4
    for point in points:
        assert point["device"] == "cuda:0"
        assert point["gpu"]
        assert point["median_us"] > 0
        assert "read_gbps" not in point


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_in_a_file_is_tuned_and_runs_what_won(device, tmp_path, monkeypatch):
    if device == "cuda":
        needs_gpu()
    layer, output, plot = (tmp_path / name for name in ("layer.json", "table.json", "plot.svg"))
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_experts": 16, "top_k": 4}
    layer.write_text(json.dumps({**sizes, "weights": "mxfp4"}))
    where = ("--device", device)
    files = ("--output", output, "--plot", plot)
    answer = result("tune", layer, *where, "--tokens", 1, 8, 64, "--seconds", 8, *files)
    assert result("tune", "show", output) == answer["table"]
    (tuned,) = answer["table"]["layers"]
    assert tuned["ranges"][-1]["last"] >= 64
    assert {r["tactic"].startswith("cpu_") for r in tuned["ranges"]} == {device == "cpu"}
    assert (answer["table"]["machine"]["isa"] == "") == (device == "cuda")
    texts = {text.text for text in ET.parse(plot).iter("{http://www.w3.org/2000/svg}text")}
    assert {r["tactic"] for r in tuned["ranges"]} <= texts
    monkeypatch.setenv("HOPYARD_TUNING_FILE", str(output))
    explained = result("explain", layer, *where, "--tokens", 64)
    assert any("tuned:" in c["reason"] for c in explained["candidates"] if c["chosen"])
    options = ("--tokens", "8,64", "--seconds", 0.2, "--tuned-vs-untuned", "--progress", "off")
    for line in map(json.loads, hopyard("bench", layer, *where, *options).stdout.splitlines()):
        assert line["tuned_over_untuned"] == pytest.approx(line["median_us"] / line["untuned_us"])
        assert line["device"].startswith(device)
