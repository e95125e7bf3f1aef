# SPDX-License-Identifier: Apache-2.0
"""Bad input of FlashInfer's operations: one case for each row of the specification's section 7.

But the first, the GPU's compute capability: tests/device_test.cc.
"""

from __future__ import annotations

import contextlib
import re

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import compat_layers as cl
import compat_reference as ref
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from elsewhere import has_gpu_backend
from hopyard.compat.flashinfer import tuning as fi_tuning
from hopyard.compat.flashinfer.checks import MissingArgument

A, N, R, V = AssertionError, NotImplementedError, RuntimeError, ValueError
METHOD, ACTIVATION, LAYOUT = fi.RoutingMethodType, fi.ActivationType, fi.WeightLayout
F8 = fi.Fp8QuantizationType
GROUPED = {
    "routing_method_type": METHOD.DeepSeekV3,
    "n_group": 4,
    "topk_group": 2,
    "num_experts": 16,
    "local_num_experts": 16,
}
SHARED = {**GROUPED, "num_fused_shared_experts": 2}


@pytest.fixture(scope="module")
def cases():
    """Cases by mode, made when needed; tests change copies of their arguments."""
    made = {}

    def get(mode):
        if mode not in made:
            experts = 18 if mode.endswith("+2") else 16
            made[mode] = cl.make(mode.removesuffix("+2"), cl.Sizes(256, 128, experts, 2, 4))
        return made[mode]

    return get


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


def arguments_of(cases, mode):
    """(function, arguments) of a mode; "x routed" has ids instead of logits."""
    kind, _, routed = mode.partition(" ")
    case = cases(kind)
    name = cl.OPERATIONS.get(case.mode, "trtllm_fp4_block_scale")
    sizes = cl.Sizes(256, 128, 16, 2, 4)
    arguments = {**case.arguments, **cl.routing_of(sizes), "output": None}
    if routed:
        name += "_routed_moe"
        arguments["topk_ids"] = (torch.zeros(4, 2, dtype=torch.int32), ones(4, 2))
        if name not in cl.NO_BIAS:
            arguments["routing_bias"] = None
    else:
        name += "_moe"
        arguments |= {"routing_logits": torch.zeros(4, 16), "routing_bias": None}
    return getattr(fi, name), arguments


def int16(*shape):
    return torch.zeros(shape, dtype=torch.int16)


def strided(tensor):
    """The same values with gaps between rows."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., :-1] = tensor
    return wide[..., :-1]


def changed(name, change):
    """An argument that follows from the right one."""
    return lambda a: {name: change(a[name])}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


ROWS = [
    # row, mode, changes, class, part of the message
    (2, "bf16", {"routing_logits": None}, R, "either topk_ids or routing_logits"),
    (2, "nvfp4 routed", {"topk_ids": None}, A, "either topk_ids or routing_logits"),
    (3, "bf16", {"routing_logits": torch.zeros(4, 16).half()}, R, "must be float or bfloat16"),
    (4, "nvfp4", {"routing_logits": torch.zeros(64)}, R, "routing_logits must be 2D"),
    (4, "nvfp4", {"routing_logits": torch.zeros(3, 16)}, R, "same number of tokens; got 3 and 4"),
    (4, "mxint4", {"routing_logits": torch.zeros(4, 15)}, R, "dim1 must match num_experts=16"),
    (5, "bf16", {"routing_bias": ones(16).double()}, R, "routing_bias must be"),
    (5, "bf16", {"routing_bias": ones(16, 1)}, R, "routing_bias must be 1D"),
    (5, "deepseek", {"routing_bias": ones(15)}, R, "routing_bias has incorrect shape"),
    (6, "bf16", {"top_k": 0}, R, "top_k must be between 1 and num_experts=16; got 0"),
    (6, "nvfp4", {"top_k": 17}, R, "top_k must be between 1 and num_experts=16; got 17"),
    (7, "bf16", {"local_num_experts": 0}, R, "local_num_experts must be between 1 and"),
    (7, "bf16", {"local_num_experts": 17}, R, "local_num_experts must be between 1 and"),
    (8, "bf16", {"local_expert_offset": 1}, R, "expert offset and count must be within valid"),
    (8, "bf16", {"local_expert_offset": -1}, R, "expert offset and count must be within valid"),
    (9, "bf16", changed("hidden_states", lambda t: t[None]), R, "hidden_states must be 2D"),
    (10, "bf16", changed("hidden_states", lambda t: t.float()), R, "hidden_states must be bfl"),
    (10, "mxint4", changed("hidden_states", lambda t: t.half()), R, "hidden_states must be bf16"),
    (10, "nvfp4", changed("hidden_states", lambda t: t.float()), R, "hidden_states must be bf"),
    (11, "bf16", changed("gemm1_weights", lambda t: t.half()), R, "gemm1_weights must be bf"),
    (11, "deepseek", changed("gemm2_weights", lambda t: t.half()), R, "gemm2_weights must be fl"),
    (12, "bf16", changed("gemm1_weights", lambda t: t[:, :, :-1]), R, "rows must be even"),
    (12, "deepseek", {"intermediate_size": 256}, R, "intermediate_size has incorrect shape"),
    (13, "bf16", changed("gemm1_weights", lambda t: t[:, :-1]), R, "K dimension must be equal"),
    (13, "deepseek", changed("gemm2_weights", lambda t: t[..., :-8]), R, "to intermediate_size"),
    (14, "bf16", {"weight_layout": 3}, R, "value of weight_layout is not recognized: got 3"),
    (14, "deepseek", {"weight_layout": -1}, R, "value of weight_layout is not recognized"),
    (14, "deepseek", {"weight_layout": LAYOUT.MajorMn}, N, "Unsupported weight_layout"),
    (15, "bf16", {"weight_layout": LAYOUT.MajorK}, R, "weight_layout must be BlockMajorK"),
    (16, "bf16", {"intermediate_size": 96}, R, "intermediate_size must be a multiple of 128"),
    (16, "deepseek", {"intermediate_size": 96}, R, "intermediate_size must be a multiple of 128"),
    (17, "deepseek", {"hidden_states_scale": ones(1, 4)}, R, "dim0 must match hidden_states dim1"),
    (17, "deepseek", {"hidden_states_scale": ones(2, 3)}, R, "dim1 must match hidden_states dim0"),
    (17, "deepseek", {"hidden_states_scale": ones(2, 4).double()}, R, "must be float"),
    (17, "deepseek", {"gemm1_weights_scale": ones(16, 1, 2)}, R, "gemm1_weights_scale has inc"),
    (18, "mxfp8", {"gemm1_weights_scale": ones(16, 256, 8)}, R, "must be uint8"),
    (18, "mxfp8", {"use_shuffled_weight": False}, R, "use_shuffled_weight must be true for MxFp8"),
    (18, "mxfp8", {"weight_layout": LAYOUT.BlockMajorK}, R, "weight_layout must be 0 for MxFp8"),
    (19, "deepseek", {"fp8_quantization_type": F8.NoneFp8}, N, "only supports DeepSeekFp8 or MxF"),
    (20, "deepseek", {"activation_type": ACTIVATION.Geglu}, N, "only supports ActivationType::Sw"),
    (21, "bf16", {"gemm1_alpha": ones(16), "activation_type": 4}, V, "only supported for Activat"),
    (21, "mxfp8", {"gemm1_beta": ones(16), "activation_type": 4}, V, "only supported for Activat"),
    (22, "deepseek", {"gemm1_alpha": ones(16), "fp8_quantization_type": 0}, V, "Type.MxFp8"),
    (23, "bf16", {"gemm1_alpha": ones(15)}, V, "gemm1_alpha must have shape"),
    (23, "bf16", {"gemm1_beta": ones(16).double()}, V, "gemm1_beta must be float32"),
    (23, "bf16", {"gemm1_beta": ones(32)[::2]}, V, "gemm1_beta must be contiguous"),
    (23, "bf16", {"gemm1_clamp_limit": meta(16)}, V, "gemm1_clamp_limit must be on the same"),
    (23, "mxint4", {"gemm1_alpha": ones(15)}, R, "gemm1_alpha must have shape"),
    (24, "bf16", {"activation_type": 11}, R, "Invalid activation type: 11"),
    (24, "nvfp4", {"activation_type": -1}, R, "Invalid activation type: -1"),
    (25, "bf16", {"activation_type": 8}, R, "Unsupported gated activation type GegluTanh"),
    (25, "mxfp8", {"activation_type": 2}, R, "Unsupported eltwise activation type Silu"),
    (26, "deepseek", {"n_group": 4}, R, "only supports n_group <= 1"),
    (27, "deepseek", {**GROUPED, "n_group": 0}, R, "n_group should not be zero"),
    (27, "deepseek", {**GROUPED, "topk_group": 0}, R, "topk_group must be given"),
    (28, "deepseek", {**GROUPED, "n_group": 3}, R, "must be divisible by n_group=3"),
    (29, "deepseek", {**GROUPED, "top_k": 9}, R, "only supports top_k<=8; got 9"),
    (30, "deepseek", {**GROUPED, "n_group": 8, "topk_group": 5}, R, "topk_group<=4"),
    (30, "deepseek", {**GROUPED, "n_group": 2, "topk_group": 4}, R, "not be smaller than topk_gr"),
    (31, "deepseek", {**GROUPED, "topk_group": 1, "top_k": 4}, R, "less than total number of exp"),
    (32, "deepseek", {"num_experts": 64, "top_k": 33, "local_num_experts": 16}, R, "top_k<=32"),
    (33, "nvfp4", {"routing_method_type": METHOD.Llama4}, R, "top_k=1"),
    (33, "bf16 routed", {"routing_method_type": METHOD.Llama4}, R, "top_k=1"),
    (34, "deepseek", {"num_experts": 18}, R, "divisible by 4"),
    (34, "deepseek", {"top_k": 16}, R, "greater than top_k"),
    (36, "bf16", {"routing_method_type": METHOD.Unspecified}, R, "Unimplemented routing method"),
    (36, "nvfp4", {"routing_method_type": 99}, R, "Unimplemented routing method: 99"),
    (37, "deepseek+2", {**SHARED, "local_num_experts": 8}, V, "expert parallelism"),
    (37, "nvfp4+2", {**SHARED, "local_num_experts": 8}, V, "expert parallelism"),
    (38, "nvfp4+2", {**SHARED, "routing_method_type": 1}, V, "only supported with DeepSeekV3"),
    (39, "nvfp4+2", {**SHARED, "n_group": 1}, R, "fusing shared experts"),
    (41, "nvfp4", SHARED, R, "gemm1 weights dim 0"),
    (42, "bf16", {"routing_replay_out": torch.zeros(4, 2)}, V, "must be int16; got float32"),
    (42, "nvfp4", {"routing_replay_out": int16(8)}, V, "routing_replay_out must be 2D"),
    (42, "mxint4", {"routing_replay_out": int16(4, 3)}, V, "dim1 must equal top_k=2; got 3"),
    (42, "deepseek", {"routing_replay_out": int16(4, 4)[:, ::2]}, V, "contiguous"),
    (42, "bf16", {"routing_replay_out": meta(4, 2, dtype=torch.int16)}, R, "same device"),
    (42, "bf16", {"routing_replay_out": int16(3, 2)}, V, "at least num_tokens=4 rows; got 3"),
    (43, "bf16 routed", {"topk_ids": int16(4, 2).long()}, R, "must be an int32 tensor; got int64"),
    (43, "nvfp4 routed", {"topk_ids": (int16(4, 2).long(), ones(4, 2))}, A, "an int32 tensor"),
    (44, "bf16 routed", {"topk_ids": int16(3, 2).int()}, R, "same number of tokens; got 3 and 4"),
    (44, "mxint4 routed", {"topk_ids": int16(4, 3).int()}, R, "dim1 must match top_k=2; got 3"),
    (45, "bf16 routed", {"topk_ids": (int16(4, 2).int(), None)}, A, "must be bfloat16 or float32"),
    (45, "bf16 routed", {"topk_ids": (int16(4, 2).int(), ones(4, 2).half())}, R, "or float32"),
    (45, "bf16 routed", {"topk_ids": (int16(4, 2).int(), ones(4, 3))}, R, "expert_weights has inc"),
    (46, "per_tensor routed", {"topk_ids": int16(4, 4).int()[:, ::2]}, R, "must be contiguous"),
    (46, "per_tensor routed", {"topk_ids": meta(4, 2, dtype=torch.int32)}, R, "same device"),
    (47, "bf16", {"output": ones(4, 255, dtype=torch.bfloat16)}, V, "output must have shape"),
    (47, "bf16", {"output": ones(4, 256)}, V, "output must be bfloat16"),
    (47, "nvfp4", {"output": ones(4, 257, dtype=torch.bfloat16)}, A, "output must have shape"),
    (47, "bf16", {"output": meta(4, 256, dtype=torch.bfloat16)}, V, "output must be on the same"),
    (48, "nvfp4", {"output1_scale_scalar": None}, R, "output1_scales_scalar is required"),
    (48, "mxfp4_e4m3", {"output2_scale_scalar": None}, R, "output2_scales_scalar is required"),
    (48, "per_tensor", {"output1_scales_gate_scalar": None}, R, "gate_scalar is required"),
    (48, "per_tensor", {"output1_scales_scalar": ones(16, 1)}, R, "scalar must be 1D"),
    (48, "nvfp4", {"output1_scale_scalar": ones(15)}, R, "incorrect dim 0, got 15, wanted 16"),
    (48, "nvfp4", {"output1_scale_scalar": ones(16).half()}, R, "scalar must be float; got fl"),
    (49, "nvfp4", {"hidden_states_scale": None}, R, "must be provided for fp4 activation"),
    (50, "nvfp4", changed("hidden_states_scale", lambda t: t[:, :3]), N, "Unsupported hidden stat"),
    (
        51,
        "mxfp4_mxfp8",
        changed("hidden_states", lambda t: t.view(torch.uint8)[:, :128].clone()),
        R,
        "supported by block scale MoE",
    ),
    (51, "nvfp4", {"hidden_states": ones(4, 256, dtype=torch.bfloat16)}, R, "block scale MoE"),
    (52, "nvfp4", changed("gemm2_weights_scale", lambda t: t[:-1]), R, "scale tensor too small"),
    (52, "mxfp4_bf16", changed("gemm1_weights_scale", lambda t: t[:-1]), R, "scale tensor too sm"),
    (53, "nvfp4", changed("gemm1_weights", lambda t: t.view(torch.int8)), R, "packed in uint8"),
    (53, "mxint4", changed("gemm2_weights", lambda t: t.view(torch.int8)), R, "packed in uint8"),
    (54, "mxint4", changed("hidden_states", lambda t: t.float()), R, "hidden_states must be bf16"),
    (54, "mxint4", changed("gemm1_weights_scale", lambda t: t.half()), R, "must be bf16"),
    (54, "mxint4", changed("gemm1_weights_scale", lambda t: t[:-1]), N, "unsupported weight_scale"),
    (55, "mxfp4_bf16", {"per_token_scale": ones(4)}, R, "only support NvFP4 x NvFP4 when using"),
    (56, "bf16 routed", {"gemm1_lora_delta": ones(4, 2, 256)}, R, "gemm1_bias must be bfloat16"),
    (
        56,
        "bf16 routed",
        {"gemm1_lora_delta": ones(4, 2, 255, dtype=torch.bfloat16)},
        R,
        "shape [num_tokens, top_k, 2 * intermediate_size]",
    ),
    (
        56,
        "deepseek routed",
        {"gemm1_lora_delta": ones(4, 2, 256, dtype=torch.bfloat16)},
        R,
        "useShuffledMatrix=true",
    ),
]
# What FlashInfer does not check, and goes wrong.
UNCHECKED = [
    ("El", "bf16", changed("gemm1_weights", lambda t: t[:8]), R, "gemm1_weights dim0 must match"),
    ("gaps", "bf16", {"routing_logits": strided(torch.zeros(4, 16))}, R, "must be contiguous"),
    ("gaps", "bf16", changed("hidden_states", strided), R, "hidden_states must be contiguous"),
    ("gaps", "nvfp4", changed("gemm1_weights", strided), R, "gemm1_weights must be contiguous"),
    ("I", "nvfp4", {"intermediate_size": -128}, R, "intermediate_size must be positive"),
    ("place", "bf16", {"routing_logits": meta(4, 16)}, R, "same device"),
    ("place", "bf16 routed", {"topk_ids": (int16(4, 2).int(), meta(4, 2))}, R, "same device"),
    ("place", "nvfp4", {"gemm1_alpha": meta(16)}, R, "same device"),
    ("bias", "nvfp4", {"gemm1_bias": ones(15, 256)}, R, "gemm1_bias dim 0"),
    ("bias", "nvfp4", {"gemm2_bias": ones(16, 255)}, R, "gemm2_bias dim 1 must be 256"),
    ("scale", "nvfp4", {"output1_scale_gate_scalar": ones(16) * 0}, R, "wanted a finite number"),
    ("ones", "mxfp4_bf16", {"output2_scale_scalar": ones(16) * 2}, N, "values other than 1"),
    ("factor", "bf16", {"routing_method_type": METHOD.MiniMax2, "routed_scaling_factor": 0.0}, R,
     "scaling_factor=0"),
    ("array", "bf16", {"hidden_states": None}, A, "hidden_states is required"),
    ("array", "bf16", {"gemm1_weights": [1]}, R, "gemm1_weights is a list"),
]  # fmt: skip


def refuse(cases, mode, changes, error, part):
    function, arguments = arguments_of(cases, mode)
    arguments |= changes(arguments) if callable(changes) else changes
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert part in message
    return message, arguments


@pytest.mark.parametrize(("row", "mode", "changes", "error", "part"), ROWS)
def test_rows_of_section_7_1(row, mode, changes, error, part, cases):
    message, arguments = refuse(cases, mode, changes, error, part)
    # FlashInfer's C++ has names of its own for two arguments.
    names = (*arguments, "expert_weights", r"\w+_scales_scalar")
    assert any(re.search(rf"\b{name}\b", message) for name in names)


@pytest.mark.parametrize(("what", "mode", "changes", "error", "part"), UNCHECKED)
def test_what_flashinfer_does_not_check(what, mode, changes, error, part, cases):
    refuse(cases, mode, changes, error, part)


def fakes(*tensors):
    """Tensors as torch.compile's tracing gives them: a device, no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return [mode.from_tensor(tensor) for tensor in tensors]


ARRAYS = [
    ("bf16", "hidden_states"),
    ("bf16", "gemm2_weights"),
    ("bf16", "routing_logits"),
    ("deepseek", "gemm1_weights_scale"),
    ("deepseek", "hidden_states_scale"),
    ("mxfp8", "hidden_states"),
    ("nvfp4", "gemm1_weights"),
    ("nvfp4", "output1_scale_scalar"),
    ("mxfp4_bf16 routed", "gemm2_weights_scale"),
    ("per_tensor", "hidden_states"),
    ("mxint4 routed", "gemm1_weights"),
]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("mode", "name"), ARRAYS)
def test_tensors_without_memory(mode, name, tuned, cases):
    function, arguments = arguments_of(cases, mode)
    fake = {name: fakes(arguments[name])[0]}
    everywhere = {
        key: value.to("meta") for key, value in arguments.items() if isinstance(value, torch.Tensor)
    }
    with fi.autotune() if tuned else contextlib.nullcontext():
        with pytest.raises(RuntimeError, match=f"{name} is a fake tensor.*hopyard.torch_ops"):
            function(**(arguments | fake))
        with pytest.raises(RuntimeError, match=r"is a meta tensor.*hopyard\.torch_ops"):
            function(**(arguments | everywhere))


def test_routing_without_memory():
    scores, ids = fakes(torch.zeros(4, 16), torch.zeros(4, 2).int())
    with pytest.raises(ValueError, match="routing_logits is a fake tensor"):
        fi.trtllm_gen_routing(scores, None, METHOD.Default, 2)
    with pytest.raises(RuntimeError, match="scores is a meta tensor"):
        fi.fused_topk_deepseek(meta(4, 16), meta(16), 4, 2, 2, 1.0, meta(4, 2), meta(4, 2).int())
    with pytest.raises(ValueError, match="ids is a fake tensor"):
        fi.pack_topk_ids(ids, torch.ones(4, 2))
    with pytest.raises(ValueError, match="weights is a fake tensor"):
        fi.pack_topk_ids(torch.zeros(4, 2).int(), *fakes(torch.ones(4, 2)))
    with pytest.raises(ValueError, match="topk_ids is a fake tensor"):
        fi.trtllm_moe_allocate_routing_metadata(
            ids, num_experts=16, top_k=2, local_expert_offset=0, num_local_experts=16, tile_n=8,
            routing_input_mode=fi.RoutingInputMode.PackedPrecomputed,
        )  # fmt: skip


def test_compiled_code_breaks_around_the_operations(cases):
    function, arguments = arguments_of(cases, "bf16")

    def layer(x):
        return function(**(arguments | {"hidden_states": x + 0})) * 2

    def selection(x):
        values, ids = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int32)
        fi.fused_topk_deepseek(x + 0, ones(16), 4, 2, 2, 1.0, values, ids)
        return values * 2

    for call, given in ((layer, arguments["hidden_states"]), (selection, torch.randn(4, 16))):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(call, backend="eager", fullgraph=True)(given)
    torch._dynamo.reset()
    cl.same(torch.compile(selection, backend="eager")(given), selection(given))


SHARED_EXTENTS = [
    ("gemm1_weights", "gemm1 weights dim 0"),
    ("gemm2_weights", "gemm2 weights dim 0"),
    ("gemm1_weights_scale", "weight scale tensor too small"),
    ("gemm2_weights_scale", "weight scale tensor too small"),
    ("output1_scale_scalar", "output1_scales_scalar dim 0"),
    ("output1_scale_gate_scalar", "output1_scales_gate_scalar dim 0"),
    ("output2_scale_scalar", "output2_scales_scalar dim 0"),
    ("gemm1_alpha", "gemm1_alpha must have shape"),
    ("gemm1_bias", "gemm1_bias dim 0"),
    ("gemm2_bias", "gemm2_bias dim 0"),
]


@pytest.mark.parametrize(("name", "part"), SHARED_EXTENTS)
def test_row_41_extents_of_the_routed_experts_only(name, part, cases):
    right = {"gemm1_alpha": ones(18), "gemm1_bias": ones(18, 256), "gemm2_bias": ones(18, 256)}
    function, arguments = arguments_of(cases, "nvfp4+2")
    function(**(arguments | SHARED | right))
    short = {name: (arguments | right)[name][:16].contiguous()}
    with pytest.raises(RuntimeError) as caught:
        function(**(arguments | SHARED | right | short))
    assert part in str(caught.value)


def test_row_56_needs_a_gate():
    case = cl.make("bf16", cl.Sizes(256, 128, 4, 2, 4), "relu2")
    delta = ones(4, 2, 256, dtype=torch.bfloat16)
    ids = (torch.zeros(4, 2, dtype=torch.int32), ones(4, 2))
    with pytest.raises(RuntimeError, match="requires a gated activation; got Relu2"):
        cl.call(case, routed=ids, gemm1_lora_delta=delta)


def test_rows_35_and_40_are_lifted(cases):
    replay = int16(4, 2)
    function, arguments = arguments_of(cases, "nvfp4+2")
    function(**(arguments | SHARED | {"routing_replay_out": replay}))
    assert replay.sum() > 0
    case = cl.make("bf16", cl.Sizes(256, 128, 18, 9, 4))  # 18 experts, top 9: in no tier
    assert cl.call(case, logits=torch.zeros(4, 18)).shape == (4, 256)


def test_rows_57_to_59_tactics():
    D = fi.DtypeTrtllmGen
    problem = (D.Bfloat16, D.Bfloat16, F8.NoneFp8, 2, 256, 128, 8, 3, True, 2, False, 16)
    configs = fi.trtllm_get_valid_moe_configs(*problem)
    assert configs
    assert all(len(c) == 2 for c in configs)
    with pytest.raises(RuntimeError, match="expected to be \\[tile_N, config\\]"):
        fi.trtllm_moe_tactic_name([32], *problem)
    with pytest.raises(RuntimeError, match="missing MoE launcher for tile_N=4096"):
        fi.trtllm_moe_tactic_name([4096, 0], *problem)
    with pytest.raises(RuntimeError, match="Invalid MoE tactic 10000000"):
        fi.trtllm_moe_tactic_name([configs[0][0], 10**7], *problem)
    assert fi.trtllm_moe_tactic_name([-1, -1], *problem) == ""
    case = cl.make("bf16", device="cuda" if cl.CUDA else "cpu")
    logits = cl.logits_of(case)
    usual = cl.call(case, logits=logits)
    for config in configs:  # every tactic runs
        with fi.forced_tactic(fi.trtllm_moe_tactic_name(config, *problem)):
            output = cl.call(case, logits=logits)
        assert ref.worst_row(output, usual) < (0.02 if cl.CUDA else 1e-9)
    with (
        fi.forced_tactic("nonsense"),
        pytest.raises(RuntimeError, match="tactic 'nonsense' is no kernel"),
    ):
        cl.call(case, logits=logits)


def test_rows_60_and_61_types():
    codes = torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="scale is None"):
        fi.deduce_trtllm_gen_tensor_dtype(codes, None)
    with pytest.raises(ValueError, match="x has dtype float32"):
        fi.deduce_trtllm_gen_tensor_dtype(codes.float(), None)


def test_wrong_arguments_are_type_errors():
    with pytest.raises(TypeError, match="missing required arguments: routing_bias, hidden_states"):
        fi.trtllm_bf16_moe(None)
    with pytest.raises(TypeError, match="missing required arguments: num_experts, top_k, local"):
        fi.trtllm_moe_allocate_routing_metadata(torch.zeros(4, 2).int())
    with pytest.raises(TypeError, match="unexpected keyword argument 'logits'"):
        fi.trtllm_bf16_moe(logits=None)
    with pytest.raises(TypeError, match="multiple values for argument 'routing_logits'"):
        fi.trtllm_bf16_moe(None, routing_logits=None)
    with pytest.raises(TypeError, match="takes 26 positional arguments but 27 were given"):
        fi.trtllm_bf16_moe(*range(27))


def test_nothing_is_written_by_a_refused_call(cases):
    function, arguments = arguments_of(cases, "bf16")
    output, replay = ones(4, 256, dtype=torch.bfloat16), int16(4, 2) - 5
    arguments |= {"output": output, "routing_replay_out": replay}
    with pytest.raises(RuntimeError):
        function(**(arguments | {"routing_bias": ones(15)}))
    assert (output == 1).all()
    assert (replay == -5).all()


def test_classes():
    assert issubclass(MissingArgument, AssertionError)
    assert issubclass(MissingArgument, RuntimeError)


# --- 7.2 to 7.4: routing operations

ALONE = {"n_group": 1, "topk_group": 1, "topk": 1}
TOPK = [
    ({"routing_replay_out": torch.zeros(4, 2)}, V, "must be int16"),
    ({"routing_replay_out": int16(3, 2)}, V, "must have shape [>= 4, 2]"),
    ({"routing_replay_out": int16(4, 3)}, V, "must have shape [>= 4, 2]"),
    ({"n_group": 1, "topk_group": 1}, V, "topk_group * n_group must be at least topk=2"),
    ({"topk_group": 8}, V, "must not be larger than n_group"),
    ({"topk": 9, "topk_group": 3}, V, "topk must be at most 8"),
    ({"scores": torch.zeros(4, 256), "bias": ones(256)}, V, "wanted at most 32"),
    ({"scores": torch.zeros(4, 256), "bias": ones(256), "n_group": 8, "topk_group": 5}, V, "128"),
    ({"scores": torch.zeros(4, 385), "bias": ones(385), **ALONE}, V, "num_experts must be at most"),
    ({"topk": 9, "n_group": 16, "topk_group": 1}, V, "topk must be at most 8"),
    ({"scores": torch.zeros(4, 128), "bias": ones(128), "n_group": 64}, R, "n_group must be at mo"),
    ({"scores": torch.zeros(4, 512), "bias": ones(512), "n_group": 16}, R, "512 experts in 16"),
    ({"scores": torch.zeros(4, 16).int()}, R, "scores must be float32"),
    ({"bias": ones(16).double()}, R, "bias must be float32"),
    ({"topk_indices": int16(3, 2).int()}, R, "topk_indices has incorrect shape"),
    ({"backend": "triton"}, V, "backend is 'triton'"),
    ({"scores": torch.zeros(64)}, R, "scores must be 2D"),
    ({"bias": ones(15)}, R, "bias has incorrect shape"),
    ({"scores": torch.zeros(4, 18), "bias": ones(18)}, R, "divisible by n_group=4"),
    ({"topk_values": torch.zeros(4, 3)}, R, "topk_values has incorrect shape"),
    ({"topk_values": torch.zeros(4, 2).half()}, R, "must have the dtype of scores"),
    ({"topk_indices": int16(4, 2).long()}, R, "topk_indices must be int32"),
    ({"bias": meta(16)}, R, "same device"),
]


@pytest.mark.parametrize(("changes", "error", "part"), TOPK)
def test_section_7_2_fused_topk_deepseek(changes, error, part):
    arguments = {
        "scores": torch.zeros(4, 16),
        "bias": ones(16),
        "n_group": 4,
        "topk_group": 2,
        "topk": 2,
        "routed_scaling_factor": 1.0,
        "topk_values": torch.zeros(4, 2),
        "topk_indices": torch.zeros(4, 2, dtype=torch.int32),
    }
    with pytest.raises(error) as caught:
        fi.fused_topk_deepseek(**(arguments | changes))
    assert part in str(caught.value)


TABLE = torch.zeros(5, 2, dtype=torch.int32)
HASH = [
    ({"router_logits": torch.zeros(64)}, "router_logits must be 2D float32"),
    ({"router_logits": torch.zeros(4, 16).double()}, "router_logits must be 2D float32"),
    ({"input_ids": torch.zeros(4, dtype=torch.int32)}, "input_ids must be int64 [4]"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids must be int64 [4]"),
    ({"tid2eid": TABLE.long()}, "tid2eid must be 2D int32"),
    ({"num_fused_shared_experts": 2}, "must be 0 or 1"),
    ({"tid2eid": TABLE.repeat(1, 16), "num_fused_shared_experts": 1}, "must be at most 32"),
    ({"num_fused_shared_experts": 1, "routed_scaling_factor": 0.0}, "positive and finite"),
    ({"tid2eid": TABLE[:, :0]}, "topk must be at least 1"),
    ({"router_logits": torch.zeros(4, 0)}, "at least 1 expert"),
    ({"tid2eid": TABLE.T.contiguous().T}, "tid2eid must be contiguous"),
    ({"tid2eid": meta(5, 2, dtype=torch.int32)}, "same device"),
]


@pytest.mark.parametrize(("changes", "part"), HASH)
def test_section_7_3_hash_topk(changes, part):
    arguments = {
        "router_logits": torch.zeros(4, 16),
        "input_ids": torch.zeros(4, dtype=torch.int64),
        "tid2eid": TABLE,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fi.hash_topk(**(arguments | changes))
    assert part in str(caught.value)


LOGITS = torch.zeros(4, 16)
DEEPSEEK = {"routing_method": METHOD.DeepSeekV3, "top_k": 2}
ROUTING = [
    ({"routing_logits": torch.zeros(64)}, V, "must be 2D"),
    ({"routing_logits": LOGITS.half()}, V, "float32 or bfloat16"),
    ({"top_k": 17}, V, "top_k must be between 1 and num_experts=16"),
    ({"routing_bias": ones(15)}, V, "must have num_experts=16 elements"),
    ({"tile_tokens_dim": 12}, V, "power of two"),
    ({"routing_method": METHOD.Unspecified}, V, "Unimplemented routing method"),
    ({"routing_logits": LOGITS[:0]}, R, "at least one token"),
    ({"n_group": 4, "topk_group": 2}, R, "only supports n_group <= 1"),
    ({**DEEPSEEK, "n_group": 0}, R, "n_group should not be zero"),
    ({**DEEPSEEK, "n_group": 3}, R, "divisible by n_group=3"),
    ({**DEEPSEEK, "n_group": 4}, R, "topk_group must be given"),
    ({**DEEPSEEK, "n_group": 2, "topk_group": 4}, R, "not be smaller than topk_group"),
    ({**DEEPSEEK, "n_group": 4, "topk_group": 1, "top_k": 4}, R, "less than total number"),
    ({**DEEPSEEK, "n_group": 8, "topk_group": 5}, R, "topk_group<=4"),
    ({**DEEPSEEK, "n_group": 1, "num_fused_shared_experts": 1}, R, "fusing shared expert"),
    ({"num_fused_shared_experts": 1}, R, "fusing shared expert"),
    ({"routing_method": 7, "num_fused_shared_experts": 1}, R, "fusing shared expert"),
    ({"routing_method": 3, "num_fused_shared_experts": 1, "top_k": 1}, R, "fusing shared expert"),
    ({"routing_method": METHOD.Llama4}, R, "top_k=1"),
    ({**DEEPSEEK, "n_group": 1, "top_k": 9}, R, "only supports top_k<=8; got 9"),
    ({"routing_logits": torch.zeros(4, 64), "top_k": 33}, R, "top_k<=32"),
    ({"local_num_experts": 0}, R, "within valid range"),
    ({"routing_logits": None}, A, "routing_logits is required"),
    ({"local_expert_offset": 9, "local_num_experts": 8}, R, "within valid range"),
]


@pytest.mark.parametrize(("changes", "error", "part"), ROUTING)
def test_section_7_4_trtllm_gen_routing(changes, error, part):
    arguments = {"routing_logits": LOGITS, "routing_bias": None, "routing_method": 1, "top_k": 2}
    with pytest.raises(error) as caught:
        fi.trtllm_gen_routing(**(arguments | changes))
    assert part in str(caught.value)


def test_section_7_5_autotune():
    with pytest.raises(ValueError, match="tuning_buckets is empty"), fi.autotune(tuning_buckets=()):
        pass


@pytest.mark.skipif(not has_gpu_backend(), reason="a library without GPU kernels")
def test_kernels_that_round_more_are_no_valid_tactics(monkeypatch):
    """MXFP4 x MXFP8 on FP8 products is for those who ask for it by name."""
    monkeypatch.setattr(fi_tuning, "_device", lambda: "cuda")
    d = fi.DtypeTrtllmGen
    problem = (d.MxE4m3, d.MxE2m1, fi.Fp8QuantizationType.NoneFp8, 4, 512, 256, 8)
    problem += (fi.ActivationType.Swiglu, True, fi.WeightLayout.MajorK, False, 16)
    configs = fi.trtllm_get_valid_moe_configs(*problem)
    names = [fi.trtllm_moe_tactic_name(config, *problem) for config in configs]
    assert any(name.startswith("mxfp4_bf16") for name in names)
    assert not any(name.startswith("mxfp4_fp8") for name in names)
