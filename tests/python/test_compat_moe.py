# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's MoE operations against an independent layer: its test grids, on the CPU in small and
on a GPU in full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import compat_reference as ref
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from elsewhere import has_gpu_backend
from hopyard.compat.flashinfer import tuning

MODES = list(cl.WEIGHTS)
DEVICES = pytest.mark.parametrize("device", cl.DEVICES)
FP4 = ("nvfp4", "nvfp4_per_token", "mxfp4_mxfp8", "mxfp4_bf16", "mxfp4_e4m3")
METHOD = fi.RoutingMethodType


def sizes(device, **changes):
    usual = cl.Sizes(1024, 512, 128, 8, 8) if device == "cuda" else cl.Sizes()
    return cl.Sizes(**{**vars(usual), **changes})


def activations_of(mode):
    if mode.startswith("deepseek") or mode == "mxint4":
        return ["swiglu"]
    if mode == "mxfp8" or mode in FP4:
        return ["swiglu", "geglu", "situ", "relu2", "identity"]
    return ["swiglu", "geglu", "relu2"]


GRID = [(mode, activation) for mode in MODES for activation in activations_of(mode)]


@DEVICES
@pytest.mark.parametrize(("mode", "activation"), GRID)
def test_modes_and_activations(mode, activation, device):
    case = cl.make(mode, sizes(device), activation, device=device)
    logits = cl.logits_of(case)
    output = cl.call(case, logits=logits)
    assert output.dtype == torch.bfloat16
    cl.judge(case, output, *ref.route("Renormalize", logits, case.sizes.top_k))


@DEVICES
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_numbers_of_tokens(mode, tokens, device):
    tokens = 3072 if device == "cuda" and tokens > 1 else tokens
    case = cl.make(mode, sizes(device, tokens=tokens), seed=3, device=device)
    logits = cl.logits_of(case, dtype=torch.bfloat16)
    output = cl.call(case, logits=logits)
    cl.judge(case, output, *ref.route("Renormalize", logits, case.sizes.top_k))


@pytest.mark.parametrize("mode", ["bf16", "deepseek", "mxfp8", "nvfp4", "mxint4"])
def test_zero_hidden_states_and_no_tokens(mode):
    case = cl.make(mode, zero=mode != "nvfp4", sizes=cl.Sizes(tokens=3))
    if mode == "nvfp4":
        case.arguments["hidden_states"].zero_()
    assert (cl.call(case, logits=cl.logits_of(case)) == 0).all()
    case.arguments["hidden_states"] = case.arguments["hidden_states"][:0]
    if "hidden_states_scale" in case.arguments:
        scale = case.arguments["hidden_states_scale"]
        columns = mode == "deepseek"
        case.arguments["hidden_states_scale"] = scale[:, :0].contiguous() if columns else scale[:0]
    empty = cl.call(case, logits=cl.logits_of(case)[:0])
    assert empty.shape == (0, case.sizes.hidden)


# --- routing

METHODS = [
    ref.Rule("Default"),
    ref.Rule("Renormalize"),
    ref.Rule("RenormalizeNaive"),
    ref.Rule("TopK"),
    ref.Rule("Sigmoid"),
    ref.Rule("SigmoidRenorm"),
    ref.Rule("SigmoidRenorm", renormalise=False),
    ref.Rule("TopKSigmoid"),
    ref.Rule("MiniMax2", scale=2.0, bias="float32"),
    ref.Rule("DeepSeekV3", scale=2.5, bias="float32"),
    ref.Rule("DeepSeekV3", 4, 2, scale=2.5, bias="float32"),
    ref.Rule("DeepSeekV3", 4, 2),
]


@DEVICES
@pytest.mark.parametrize("logits", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", METHODS, ids=lambda r: f"{r.method}-{r.groups}")
@pytest.mark.parametrize("mode", ["bf16", "deepseek"])
def test_routing_methods(mode, rule, logits, device):
    case = cl.make(mode, cl.Sizes(256, 128, 16, 4, 8), device=device)
    rule = replace(rule, logits=logits)
    arguments = cl.routing_by(rule, case)
    ids, weights = rule.route(arguments["logits"], case.sizes.top_k, arguments["bias"])
    replay = torch.full((case.sizes.tokens, case.sizes.top_k), -1, dtype=torch.int16).to(device)
    output = cl.call(case, **arguments, routing_replay_out=replay)
    assert (replay.cpu().long() == ids).all()
    cl.judge(case, output, ids, weights)


def test_llama4_weights_on_the_input():
    case = cl.make("per_tensor", cl.Sizes(top_k=1, tokens=5))
    logits = cl.logits_of(case) - 1.5
    ids, weights = ref.route("Llama4", logits, 1)
    changes = {"routing_method_type": METHOD.Llama4, "use_routing_scales_on_input": True}
    output = cl.call(case, logits=logits, **changes)
    cl.judge(case, output, ids, weights, on_input=True)
    pair = (ids.int(), weights.float())
    cl.judge(case, cl.call(case, routed=pair, **changes), ids, weights, on_input=True)


def test_weights_come_from_the_unbiased_sigmoid():
    case = cl.make("bf16", cl.Sizes(256, 128, 16, 4, 6))
    logits = torch.full((6, 16), -15.5)
    arguments = {
        "logits": logits,
        "bias": torch.full((16,), 12.0),
        "routing_method_type": METHOD.MiniMax2,
        "routed_scaling_factor": 2.5,
    }
    _, weights, _ = cl.call(case, do_finalize=False, **arguments)
    torch.testing.assert_close(weights.float().sum(-1), torch.full((6,), 2.5), rtol=0.01, atol=0)


def test_saturating_logits_are_ranked_by_themselves():
    case = cl.make("bf16", cl.Sizes(256, 128, 16, 2, 1))
    logits = torch.arange(16.0)[None] + 20
    replay = torch.zeros(1, 2, dtype=torch.int16)
    changes = {"logits": logits, "routing_replay_out": replay}
    cl.call(case, routing_method_type=METHOD.TopKSigmoid, **changes)
    assert replay.tolist() == [[15, 14]]
    cl.call(case, routing_method_type=METHOD.Sigmoid, **changes)
    assert replay.tolist() == [[0, 1]]


@DEVICES
@pytest.mark.parametrize("kind", ["packed", "float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_routed_operations(mode, kind, device):
    case = cl.make(mode, sizes(device), device=device)
    logits = cl.logits_of(case)
    ids, weights = ref.route("Renormalize", logits, case.sizes.top_k)
    weights[0, 0] *= -1  # a negative weight must not disturb its id
    replay = torch.full((case.sizes.tokens + 3, case.sizes.top_k), -7, dtype=torch.int16).to(device)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weights = weights.to(dtype)
    given = (ids.int().to(device), weights.to(device))
    if kind == "packed":
        given = fi.pack_topk_ids(*given)
    plain = cl.call(case, routed=given)
    cl.judge(case, plain, ids, weights)
    output = cl.call(case, routed=given, routing_replay_out=replay)
    cl.same(plain, output)
    assert (replay[:-3].cpu().long() == ids).all()
    assert (replay[-3:] == -7).all()


@DEVICES
@pytest.mark.parametrize("mode", MODES)
def test_expert_parallel_ranks_sum_to_the_whole(mode, device):
    case = cl.make(mode, cl.Sizes(256, 128, 8, 4, 8), device=device)
    logits = cl.logits_of(case)
    ids, weights = ref.route("Renormalize", logits, 4)
    changes = {"local_num_experts": 4}
    total = 0
    for offset in (0, 4):
        part = cl.make(mode, cl.Sizes(256, 128, 8, 4, 8), device=device)
        for name, array in cl.arrays_of_experts(case).items():
            part.arguments[name] = array[offset : offset + 4].contiguous()
        changes["local_expert_offset"] = offset
        output = cl.call(part, logits=logits, **changes)
        packed = fi.pack_topk_ids(ids.int(), weights.float()).to(device)
        by_ids = cl.call(part, routed=packed, **changes)
        assert ref.worst_row(by_ids.cpu(), output.cpu()) < 0.02
        assert (output != 0).any()
        total = total + output.float()
    cl.judge(case, total.bfloat16(), ids, weights)


@DEVICES
def test_a_scale_beside_bf16_hidden_states_is_a_placeholder(device):
    """As vLLM hands it over for gpt-oss."""
    case = cl.make("mxfp4_bf16", cl.Sizes(256, 128, 4, 2, 8), device=device)
    logits = cl.logits_of(case)
    usual = cl.call(case, logits=logits)
    for scale in (torch.empty(0), torch.full((3,), float("nan")), torch.zeros(8, 8).byte()):
        cl.same(cl.call(case, logits=logits, hidden_states_scale=scale.to(device)), usual)


@DEVICES
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4_mxfp8"])
def test_scales_of_hidden_states_may_be_one_row(mode, device):
    case = cl.make(mode, cl.Sizes(256, 128, 4, 2, 8), device=device)
    logits, scale = cl.logits_of(case), case.arguments["hidden_states_scale"]
    assert scale.dim() == 2
    usual = cl.call(case, logits=logits)
    cl.same(cl.call(case, logits=logits, hidden_states_scale=scale.reshape(-1)), usual)


@DEVICES
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_with_an_offset_is_one_with_other_ids(mode, device):
    sizes = cl.Sizes(1024, 1024, 4, 2, 8) if device == "cuda" else cl.Sizes(256, 128, 4, 2, 8)
    case = cl.make(mode, sizes, device=device)
    ids = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1).int().to(device)
    weights = torch.full((8, 2), 0.5, device=device)
    usual = {"num_experts": 8, "local_num_experts": 4}
    first = cl.call(case, routed=(ids, weights), local_expert_offset=0, **usual)
    second = cl.call(case, routed=(ids + 4, weights), local_expert_offset=4, **usual)
    cl.same(first, second)
    assert (first != 0).any(1).all()
    assert (cl.call(case, routed=(ids, weights), local_expert_offset=4, **usual) == 0).all()


@DEVICES
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("mode", ["deepseek", "deepseek_blocks", "mxfp8", *FP4])
def test_shared_experts(mode, shared, device):
    whole = cl.Sizes(256, 128, 16 + shared, 2, 8)
    case = cl.make(mode, whole, device=device)
    logits = cl.logits_of(case)[:, :16].contiguous()
    ids, weights = ref.route("DeepSeekV3", logits, 2, groups=4, kept=2, scale=2.5)
    changes = {
        "num_experts": 16,
        "local_num_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "routing_method_type": METHOD.DeepSeekV3,
        "routed_scaling_factor": 2.5,
        "num_fused_shared_experts": shared,
    }
    replay = torch.zeros(8, 2, dtype=torch.int16, device=device)
    output = cl.call(case, logits=logits, routing_replay_out=replay, **changes)
    assert (replay.cpu().long() == ids).all()
    more = torch.arange(16, 16 + shared).expand(8, shared)
    ids = torch.cat([ids, more], 1)
    weights = torch.cat([weights, torch.ones(8, shared)], 1)
    cl.judge(case, output, ids, weights)
    rows, given, place = cl.call(case, logits=logits, do_finalize=False, **changes)
    assert given.shape == ids.shape
    assert (given[:, 2:] == 1).all()
    summed = (rows.float()[place.view(8, -1).long()] * given.float()[..., None]).sum(1)
    assert ref.worst_row(summed.cpu(), output.cpu().float()) < 0.02


# --- biases and parameters


@DEVICES
@pytest.mark.parametrize("activation", ["swiglu", "situ"])
@pytest.mark.parametrize("mode", FP4)
def test_biases(mode, activation, device):
    case = cl.make(mode, activation=activation, bias=True, device=device)
    logits = cl.logits_of(case)
    output = cl.call(case, logits=logits)
    cl.judge(case, output, *ref.route("Renormalize", logits, 2))
    without = cl.call(case, logits=logits, gemm1_bias=None)
    assert (without.float() - output.float()).abs().max() > 1e-3


PARAMETERS = [
    {"alpha": [1.702] * 8, "beta": [1.0] * 8, "limit": [0.7] * 8},
    {"alpha": [0.5, 1, 2, 3, 1, 1, 1, 4]},
    {"limit": [0.1, 0.2, 0.3, 0.5, 1, 2, 3, 9]},
    {"beta": [0.0, 1, -1, 2, 0, 0, 0.5, 0]},
]


@DEVICES
@pytest.mark.parametrize("options", PARAMETERS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("mode", [m for m in MODES if m != "per_tensor"])
def test_parameters_of_swiglu(mode, options, device):
    case = cl.make(mode, device=device, **options)
    logits = cl.logits_of(case)
    output = cl.call(case, logits=logits)
    cl.judge(case, output, *ref.route("Renormalize", logits, 2))
    plain = {"gemm1_alpha": None, "gemm1_beta": None, "gemm1_clamp_limit": None}
    default = cl.call(case, logits=logits, **plain)
    assert (default.float() - output.float()).abs().max() > 1e-3
    ones = torch.ones(8, device=device)
    neutral = {
        "gemm1_alpha": ones,
        "gemm1_beta": ones * 0,
        "gemm1_clamp_limit": ones * torch.finfo(torch.float32).max,
    }
    cl.same(default, cl.call(case, logits=logits, **neutral))


@pytest.mark.parametrize("mode", FP4)
def test_parameters_of_situ(mode):
    case = cl.make(mode, activation="situ", alpha=[4.0] * 8, beta=[25.0] * 8, limit=[0.9] * 8)
    logits = cl.logits_of(case)
    cl.judge(case, cl.call(case, logits=logits), *ref.route("Renormalize", logits, 2))


@DEVICES
@pytest.mark.parametrize("mode", [m for m in MODES if m not in ("per_tensor", "deepseek")])
def test_lora_delta(mode, device):
    case = cl.make(mode, bias=mode in FP4, device=device)
    logits = cl.logits_of(case)
    ids, weights = ref.route("Renormalize", logits, 2)
    delta = cl.normal((8, 2, 2 * case.sizes.inter), 20, 0.5)
    packed = (ids.int().to(device), weights.float().to(device))
    arguments = {"routed": packed, "gemm1_lora_delta": delta.to(device)}
    output, place, inner = cl.call(case, **arguments)
    cl.judge(case, output, ids, weights, delta=delta)
    assert place.shape == (16,)
    assert place.dtype == torch.int32
    assert inner.shape == (16, case.sizes.inter)
    rows, given, place2, inner2 = cl.call(case, do_finalize=False, **arguments)
    assert given.dtype == torch.float32
    assert rows.shape == (16, case.sizes.hidden)
    cl.same(inner, inner2)
    assert (place == place2).all()


# --- results


@DEVICES
@pytest.mark.parametrize("mode", MODES)
def test_unfinalised_rows(mode, device):
    case = cl.make(mode, device=device)
    logits = cl.logits_of(case)
    output = cl.call(case, logits=logits)
    rows, weights, place = cl.call(case, logits=logits, do_finalize=False)
    assert weights.dtype == rows.dtype == torch.bfloat16
    assert place.shape == (16,)
    picked = rows.float()[place.view(8, 2).long()]
    summed = (picked * weights.float()[..., None]).sum(1)
    assert ref.worst_row(summed, output.float()) < 0.02
    half = {"local_num_experts": 4}
    part = {name: array[:4].contiguous() for name, array in cl.arrays_of_experts(case).items()}
    _, _, place = cl.call(case, logits=logits, do_finalize=False, **half, **part)
    ids, _ = ref.route("Renormalize", logits, 2)
    assert ((place.view(8, 2).cpu() == -1) == (ids >= 4)).all()


@pytest.mark.parametrize("mode", FP4)
def test_narrow_and_given_outputs(mode):
    case = cl.make(mode)
    logits = cl.logits_of(case)
    whole = cl.call(case, logits=logits)
    narrow = torch.full((8, 200), 7.0).bfloat16()
    result = cl.call(case, logits=logits, output=narrow)
    assert result is narrow
    cl.same(narrow, whole[:, :200].contiguous())


def test_lists_and_single_results():
    for mode, listed in (("nvfp4", True), ("mxint4", True), ("bf16", False), ("mxfp8", False)):
        case = cl.make(mode)
        name = cl.OPERATIONS.get(mode, "trtllm_fp4_block_scale") + "_moe"
        arguments = {**case.arguments, **cl.routing_of(case.sizes)}
        result = getattr(fi, name)(
            routing_logits=cl.logits_of(case), routing_bias=None, **arguments
        )
        assert isinstance(result, list) == listed


@pytest.mark.parametrize("mode", MODES)
def test_numpy_arrays_give_the_bits_of_torch(mode):
    case = cl.make(mode)
    logits = cl.logits_of(case)
    wanted = cl.call(case, logits=logits)

    def as_numpy(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.bfloat16:
            return value.view(torch.uint16).numpy()
        return (value.view(torch.uint8) if value.element_size() == 1 else value).numpy()

    arguments = {name: as_numpy(value) for name, value in case.arguments.items()}
    name = cl.OPERATIONS.get(mode, "trtllm_fp4_block_scale") + "_moe"
    result = getattr(fi, name)(
        routing_logits=logits.numpy(), routing_bias=None, **arguments, **cl.routing_of(case.sizes)
    )
    result = result[0] if isinstance(result, list) else result
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, cl.bits(wanted))


# --- kernels

NVFP4 = fi.DtypeTrtllmGen.E2m1
SMALL = (NVFP4, NVFP4, fi.Fp8QuantizationType.NoneFp8, 2, 1024, 1024, 16)
SMALL += (fi.ActivationType.Swiglu, True, fi.WeightLayout.MajorK, False)


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_small_problem_has_the_smallest_tile(device, tokens, monkeypatch):
    """FlashInfer's test of its small NVFP4 problem, which wants its smallest tile, 8. Ours are 16
    rows on Hopper and one on a CPU."""
    if device == "cuda" and not has_gpu_backend():
        pytest.skip("a library without GPU kernels")
    monkeypatch.setattr(tuning, "_device", lambda: device)
    problem = (*SMALL, tokens)
    configs = fi.trtllm_get_valid_moe_configs(*problem)
    tiles = {tile for tile, _ in configs}
    smallest = 16 if device == "cuda" else 1
    assert min(tiles) == smallest
    assert device == "cpu" or {16, 32, 64} <= tiles
    name = fi.trtllm_moe_tactic_name([smallest, -1], *problem)
    assert name in {fi.trtllm_moe_tactic_name(config, *problem) for config in configs}
    with pytest.raises(RuntimeError, match="missing MoE launcher for tile_N=8; wanted one of"):
        fi.trtllm_moe_tactic_name([8, 0], *problem)


@pytest.mark.skipif(not cl.CUDA, reason="no GPU, or a library without its kernels")
def test_the_smallest_tile_runs_the_small_problem():
    case = cl.make("nvfp4", cl.Sizes(1024, 1024, 16, 2, 32), device="cuda")
    logits = cl.logits_of(case)
    with fi.forced_tactic(fi.trtllm_moe_tactic_name([16, -1], *SMALL, 32)):
        output = cl.call(case, logits=logits)
    cl.judge(case, output, *ref.route("Renormalize", logits, 2))
