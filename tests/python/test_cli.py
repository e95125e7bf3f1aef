# SPDX-License-Identifier: Apache-2.0
"""The `hopyard` command: results, files, refusals and exit codes.

Specs stated in a file: test_cli_spec.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command import (
    HOPYARD,
    from_bf16,
    hopyard,
    read_safetensors,
    refusal,
    result,
    to_bf16,
    write_safetensors,
)

# Small enough to run in a second, big enough to be a real layer.
SMALL = ("qwen3-30b-a3b", "--experts", "12")
HIDDEN = 2048
EXPERTS, TOP_K = 12, 8

pytestmark = pytest.mark.skipif(not HOPYARD.exists(), reason=f"{HOPYARD} is not built")


class Mixtral:
    """A two-layer Mixtral checkpoint, and the layer's mathematics in NumPy."""

    hidden, inter, experts, top_k = 64, 96, 4, 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        random = np.random.default_rng(7)
        config = {
            "model_type": "mixtral",
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": 2,
            "hidden_act": "silu",
        }
        (folder / "config.json").write_text(json.dumps(config))
        shapes = {
            "w1": (self.inter, self.hidden),
            "w2": (self.hidden, self.inter),
            "w3": (self.inter, self.hidden),
        }
        self.tensors = {}
        for layer in range(2):
            moe = f"model.layers.{layer}.block_sparse_moe"
            gate = random.standard_normal((self.experts, self.hidden))
            self.tensors[f"{moe}.gate.weight"] = to_bf16(gate)
            for expert in range(self.experts):
                for name, shape in shapes.items():
                    values = random.standard_normal(shape) / np.sqrt(shape[1])
                    self.tensors[f"{moe}.experts.{expert}.{name}.weight"] = to_bf16(values)
        named = {name: ("BF16", bits) for name, bits in self.tensors.items()}
        write_safetensors(folder / "model.safetensors", named)

    def weight(self, layer: int, name: str) -> np.ndarray:
        return from_bf16(self.tensors[f"model.layers.{layer}.block_sparse_moe.{name}.weight"])

    def forward(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output and expert ids in float64."""
        x = from_bf16(to_bf16(x)).astype(np.float64)
        logits = x @ self.weight(layer, "gate").T
        ids = np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]
        chosen = np.take_along_axis(logits, ids, axis=1)
        weights = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        output = np.zeros_like(x)
        for token in range(x.shape[0]):
            for slot in range(self.top_k):
                expert = f"experts.{ids[token, slot]}"
                gate = self.weight(layer, f"{expert}.w1") @ x[token]
                up = self.weight(layer, f"{expert}.w3") @ x[token]
                hidden = gate / (1 + np.exp(-gate)) * up
                output[token] += weights[token, slot] * (
                    self.weight(layer, f"{expert}.w2") @ hidden
                )
        return output, ids


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Mixtral:
    return Mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    path = tmp_path_factory.mktemp("run") / "out.safetensors"
    return result("run", *SMALL, "--tokens", 10, "--verify", 3, "--output", path), path


def tampered(path: Path, source: Path, change: object) -> Path:
    bits = read_safetensors(source)["output"].copy()
    change(bits)
    return write_safetensors(path, {"output": ("BF16", bits)})


# ---- info and explain


def test_info() -> None:
    info = result("info")
    assert info["backends"] in (["cpu"], ["cpu", "sm90"])
    assert info["cpu"]["isa"] in {"scalar", "avx2", "avx512"}
    assert 0 < info["memory_available_bytes"] <= info["memory_bytes"]
    assert "deepseek-v3" in info["presets"]
    text = hopyard("info").stdout
    assert info["version"] in text
    assert info["cpu"]["isa"] in text


def test_version_and_help() -> None:
    assert result("info")["version"] in hopyard("--version").stdout
    for command in ("info", "explain", "run", "bench", "quantize"):
        assert "--json" in hopyard(command, "--help").stdout


def test_every_preset_is_explained() -> None:
    presets = result("info")["presets"]
    assert {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"} <= set(presets)
    for preset in presets:
        answer = result("explain", preset)
        assert answer["supported"], answer
        assert sum(c["chosen"] for c in answer["candidates"]) == 1
        assert all(c["reason"] for c in answer["candidates"])


def test_explain_says_why_not() -> None:
    answer = result("explain", "gpt-oss-20b", "--activations", "nvfp4")
    assert not answer["supported"]
    assert "mxfp4" in answer["reason"]
    assert "nvfp4" in answer["reason"]
    assert not any(c["chosen"] for c in answer["candidates"])


def test_explain_needs_no_weights() -> None:
    # A 40 GiB layer: refused by `run` on most machines, explained on all.
    assert result("explain", "kimi-k2", "--weights", "bf16")["weights_bytes"] > 30 << 30


# ---- run


def test_run_reports(small_run: tuple[dict, Path]) -> None:
    run, _ = small_run
    assert run["verification"]["passed"]
    assert run["verification"]["sampled_tokens"] == 3
    assert sum(run["expert_load"]) == 10 * TOP_K
    assert len(run["expert_load"]) == EXPERTS
    assert run["experts_touched"] == np.count_nonzero(run["expert_load"])
    assert run["weight_bytes_touched"] == run["experts_touched"] * 3 * HIDDEN * 768 * 2
    flops = 2 * 10 * TOP_K * 3 * HIDDEN * 768
    assert run["gflops"] == pytest.approx(flops / run["median_us"] * 1e-3)


def test_run_writes_output(small_run: tuple[dict, Path]) -> None:
    run, path = small_run
    tensors = read_safetensors(path)
    output = from_bf16(tensors["output"])
    assert output.shape == (10, HIDDEN)
    assert np.isfinite(output).all()
    ids = tensors["expert_ids"]
    assert np.array_equal(ids, tensors["replay"])
    assert all(len(set(row)) == TOP_K for row in ids)
    assert np.bincount(ids.ravel(), minlength=EXPERTS).tolist() == run["expert_load"]
    assert np.allclose(tensors["routing_weights"].sum(axis=1), 1.0, atol=1e-5)


def test_run_text(tmp_path: Path) -> None:
    done = hopyard("run", *SMALL, "--tokens", 2, "--verify", 1, "--repeat", 1)
    for part in ("VERIFIED", "GFLOP/s", "GB/s", "expert load: 16 slots", "####"):
        assert part in done.stdout


def test_same_seed_same_bits(small_run: tuple[dict, Path], tmp_path: Path) -> None:
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    args = ("run", *SMALL, "--tokens", 10, "--verify", 0, "--repeat", 1)
    result(*args, "--threads", 1, "--output", again)
    result(*args, "--seed", 2, "--output", other)
    want = read_safetensors(small_run[1])["output"]
    assert np.array_equal(read_safetensors(again)["output"], want)
    assert not np.array_equal(read_safetensors(other)["output"], want)


@pytest.mark.parametrize(
    "weights",
    ["fp8_block128", "fp8_per_tensor", "fp8_per_channel", "mxfp8", "nvfp4", "mxfp4", "mxint4"],
)
def test_formats_verify(weights: str) -> None:
    run = result("run", *SMALL, "--tokens", 3, "--verify", 1, "--repeat", 1, "--weights", weights)
    assert run["weights"] == weights
    assert run["verification"]["passed"]
    verification = run["verification"]
    assert 0 < verification["worst_row_error"] <= verification["row_tolerance"]


@pytest.mark.parametrize("preset", ["deepseek-v3", "gpt-oss-20b", "llama-4-scout", "minimax-m2"])
def test_presets_verify(preset: str) -> None:
    args = ("--experts", 4, "--tokens", 2, "--verify", 1, "--repeat", 1)
    assert result("run", preset, *args)["verification"]["passed"]


def test_zero_tokens() -> None:
    run = result("run", *SMALL, "--tokens", 0)
    assert run["verification"]["passed"] is None  # nothing was compared: no pass
    assert run["verification"]["sampled_tokens"] == 0
    assert sum(run["expert_load"]) == 0
    text = hopyard("run", *SMALL, "--tokens", 0).stdout
    assert "NOTHING TO VERIFY" in text
    assert "VERIFIED" not in text


def test_fewer_experts_than_top_k() -> None:
    done = hopyard("run", "qwen3-30b-a3b", "--experts", 3, "--tokens", 1, "--verify", 1)
    assert "top_k reduced from 8 to 3" in done.stderr


def skewed_load(skew: str) -> np.ndarray:
    args = ("run", *SMALL, "--weights", "mxfp4", "--verify", 0, "--repeat", 1, "--tokens", 48)
    return np.array(result(*args, "--skew", skew)["expert_load"])


def test_skew() -> None:
    balanced = skewed_load("balanced")
    assert balanced.max() - balanced.min() <= 1
    assert skewed_load("hot").max() == 48  # one expert in every token
    assert skewed_load("zipf").std() > skewed_load("uniform").std()


def test_replay_forces_ids(small_run: tuple[dict, Path], tmp_path: Path) -> None:
    ids = np.array([[(3 * t + k) % EXPERTS for k in range(TOP_K)] for t in range(10)], np.int16)
    ids[4, 2] = -1  # a skipped slot
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "out.safetensors"
    args = ("run", *SMALL, "--tokens", 10, "--verify", 10, "--repeat", 1, "--output", out)
    run = result(*args, "--replay", tmp_path / "ids.npy")
    assert run["verification"]["passed"]
    assert np.array_equal(read_safetensors(out)["replay"], ids)
    # A run's own replay gives the run's own bits.
    result(*args, "--replay", small_run[1])
    want = read_safetensors(small_run[1])["output"]
    assert np.array_equal(read_safetensors(out)["output"], want)


def test_input_files_agree(tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).standard_normal((5, HIDDEN)).astype(np.float16)
    np.save(tmp_path / "half.npy", tokens)
    np.save(tmp_path / "single.npy", tokens.astype(np.float32))
    bits = to_bf16(tokens.astype(np.float32))
    # The named tensor is found among others.
    write_safetensors(
        tmp_path / "bits.safetensors",
        {"other": ("F32", np.zeros(3, np.float32)), "hidden_states": ("BF16", bits)},
    )
    outputs = []
    for name in ("half.npy", "single.npy", "bits.safetensors"):
        out = tmp_path / "out.safetensors"
        args = ("run", *SMALL, "--verify", 2, "--repeat", 1, "--output", out)
        run = result(*args, "--input", tmp_path / name)
        assert run["tokens"] == 5
        assert run["verification"]["passed"]
        outputs.append(read_safetensors(out)["output"])
    assert np.array_equal(outputs[0], outputs[1])
    assert np.array_equal(outputs[0], outputs[2])


# ---- the verification can fail


def check(small_run: tuple[dict, Path], path: Path, code: int) -> dict:
    args = ("run", *SMALL, "--tokens", 10, "--verify", 10, "--repeat", 1, "--check", path)
    verification = result(*args, code=code)["verification"]
    assert verification["passed"] == (code == 0)
    assert bool(verification["failures"]) == (code == 1)
    return verification


def test_check_accepts_the_run(small_run: tuple[dict, Path]) -> None:
    check(small_run, small_run[1], code=0)


def swap_rows(bits: np.ndarray) -> None:
    bits[[2, 3]] = bits[[3, 2]]


def zero_all(bits: np.ndarray) -> None:
    bits[:] = 0


def zero_tile(bits: np.ndarray) -> None:
    bits[7, :128] = 0


def flip_negatives(bits: np.ndarray) -> None:
    bits &= 0x7FFF


def one_nan(bits: np.ndarray) -> None:
    bits[9, 1000] = 0x7FC0


def scale_row(bits: np.ndarray) -> None:
    bits[0] = to_bf16(from_bf16(bits[0]) * np.float32(1.0625))


@pytest.mark.parametrize(
    "change", [swap_rows, zero_all, zero_tile, flip_negatives, one_nan, scale_row]
)
def test_check_rejects(small_run: tuple[dict, Path], tmp_path: Path, change: object) -> None:
    verification = check(
        small_run, tampered(tmp_path / "bad.safetensors", small_run[1], change), code=1
    )
    assert (change is one_nan) == any("NaN" in line for line in verification["failures"])


def test_failed_verification_in_text(small_run: tuple[dict, Path], tmp_path: Path) -> None:
    path = tampered(tmp_path / "bad.safetensors", small_run[1], zero_all)
    args = ("run", *SMALL, "--tokens", 10, "--repeat", 1, "--check", path)
    assert "VERIFICATION FAILED" in hopyard(*args, code=1).stdout


# ---- checkpoints


@pytest.mark.parametrize("layer", [0, 1])
def test_checkpoint_layer(mixtral: Mixtral, tmp_path: Path, layer: int) -> None:
    tokens = np.random.default_rng(5).standard_normal((9, mixtral.hidden)).astype(np.float32)
    np.save(tmp_path / "tokens.npy", tokens)
    out = tmp_path / "out.safetensors"
    args = ("run", mixtral.folder, "--layer", layer, "--input", tmp_path / "tokens.npy")
    run = result(*args, "--output", out)
    assert run["verification"]["passed"]
    want, ids = mixtral.forward(layer, tokens)
    got = read_safetensors(out)
    assert np.array_equal(got["expert_ids"], ids)
    error = np.linalg.norm(from_bf16(got["output"]) - want, axis=1)
    assert (error <= 0.01 * np.linalg.norm(want, axis=1)).all()


def test_checkpoint_requantised(mixtral: Mixtral) -> None:
    run = result("run", mixtral.folder, "--weights", "mxfp8", "--tokens", 7, "--verify", 7)
    assert run["weights"] == "mxfp8"
    assert run["verification"]["passed"]


def test_checkpoint_explain(mixtral: Mixtral) -> None:
    answer = result("explain", mixtral.folder, "--layer", 1)
    assert answer["supported"]
    assert "layers.1" in answer["layer"]


def test_missing_layer(mixtral: Mixtral) -> None:
    assert "--layer is 2" in refusal("run", mixtral.folder, "--layer", 2)


# ---- quantize


def test_quantize_writes_what_it_says(mixtral: Mixtral, tmp_path: Path) -> None:
    out = tmp_path / "layer.safetensors"
    answer = result("quantize", mixtral.folder, "--layer", 1, "--to", "mxfp4", "-o", out)
    assert answer["row_order"] == "gate_up"
    tensors = {name.split(".experts.")[1]: data for name, data in read_safetensors(out).items()}
    signs = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    grid = np.concatenate([signs, -signs])
    wanted = {
        "gate_up": [
            np.concatenate([mixtral.weight(1, f"experts.{e}.{n}") for n in ("w1", "w3")])
            for e in range(mixtral.experts)
        ],
        "down": [mixtral.weight(1, f"experts.{e}.w2") for e in range(mixtral.experts)],
    }
    for kind, matrices in wanted.items():
        want = np.stack(matrices).astype(np.float64)
        codes = tensors[f"{kind}.codes"]
        values = np.stack([grid[codes & 15], grid[codes >> 4]], axis=-1).reshape(want.shape)
        scales = 2.0 ** (tensors[f"{kind}.scales"].astype(np.float64) - 127)
        got = values * np.repeat(scales, 32, axis=-1)
        errors = answer["errors"][f"experts.{kind}"]
        assert errors["elements"] == want.size
        assert errors["max_error"] == pytest.approx(np.abs(got - want).max(), rel=1e-6)
        rms = np.sqrt(((got - want) ** 2).sum() / (want**2).sum())
        assert errors["relative_rms"] == pytest.approx(rms, rel=1e-6)
        assert errors["snr_db"] == pytest.approx(-20 * np.log10(rms), rel=1e-6)
        assert 0.05 < rms < 0.2


def test_quantize_orders_formats(mixtral: Mixtral) -> None:
    def snr(weights: str) -> float:
        answer = result("quantize", mixtral.folder, "--to", weights)
        return answer["errors"]["experts.down"]["snr_db"]

    assert snr("mxfp8") > snr("nvfp4") + 5 > snr("mxfp4") + 5
    exact = result("quantize", mixtral.folder, "--to", "bf16")
    assert exact["errors"]["experts.down"]["max_error"] == 0


def test_quantize_text(mixtral: Mixtral) -> None:
    text = hopyard("quantize", mixtral.folder, "--to", "nvfp4").stdout
    assert "SNR dB" in text
    assert "bf16" in text


# ---- bench


def test_bench_lines() -> None:
    args = ("bench", *SMALL, "--tokens", "1,3", "--weights", "mxfp4,bf16")
    done = hopyard(*args, "--skew", "balanced,hot", "--seconds", 0.05)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    points = [(p["weights"], p["routing"], p["tokens"]) for p in lines]
    assert points == [
        (w, s, t) for w in ("mxfp4", "bf16") for s in ("balanced", "hot") for t in (1, 3)
    ]
    for point in lines:
        assert 0 < point["p10_us"] <= point["median_us"] <= point["p90_us"]
        assert point["of_read"] == pytest.approx(point["gbps"] / point["read_gbps"])
        assert point["of_peak"] == pytest.approx(point["gflops"] / point["peak_gflops"])
        assert point["git"]
        assert point["cpu"]
        assert point["threads"] >= 1
    one_token = lines[4]  # bf16, balanced: 8 experts of 9 MiB a call
    rate = 8 * 3 * HIDDEN * 768 * 2 / one_token["median_us"] * 1e-3
    assert one_token["gbps"] == pytest.approx(rate, rel=0.5)


def test_bench_of_recorded_experts(tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.tile(np.arange(8, dtype=np.int16), (3, 1)))  # the same experts for every token
    args = ("bench", *SMALL, "--tokens", "1,5", "--weights", "bf16", "--seconds", 0.05)
    lines = [json.loads(x) for x in hopyard(*args, "--recorded", ids).stdout.splitlines()]
    assert [(p["routing"], p["tokens"]) for p in lines] == [("recorded", 1), ("recorded", 5)]
    # Five tokens read the weights of as many experts as one.
    for point in lines:
        rate = 8 * 3 * HIDDEN * 768 * 2 / point["median_us"] * 1e-3
        assert point["gbps"] == pytest.approx(rate, rel=0.1)
    np.save(ids, np.zeros((0, 8), np.int16))
    assert "ids.npy, which has no tokens; wanted one at least" in refusal(*args, "--recorded", ids)
    np.save(ids, np.full((2, 8), 9999, np.int16))
    assert "expert id 9999 at token 0" in refusal(*args, "--recorded", ids)
    assert "--skew excludes --recorded" in refusal(*args, "--recorded", ids, "--skew", "hot")


# ---- refusals


def npy_with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return path


BAD_NPY = {
    "big": (b"{'descr': '>f4', 'fortran_order': False, 'shape': (1, 2048), }", "dtype '>f4'"),
    "order": (b"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 2048), }", "fortran_order"),
    "object": (b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 2048), }", "dtype '|O'"),
    "key": (b"{'descr': '<f4', 'descr': '<f4', 'shape': (1, 2048), }", "repeated key"),
    "negative": (b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2048), }", "a number"),
    "huge": (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999), }",
        "2^48",
    ),
    "short": (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2048), }", "8192"),
    "open": (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2048", "wanted ')'"),
    "empty": (b"", "wanted '{'"),
    "tail": (b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } x", "after"),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_npy(tmp_path: Path, name: str) -> None:
    header, message = BAD_NPY[name]
    path = npy_with_header(tmp_path / "bad.npy", header, b"\0" * 100)
    text = refusal("run", *SMALL, "--input", path)
    assert text.startswith("InvalidArgument")
    assert str(path) in text
    assert message in text


def test_bad_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.zeros((3, 100), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((3, HIDDEN), np.int32))
    np.save(tmp_path / "ids.npy", np.full((2, TOP_K), EXPERTS, np.int32))
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    run = ("run", *SMALL)
    assert "[3, 100]; wanted [tokens, 2048]" in refusal(*run, "--input", tmp_path / "narrow.npy")
    assert "is i32" in refusal(*run, "--input", tmp_path / "ints.npy")
    assert "not a .npy file" in refusal(*run, "--input", tmp_path / "junk.npy")
    assert "junk.safetensors" in refusal(*run, "--input", tmp_path / "junk.safetensors")
    assert "nothing.npy" in refusal(*run, "--input", tmp_path / "nothing.npy")
    replay = refusal(*run, "--tokens", 2, "--replay", tmp_path / "ids.npy")
    assert "expert id 12 at token 0; wanted -1 .. 11" in replay
    assert "wanted [3, 8]" in refusal(*run, "--tokens", 3, "--replay", tmp_path / "ids.npy")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run", "nonesuch"), "'nonesuch' is neither a preset nor a directory"),
        (("run", *SMALL, "--weights", "fp3"), "fp3"),
        (("run", *SMALL, "--activations", "int8"), "int8"),
        (("run", *SMALL, "--skew", "odd"), "--skew is 'odd'"),
        (("run", *SMALL, "--tokens", "-1"), "--tokens is -1"),
        (("run", *SMALL, "--tokens", "many"), "--tokens"),
        (("run", *SMALL, "--layer", "1"), "--layer is 1"),
        (("run", "qwen3-30b-a3b", "--experts", "129"), "--experts is 129"),
        (("run", *SMALL, "--check", "x.safetensors", "--verify", "0"), "--check"),
        (("run",), "target"),
        (("bench", *SMALL, "--tokens", "1,0"), "--tokens has 0"),
        (("bench", *SMALL, "--seconds", "0"), "--seconds is 0"),
        (("quantize", "qwen3-30b-a3b", "--to", "mxfp4"), "is a preset"),
        (("frobnicate",), "subcommand"),
        ((), "subcommand"),
    ],
)
def test_bad_arguments(args: tuple[str, ...], message: str) -> None:
    assert message in refusal(*args)


def test_bad_progress_mode() -> None:
    done = hopyard("info", "--progress", "loud", code=2)
    assert "--progress is 'loud'; wanted auto, bar, lines or off" in done.stderr


def test_unsupported_pair_is_refused_before_work() -> None:
    text = refusal("run", "gpt-oss-20b", "--activations", "nvfp4")
    assert text.startswith("Unsupported: ")


@pytest.mark.parametrize("command", ["explain", "run", "bench", "tune"])
def test_packing_that_cannot_be_is_refused_before_work(command: str) -> None:
    # A layer that takes minutes to make.
    text = refusal(command, "deepseek-v3", "--weights", "mxfp4", "--packed")
    assert "--packed is for weights on a GPU" in text
    assert text.endswith("add --device cuda")
    text = refusal(command, "deepseek-v3", "--weights", "bf16", "--packed", "--device", "cuda")
    assert "--packed is for mxfp4 and nvfp4 weights, these are bf16" in text


def test_too_little_memory() -> None:
    info = result("info")
    explained = result("explain", "kimi-k2", "--weights", "bf16")
    if explained["weights_bytes"] < info["memory_available_bytes"]:
        pytest.skip("this machine holds the largest preset")
    text = refusal("run", "kimi-k2", "--weights", "bf16")
    assert text.startswith("OutOfMemory: ")
    for part in ("need", "are available", "--experts ", "--weights mxfp4"):
        assert part in text


def test_forced_progress_bar() -> None:
    args = ("run", "qwen3-235b-a22b", "--experts", 24, "--tokens", 16, "--repeat", 1)
    done = hopyard(*args, "--progress", "bar", "--weights", "mxfp4")
    assert "%" in done.stderr
    assert "\x1b[K" in done.stderr  # the bar is redrawn in place
    quiet = hopyard(*args, "--progress", "off", "--weights", "mxfp4", "--verify", 1)
    assert quiet.stderr == "" or "note:" in quiet.stderr
