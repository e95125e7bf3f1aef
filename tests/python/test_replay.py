# SPDX-License-Identifier: Apache-2.0
"""Replay of routing, for every operation: what one call records gives another the same bits, and
the loads are the number of times that each expert was recorded."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import gpu_layers
import hopyard
import hopyard.compat.flashinfer as fi
import layers
from compat_layers import one_torch_thread  # noqa: F401
from compat_reference import Rule
from hopyard import torch_ops

DEVICES = pytest.mark.parametrize("device", cl.DEVICES)
NATIVE = hopyard.RoutingRule
# Rules by FlashInfer's names and by ours.
RULES = [
    (Rule("Default"), NATIVE.default()),
    (Rule("Renormalize"), NATIVE.renormalize()),
    (Rule("RenormalizeNaive"), NATIVE.renormalize()),
    (Rule("Llama4"), NATIVE.llama4()),
    (Rule("TopK"), NATIVE.top_k()),
    (Rule("Sigmoid"), NATIVE.sigmoid()),
    (Rule("SigmoidRenorm"), NATIVE.sigmoid_renorm(True)),
    (Rule("TopKSigmoid"), NATIVE.top_k_sigmoid()),
    (Rule("MiniMax2", scale=2.0, bias="float32"), NATIVE.minimax2(2.0)),
    (Rule("DeepSeekV3", 4, 2, 2.5, bias="float32"), NATIVE.deepseek_v3(4, 2, 2.5)),
]
METHODS = pytest.mark.parametrize(("rule", "native"), RULES, ids=[r.method for r, _ in RULES])


def top_k_of(rule):
    return 1 if rule.method == "Llama4" else 4


def counted(replay, experts):
    """How often each expert is recorded."""
    ids = replay[(replay >= 0) & (replay < experts)].long().cpu()
    return torch.bincount(ids, minlength=experts)


def recorder(tokens, top_k, device, tail=3):
    return torch.full((tokens + tail, top_k), -7, dtype=torch.int16, device=device)


# --- the operations of the compat package


def unfinalised(case, wanted, **call):
    """Rows before they are summed, and where they are; the call records `wanted`."""
    replay = torch.full_like(wanted, -7)
    rows, _, place = cl.call(case, **call, routing_replay_out=replay, do_finalize=False)
    assert (replay == wanted).all()
    return rows, place


@DEVICES
@METHODS
@pytest.mark.parametrize("mode", list(cl.WEIGHTS))
def test_what_an_operation_records_the_routed_one_replays(mode, rule, native, device):
    top_k = top_k_of(rule)
    case = cl.make(mode, cl.Sizes(256, 128, 16, top_k, 7), device=device)
    call = {name: cl.move(value, device) for name, value in cl.routing_by(rule, case).items()}
    replay = recorder(7, top_k, device)
    output = cl.call(case, **call, routing_replay_out=replay)
    assert (replay[7:] == -7).all()
    ids = replay[:7].contiguous()
    loads = torch.zeros(16, dtype=torch.int32, device=device)
    again, weights = hopyard.route(
        call["logits"], native, top_k, bias=call["bias"], forced_ids=ids, load_out=loads
    )
    assert (again == ids).all()
    assert (loads.cpu() == counted(ids, 16)).all()
    cl.same(output, cl.call(case, **call))  # recording changes nothing
    method = cl.method_of(call)
    second = recorder(7, top_k, device)
    replayed = cl.call(case, routed=(ids.int(), weights), routing_replay_out=second, **method)
    cl.same(output, replayed)
    assert (second == replay).all()
    rounded = weights.bfloat16()
    packed, third = fi.pack_topk_ids(ids.int(), rounded), recorder(7, top_k, device)
    cl.same(
        cl.call(case, routed=packed, routing_replay_out=third, **method),
        cl.call(case, routed=(ids.int(), rounded), **method),
    )
    assert (third == replay).all()
    rows = unfinalised(case, replay, **call)
    for left, right in zip(
        rows, unfinalised(case, replay, routed=(ids.int(), weights), **method), strict=True
    ):
        assert (left == right).all()


def test_every_operation_that_records_is_tested():
    recording = {
        name
        for name in fi.__all__
        if callable(getattr(fi, name))
        and "routing_replay_out" in inspect.signature(getattr(fi, name)).parameters
    }
    operations = {cl.OPERATIONS.get(mode, "trtllm_fp4_block_scale") for mode in cl.WEIGHTS}
    tested = {f"{name}{kind}" for name in operations for kind in ("_moe", "_routed_moe")}
    assert recording == tested | {"fused_topk_deepseek"}


# --- layers and operators


twins = functools.cache(gpu_layers.twins)


def on(device, array):
    """A NumPy array as a torch tensor there; uint16 is bfloat16."""
    return gpu_layers.to_gpu(array, device)


def routings(hidden_logits, device):
    """Ways to route a call: arguments, and those that replay what it recorded."""
    logits = on(device, hidden_logits)
    ids, weights = hopyard.route(hidden_logits, NATIVE.renormalize(), layers.TOP_K)
    ids, weights = ids.copy(), weights.copy()
    ids[:, 0] = (ids[:, 1] + 1) % layers.EXPERTS  # not what the logits say
    ids[1, 0], ids[2, 1] = -1, layers.EXPERTS  # skipped slots
    packed = (ids << 16) | hopyard.to_bf16(weights).astype(np.int32)
    ids, weights, packed = (on(device, array) for array in (ids, weights, packed))
    tokens = torch.arange(len(logits), dtype=torch.int32, device=device)
    table = ids.clamp(0, layers.EXPERTS - 1)
    rounded = weights.bfloat16()
    return {
        "logits": ({"logits": logits}, lambda replay: {"ids": replay, "logits": logits}),
        "forced": (
            {"ids": ids, "logits": logits},
            lambda replay: {"ids": replay, "logits": logits},
        ),
        "unpacked": (
            {"ids": ids, "weights": weights},
            lambda replay: {"ids": replay.int(), "weights": weights},
        ),
        "packed": (
            {"packed": packed},
            lambda replay: {"ids": replay.int(), "weights": rounded},
        ),
        "hashed": (
            {"token_ids": tokens, "token_to_experts": table, "logits": logits},
            lambda replay: {"ids": replay, "logits": logits},
        ),
    }


@DEVICES
@pytest.mark.parametrize("kind", ["logits", "forced", "unpacked", "packed", "hashed"])
@pytest.mark.parametrize(("weights", "activations"), gpu_layers.PAIRS)
def test_what_a_layer_records_it_replays(weights, activations, kind, device):
    pair = twins(weights, activations)
    layer = pair.layer(device)
    hidden, logits = pair.hidden()
    hidden = on(device, hidden)
    given, replaying = routings(logits, device)[kind]
    results = []
    for call in (given, None):
        replay = recorder(gpu_layers.TOKENS, layers.TOP_K, device)
        loads = torch.full((layers.EXPERTS,), 5, dtype=torch.int64, device=device)
        again = replaying(results[0][1][: gpu_layers.TOKENS]) if call is None else call
        output = layer(hidden, **again, replay_out=replay, load_out=loads)
        assert (replay[gpu_layers.TOKENS :] == -7).all()
        assert (loads.cpu() - 5 == counted(replay, layers.EXPERTS)).all()
        results.append((output, replay))
    (output, replay), (replayed, second) = results
    cl.same(output, replayed)
    assert (replay == second).all()
    cl.same(output, layer(hidden, **given))


@DEVICES
@METHODS
def test_what_route_records_it_replays(rule, native, device):
    top_k = top_k_of(rule)
    logits = cl.normal((50, 24), 1).float().to(device)
    bias = cl.normal((24,), 2).float().to(device) if rule.bias else None
    handle = torch_ops.rule_text(native)
    replay, loads = recorder(50, top_k, device), torch.zeros(24, dtype=torch.int32, device=device)
    outputs = {"replay_out": replay, "load_out": loads}
    ids, weights = hopyard.route(logits, native, top_k, bias=bias, **outputs)
    assert (replay[:50] == ids).all()
    assert (replay[50:] == -7).all()
    assert (loads.cpu() == counted(replay, 24)).all()
    for call in (hopyard.route, torch.ops.hopyard.route):
        second, more = recorder(50, top_k, device), torch.zeros_like(loads)
        again, same = call(
            logits,
            native if call is hopyard.route else handle,
            top_k,
            bias=bias,
            forced_ids=replay[:50],
            replay_out=second,
            load_out=more,
        )
        assert (again == ids).all()
        assert (same == weights).all()
        assert (second == replay).all()
        assert (more == loads).all()
    second, more = recorder(50, top_k, device), torch.zeros_like(loads)
    again, same = torch.full_like(ids, -7), torch.full_like(weights, -7)
    given = {"bias": bias, "forced_ids": replay[:50], "replay_out": second, "load_out": more}
    torch.ops.hopyard.route_out(logits, handle, top_k, again, same, **given)
    for left, right in ((again, ids), (same, weights), (second, replay), (more, loads)):
        assert (left == right).all()


@DEVICES
@pytest.mark.parametrize("scores_type", [torch.float32, torch.bfloat16])
def test_what_fused_topk_deepseek_records_route_replays(scores_type, device):
    scores = cl.normal((50, 32), 1).to(scores_type).to(device)
    bias = cl.normal((32,), 2).float().to(device)
    replay, ids = recorder(50, 4, device), torch.zeros(50, 4, dtype=torch.int32, device=device)
    values = torch.zeros(50, 4, dtype=scores_type, device=device)
    fi.fused_topk_deepseek(scores, bias, 4, 2, 4, 2.5, values, ids, routing_replay_out=replay)
    loads = torch.zeros(32, dtype=torch.int32, device=device)
    again, same = hopyard.route(
        scores,
        NATIVE.deepseek_v3(4, 2, 2.5),
        4,
        bias=bias,
        forced_ids=replay[:50],
        load_out=loads,
        weights_dtype=str(scores_type).removeprefix("torch."),
    )
    assert (again == ids).all()
    assert (same == values).all()
    assert (loads.cpu() == counted(replay, 32)).all()


@DEVICES
@pytest.mark.parametrize("name", ["moe", "moe_out"])
def test_what_an_operator_records_it_replays(name, device):
    pair = twins("bf16", "bf16")
    handle = torch_ops.handle(pair.layer(device))
    hidden, logits = (on(device, array) for array in pair.hidden())

    def call(**routing):
        replay = recorder(gpu_layers.TOKENS, layers.TOP_K, device, 0)
        loads = torch.zeros(layers.EXPERTS, dtype=torch.int32, device=device)
        out = torch.zeros_like(hidden) if name == "moe_out" else None
        output = torch_ops.moe(
            hidden, handle, out=out, replay_out=replay, load_out=loads, **routing
        )
        assert (loads.cpu() == counted(replay, layers.EXPERTS)).all()
        return output, replay

    output, replay = call(logits=logits)
    replayed, second = call(logits=logits, ids=replay)
    cl.same(output, replayed)
    assert (replay == second).all()
    cl.same(output, pair.layer(device)(hidden, logits=logits))


@DEVICES
def test_replay_beside_shared_experts(device):
    case = cl.make("bf16", cl.Sizes(256, 128, 10, 2, 7), device=device)
    arrays = cl.arrays_of_experts(case)
    spec = hopyard.MoeSpec(256, 128, 8, 2, shared=hopyard.SharedExperts(2, weights="bf16"))

    def part(which):
        matrices = {
            name: hopyard.Matrix(
                arrays[f"{name}_weights"][which].contiguous(),
                major="block_k",
                row_map="shuffled128",
            )
            for name in ("gemm1", "gemm2")
        }
        return hopyard.ExpertWeights(**matrices, row_order="interleaved_up_gate")

    weights = hopyard.Weights(spec, part(slice(0, 8)), part(slice(8, 10)))
    layer = hopyard.MoeLayer(spec, weights, 7)
    logits = cl.normal((7, 8), 3).float().to(device)
    replay, loads = recorder(7, 2, device), torch.zeros(8, dtype=torch.int32, device=device)
    hidden = case.arguments["hidden_states"]
    output = layer(hidden, logits=logits, replay_out=replay, load_out=loads)
    assert (loads.cpu() == counted(replay, 8)).all()
    cl.same(output, layer(hidden, logits=logits, ids=replay[:7]))
