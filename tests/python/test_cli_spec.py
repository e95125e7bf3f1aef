# SPDX-License-Identifier: Apache-2.0
"""Layers that a .json file states, and runs whose scores tie."""

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

pytestmark = pytest.mark.skipif(not HOPYARD.exists(), reason=f"{HOPYARD} is not built")

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 8, "top_k": 2}
FULL = TINY | {
    "routing": {"method": "DeepSeekV3", "num_groups": 4, "top_groups": 2, "scaling_factor": 2.5},
    "activation": {"kind": "swiglu", "alpha": 1.702, "beta": [1, 0, 1, 0, 1, 0, 1, 0], "limit": 7},
    "weights": "mxfp4",
    "activations": "mxfp8",
    "local": {"kind": "all"},
    "shared": {"count": 1, "weight": 0.5, "weights": "mxfp8"},
    "router_weight_on_input": False,
}


def spec_file(folder: Path, spec: object) -> Path:
    path = folder / "layer.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def test_fields_are_those_of_the_spec(tmp_path: Path) -> None:
    answer = result("explain", spec_file(tmp_path, FULL))
    assert answer["supported"]
    assert answer["layer"] == str(tmp_path / "layer.json")
    for part in (
        "hidden=64 intermediate=96 experts=8 top_k=2 weights=mxfp4 activations=mxfp8",
        "activation=swiglu alpha=1.702 beta=per-expert limit=7",
        "groups=2/4 scaling_factor=2.5",
        "shared=1(mxfp8, weight 0.5",
    ):
        assert part in answer["spec"]
    few = result("explain", spec_file(tmp_path, TINY))
    assert "weights=bf16 activations=bf16 activation=swiglu routing=" in few["spec"]


@pytest.mark.parametrize(
    "routing",
    [
        "Default",
        "Renormalize",
        "RenormalizeNaive",
        "DeepSeekV3",
        "MiniMax2",
        "Llama4",
        "TopKSigmoid",
        "TopK",
        "SigmoidRenorm",
        "Sigmoid",
        "SqrtSoftplus",
        {"method": "MiniMax2", "scaling_factor": 1.5},
        {"method": "SigmoidRenorm", "norm_topk_prob": False},
        {"method": "SqrtSoftplus", "scaling_factor": 1.5},
    ],
)
def test_every_method_runs(tmp_path: Path, routing: object) -> None:
    path = spec_file(tmp_path, TINY | {"routing": routing})
    run = result("run", path, "--tokens", 5, "--repeat", 1)
    assert run["verification"]["passed"]
    assert run["verification"]["sampled_tokens"] == 5


def test_run_and_bench(tmp_path: Path) -> None:
    path = spec_file(tmp_path, FULL)
    run = result("run", path, "--tokens", 3, "--repeat", 1)
    assert run["verification"]["passed"]
    assert run["weights"] == "mxfp4"
    other = result("run", path, "--tokens", 3, "--repeat", 1, "--weights", "nvfp4")
    assert other["verification"]["passed"]
    assert other["weights"] == "nvfp4"
    done = hopyard("bench", path, "--tokens", 2, "--seconds", 0.01, "--skew", "uniform")
    assert json.loads(done.stdout)["model"] == str(path)


def test_explain_says_why_a_stated_layer_does_not_run(tmp_path: Path) -> None:
    answer = result("explain", spec_file(tmp_path, TINY | {"activations": "nvfp4"}))
    assert not answer["supported"]
    assert "bf16 weights with nvfp4 activations" in answer["reason"]
    ranked = TINY | {"local": {"kind": "range", "offset": 4, "count": 4}}
    path = spec_file(tmp_path, ranked)
    assert "local=[4,8)" in result("explain", path)["spec"]
    assert refusal("run", path).startswith("Unsupported: ")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (TINY | {"hiden_size": 3}, ("field 'hiden_size' is not known", "hidden_size, inter")),
        (TINY | {"struct_size": 3}, ("field 'struct_size' is not known",)),
        (TINY | {"hidden_size": "64"}, ("field 'hidden_size' is", "integer")),
        (TINY | {"hidden_size": 64.5}, ("field 'hidden_size' is 64.5", "integer")),
        (TINY | {"num_experts": -8}, ("field 'num_experts' is -8", "integer")),
        (TINY | {"top_k": 1 << 40}, ("field 'top_k' is 1099511627776",)),
        ({"hidden_size": 64}, ("field 'intermediate_size' is missing",)),
        (TINY | {"weights": 4}, ("field 'weights' is 4", "string")),
        (TINY | {"weights": "fp3"}, ("field 'weights': ", "'fp3'", "mxint4")),
        (TINY | {"activations": "fp3"}, ("field 'activations': ", "'fp3'", "nvfp4_per_token")),
        (TINY | {"activation": "swish"}, ("field 'activation': ", "'swish'", "identity")),
        (TINY | {"activation": ["swiglu"]}, ("field 'activation' is an array", "string")),
        (TINY | {"activation": {"gamma": 1}}, ("field 'activation.gamma' is not known", "alpha")),
        (TINY | {"activation": {"alpha": "1"}}, ("field 'activation.alpha' is", "number")),
        (TINY | {"activation": {"beta": [1, "2"]}}, ("field 'activation.beta'", "string at 1")),
        (TINY | {"activation": {"limit": [1, 2]}}, ("activation.limit has 2 values",)),
        (TINY | {"routing": "Softmax"}, ("field 'routing' is 'Softmax'", "SqrtSoftplus")),
        (TINY | {"routing": 3}, ("field 'routing' is 3", "string")),
        (TINY | {"routing": {}}, ("field 'routing.method' is missing",)),
        (
            TINY | {"routing": {"method": "Default", "scaling_factor": 2}},
            ("field 'routing.scaling_factor' is not known", "routing method Default has method"),
        ),
        (
            TINY | {"routing": {"method": "DeepSeekV3", "scaling_factor": 0}},
            ("scaling_factor=0; wanted more than 0",),
        ),
        (TINY | {"local": "all"}, ("field 'local' is", "object")),
        (TINY | {"local": {"kind": "some"}}, ("field 'local.kind' is 'some'", "range")),
        (TINY | {"shared": {"count": True}}, ("field 'shared.count' is true", "integer")),
        (TINY | {"shared": {"weights": "x"}}, ("field 'shared.weights': ", "'x'")),
        (TINY | {"router_weight_on_input": 1}, ("field 'router_weight_on_input' is 1", "true or")),
        ("[1]", ("array", "object is wanted")),
        ("{", ("is not JSON at byte",)),
        ('{"top_k": 1, "top_k": 2}', ("the key 'top_k' twice",)),
        ("", ("has 0 bytes",)),
    ],
)
def test_bad_files_name_file_and_key(tmp_path: Path, spec: object, parts: tuple) -> None:
    path = spec_file(tmp_path, spec)
    text = refusal("explain", path)
    assert text.startswith("InvalidArgument: ")
    for part in parts:
        assert part in text
    if "has 2 values" not in text and "scaling_factor=0" not in text:  # sense, not form
        assert str(path) in text


def test_options_that_a_file_does_not_take(tmp_path: Path) -> None:
    path = spec_file(tmp_path, TINY)
    assert "--experts is given" in refusal("run", path, "--experts", 4)
    assert "--layer is given" in refusal("run", path, "--layer", 0)
    assert "is a spec file" in refusal("quantize", path, "--to", "mxfp4")
    assert "nothing.json" in refusal("explain", tmp_path / "nothing.json")


# ---- tied scores


def saturated(folder: Path) -> tuple[Path, Path]:
    """Tokens so large that FP32 sigmoids of different logits are all 1."""
    path = spec_file(folder, TINY | {"routing": "Sigmoid"})
    tokens = np.random.default_rng(11).standard_normal((12, 64)).astype(np.float32)
    np.save(folder / "tokens.npy", tokens * 20)
    return path, folder / "tokens.npy"


def test_tied_tokens_are_compared(tmp_path: Path) -> None:
    path, tokens = saturated(tmp_path)
    out = tmp_path / "out.safetensors"
    args = ("run", path, "--input", tokens, "--verify", 12, "--repeat", 1)
    verification = result(*args, "--output", out)["verification"]
    assert verification["passed"]
    assert verification["tied_tokens"] >= 3
    assert verification["oracle_rms"] > 0
    bits = read_safetensors(out)["output"]
    bad = tmp_path / "bad.safetensors"
    for token in range(12):  # the tied ones are among them: every token is judged
        wrong = bits.copy()
        wrong[token] = to_bf16(from_bf16(wrong[token]) * np.float32(1.0625))
        write_safetensors(bad, {"output": ("BF16", wrong)})
        refused = result(*args, "--check", bad, code=1)["verification"]
        assert refused["worst_row"] == token
