# SPDX-License-Identifier: Apache-2.0
"""MoERunner: an operation's kernels as tactics of the tuner for users' runners."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import hopyard.compat.flashinfer as fi
from autotuner_runners import tuner  # noqa: F401
from compat_layers import one_torch_thread  # noqa: F401
from devices import DEVICES
from hopyard.compat.flashinfer import tuning
from hopyard.compat.flashinfer.autotuner import (
    AutoTuner,
    DynamicTensorSpec,
    TuningConfig,
    autotune,
    profiles_of,
)

D, F8 = fi.DtypeTrtllmGen, fi.Fp8QuantizationType
SIZES = cl.Sizes(256, 128, 16, 2, 8)
PROBLEM = {
    "top_k": 2,
    "num_local_experts": 16,
    "dtype_act": D.Bfloat16,
    "dtype_weights": D.Bfloat16,
    "fp8_quantization_type": F8.NoneFp8,
    "hidden_size": 256,
    "intermediate_size": 128,
}
# Hidden states and logits have a row for each token.
CONFIG = TuningConfig(dynamic_tensor_specs=[DynamicTensorSpec((1, 4), (0, 0), (1, 8), lambda x: x)])


def case_of(device, routed=False):
    """A runner, its inputs, and the operation's other arguments."""
    case = cl.make("bf16", SIZES, device=device)
    arguments = {**case.arguments, **cl.routing_of(SIZES)}
    hidden = arguments.pop("hidden_states")
    if routed:
        ids = torch.stack([torch.arange(8) % 16, (torch.arange(8) + 5) % 16], 1).int().to(device)
        weights = torch.full((8, 2), 0.5, device=device)
        inputs = [None, None, ids, weights, hidden]
        return fi.MoERunner(fi.trtllm_bf16_routed_moe, **PROBLEM), inputs, arguments
    arguments["routing_bias"] = None
    inputs = [None, cl.logits_of(case).to(device), None, None, hidden]
    return fi.MoERunner(fi.trtllm_bf16_moe, **PROBLEM), inputs, arguments


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_tactics_are_the_kernels_that_run(device, routed, monkeypatch):
    monkeypatch.setattr(tuning, "_device", lambda: device)
    runner, inputs, arguments = case_of(device, routed)
    usual = runner(inputs, **arguments)
    operation = fi.trtllm_bf16_routed_moe if routed else fi.trtllm_bf16_moe
    given = {"topk_ids": (inputs[2], inputs[3])} if routed else {"routing_logits": inputs[1]}
    cl.same(usual, operation(hidden_states=inputs[4], **given, **arguments))
    (profile,) = profiles_of(TuningConfig(), inputs)
    tactics = runner.get_valid_tactics(inputs, profile)
    kernels = set()
    for tactic in tactics:
        kernels.add(fi.trtllm_moe_tactic_name(tactic, *runner.problem, 8))
        output = torch.full_like(inputs[4], 7)
        result = runner([output, *inputs[1:]], tactic=tactic, **arguments)
        assert result.data_ptr() == output.data_ptr()
        assert float((output.float() - usual.float()).norm() / usual.float().norm()) < 0.02
    assert len(kernels) == len(tactics) >= 1
    with pytest.raises(RuntimeError, match="Invalid MoE tactic"):
        runner(inputs, tactic=[tactics[0][0], 10**7], **arguments)


def test_the_tactic_asked_for_runs(monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "_device", lambda: "cpu")
    runner, inputs, arguments = case_of("cpu")
    (profile,) = profiles_of(TuningConfig(), inputs)
    tactics = runner.get_valid_tactics(inputs, profile)
    make_layer = fi.engine.tuned.make_layer

    def watched(operation, spec, weights, options):
        seen.append(options.get("tactic", ""))
        return make_layer(operation, spec, weights, options)

    monkeypatch.setattr(fi.engine.tuned, "make_layer", watched)
    fi.clear_caches()
    for tactic in tactics:
        runner(inputs, tactic=tactic, **arguments)
    assert seen == [fi.trtllm_moe_tactic_name(t, *runner.problem, 8) for t in tactics]


def test_the_tuner_chooses_among_them(tuner, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tuning, "_device", lambda: "cpu")
    runner, inputs, arguments = case_of("cpu")
    with autotune():
        chosen, tactic = AutoTuner.get().choose_one(
            "my::moe", [runner], CONFIG, inputs, **arguments
        )
    assert chosen is runner
    (profile,) = profiles_of(TuningConfig(), inputs)
    assert tactic == -1 or list(tactic) in runner.get_valid_tactics(inputs, profile)
    output = runner(inputs, tactic=tactic, **arguments)
    usual = runner(inputs, **arguments).float()
    assert float((output.float() - usual).norm() / usual.norm()) < 0.02


def test_equal_problems_are_equal_runners():
    one = fi.MoERunner(fi.trtllm_bf16_moe, **PROBLEM)
    same = fi.MoERunner(fi.trtllm_bf16_moe, **PROBLEM)
    assert one == same
    assert hash(one) == hash(same)
    assert one != 3
    assert one != fi.MoERunner(fi.trtllm_bf16_routed_moe, **PROBLEM)
    changes = {
        "top_k": 4,
        "num_local_experts": 8,
        "dtype_act": D.E4m3,
        "dtype_weights": D.E4m3,
        "fp8_quantization_type": F8.DeepSeekFp8,
        "hidden_size": 512,
        "intermediate_size": 256,
        "activation_type": fi.ActivationType.Geglu,
        "use_shuffled_weight": True,
        "weight_layout": fi.WeightLayout.BlockMajorK,
        "use_per_token_scaling": True,
    }
    others = [fi.MoERunner(fi.trtllm_bf16_moe, **{**PROBLEM, k: v}) for k, v in changes.items()]
    assert all(other != one for other in others)
    assert len({hash(runner) for runner in [one, *others]}) == 1 + len(others)


def test_tactics_are_looked_up_once(monkeypatch):
    asked = []
    explain = tuning.hopyard.explain
    monkeypatch.setattr(tuning, "_device", lambda: "cpu")
    monkeypatch.setattr(
        tuning.hopyard, "explain", lambda *a, **k: asked.append(a) or explain(*a, **k)
    )
    tuning._kernels_of.cache_clear()
    problem = (*fi.MoERunner(fi.trtllm_bf16_moe, **PROBLEM).problem, 5)
    first = fi.trtllm_get_valid_moe_configs(*problem)
    times = len(asked)
    assert times > 0
    assert fi.trtllm_get_valid_moe_configs(*problem) == first
    assert len(asked) == times
