# SPDX-License-Identifier: Apache-2.0
"""What all of FlashInfer's MoE operations refuse alike, in each of them: class and argument."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401

A, N, R, V = AssertionError, NotImplementedError, RuntimeError, ValueError
T, E, K, HIDDEN, WIDTH = 4, 16, 2, 256, 128
SIZES = cl.Sizes(HIDDEN, WIDTH, E, K, T)
MODES = ("bf16", "deepseek", "per_tensor", "nvfp4", "mxint4")
OPERATIONS = [(mode, routed) for mode in MODES for routed in (False, True)]
IDS = torch.arange(T * K, dtype=torch.int32).view(T, K)
WEIGHTS = torch.full((T, K), 0.5)


@pytest.fixture(scope="module")
def cases():
    return {mode: cl.make(mode, SIZES) for mode in MODES}


def function_of(mode, routed):
    name = cl.OPERATIONS.get(mode, "trtllm_fp4_block_scale")
    return getattr(fi, name + ("_routed_moe" if routed else "_moe"))


def parameters_of(function):
    return inspect.signature(function).parameters


def arguments_of(cases, mode, routed):
    """Right arguments of an operation."""
    given = {**cases[mode].arguments, **cl.routing_of(SIZES)}
    given |= {"topk_ids": (IDS, WEIGHTS), "routing_logits": torch.zeros(T, E), "routing_bias": None}
    known = parameters_of(function_of(mode, routed))
    return {key: value for key, value in given.items() if key in known}


def meta(tensor):
    return tensor.to("meta")


def int16(*shape):
    return torch.zeros(shape, dtype=torch.int16)


BF16 = torch.zeros(T, HIDDEN, dtype=torch.bfloat16)
# Row of section 7.1, argument, value, class. An operation without the argument is left out.
WRONG = [
    (3, "routing_logits", torch.zeros(T, E).half(), R),
    (4, "routing_logits", torch.zeros(T * E), R),
    (4, "routing_logits", torch.zeros(T + 1, E), R),
    (4, "routing_logits", torch.zeros(T, E + 1), R),
    (6, "top_k", 0, R),
    (6, "top_k", E + 1, R),
    (7, "local_num_experts", 0, R),
    (7, "local_num_experts", E + 1, R),
    (8, "local_expert_offset", -1, R),
    (8, "local_expert_offset", 1, R),
    (9, "hidden_states", BF16[0], R),
    (10, "hidden_states", BF16.double(), R),
    (11, "gemm1_weights", torch.zeros(E, 2 * WIDTH, HIDDEN).double(), R),
    (11, "gemm2_weights", torch.zeros(E, HIDDEN, WIDTH).double(), R),
    (14, "weight_layout", -1, R),
    (14, "weight_layout", 3, R),
    (14, "weight_layout", fi.WeightLayout.MajorMn, N),
    (24, "activation_type", -1, R),
    (24, "activation_type", fi.ActivationType.InvalidType, R),
    (25, "activation_type", fi.ActivationType.GegluTanh, R),
    (25, "activation_type", fi.ActivationType.Silu, R),
    (36, "routing_method_type", fi.RoutingMethodType.Unspecified, R),
    (36, "routing_method_type", 77, R),
    (42, "routing_replay_out", int16(T, K).int(), V),
    (42, "routing_replay_out", int16(T * K), V),
    (42, "routing_replay_out", int16(T, K + 1), V),
    (42, "routing_replay_out", int16(T - 1, K), V),
    (42, "routing_replay_out", int16(T, 2 * K)[:, ::2], V),
    (42, "routing_replay_out", meta(int16(T, K)), R),
    (43, "topk_ids", IDS.long(), (A, R)),
    (43, "topk_ids", (IDS.long(), WEIGHTS), (A, R)),
    (44, "topk_ids", IDS[:-1], R),
    (44, "topk_ids", (IDS[:, :1].contiguous(), WEIGHTS), R),
    (45, "topk_ids", (IDS, WEIGHTS.double()), (A, R)),
    (45, "topk_ids", (IDS, WEIGHTS[:, :1]), (A, R)),
    (45, "topk_ids", (IDS, None), (A, R)),
    (46, "topk_ids", IDS.repeat(1, 2)[:, ::2], R),
    (46, "topk_ids", meta(IDS), R),
    (47, "output", BF16[:-1], (V, A)),
    (47, "output", BF16.repeat(1, 2), (V, A)),
    (47, "output", BF16.float(), (V, A)),
    (47, "output", meta(BF16), (V, A)),
    (62, "hidden_states", meta(BF16), N),
]
CASES = [
    pytest.param(mode, routed, *wrong, id=f"{wrong[0]}-{function_of(mode, routed).__name__}-{i}")
    for mode, routed in OPERATIONS
    for i, wrong in enumerate(WRONG)
    if wrong[1] in parameters_of(function_of(mode, routed))
]


@pytest.mark.parametrize(("mode", "routed", "row", "name", "value", "errors"), CASES)
def test_what_every_operation_refuses(mode, routed, row, name, value, errors, cases):
    arguments = arguments_of(cases, mode, routed) | {name: value}
    with pytest.raises(Exception) as caught:  # noqa: PT011 the class is compared below
        function_of(mode, routed)(**arguments)
    for error in errors if isinstance(errors, tuple) else (errors,):
        assert isinstance(caught.value, error)
    words = (name, "expert_weights") if name == "topk_ids" else (name,)
    assert any(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("mode", "routed"), OPERATIONS)
def test_the_arguments_that_are_changed_are_right_ones(mode, routed, cases):
    arguments = arguments_of(cases, mode, routed)
    replay = int16(T + 1, K) - 7
    arguments |= {"output": BF16.clone(), "routing_replay_out": replay}
    result = function_of(mode, routed)(**arguments)
    result = result[0] if isinstance(result, list) else result
    assert result is arguments["output"]
    assert result.abs().max() > 0
    assert (replay[:T] >= 0).all()
    assert (replay[T:] == -7).all()


def refused_gradients(function, arguments):
    """Call the function with each tensor in turn requiring grad, and see it refused; without
    gradients it runs. The names that were tried."""
    tried = set()
    for name, value in arguments.items():
        pair = isinstance(value, tuple)
        tensor = value[1] if pair else value
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        tried.add(name)
        leaf = tensor.clone().requires_grad_()
        changed = arguments | {name: (value[0], leaf) if pair else leaf}
        word = "expert_weights" if pair else name
        message = f"{function.__name__} has no backward, but {word} requires grad; call it under"
        with pytest.raises(N, match=message):
            function(**changed)
        with torch.no_grad():
            function(**changed)
    return tried


@pytest.mark.parametrize(("mode", "routed"), OPERATIONS)
def test_gradients_are_refused(mode, routed, cases):
    """They would be lost without a word: the results have no history."""
    function = function_of(mode, routed)
    tried = refused_gradients(function, arguments_of(cases, mode, routed))
    own = {
        "bf16": "gemm1_weights",
        "deepseek": "hidden_states_scale",
        "per_tensor": "output1_scales_gate_scalar",
        "nvfp4": "output2_scale_scalar",
        "mxint4": "gemm2_weights_scale",
    }
    assert {"topk_ids" if routed else "routing_logits", own[mode]} < tried


def test_routing_refuses_gradients():
    scores, bias = torch.randn(T, E), torch.zeros(E)
    outputs = {"topk_values": torch.zeros(T, K), "topk_indices": torch.zeros(T, K).int()}
    groups = {"n_group": 4, "topk_group": 2, "topk": K, "routed_scaling_factor": 1.0}
    deepseek = {"scores": scores, "bias": bias, **groups, **outputs}
    table = torch.zeros(10, K, dtype=torch.int32)
    hashed = {"router_logits": scores, "input_ids": torch.zeros(T).long(), "tid2eid": table}
    method = fi.RoutingMethodType.MiniMax2
    alone = {"routing_logits": scores, "routing_bias": bias, "routing_method": method, "top_k": K}
    assert refused_gradients(fi.fused_topk_deepseek, deepseek) == {"scores", "bias", "topk_values"}
    assert refused_gradients(fi.hash_topk, hashed) == {"router_logits"}
    assert refused_gradients(fi.trtllm_gen_routing, alone) == {"routing_logits", "routing_bias"}


def test_every_argument_is_tried_where_it_is():
    """The cases leave out what an operation has no parameter for."""
    tried = {(mode, routed, name) for mode, routed, _, name, *_ in (c.values for c in CASES)}
    names = {name for _, name, *_ in WRONG}
    for mode, routed in OPERATIONS:
        absent = {"routing_logits" if routed else "topk_ids"}
        absent |= {"activation_type"} if mode == "mxint4" else set()
        absent |= {"weight_layout"} if mode not in ("bf16", "deepseek") else set()
        assert {name for name in names if (mode, routed, name) not in tried} == absent
