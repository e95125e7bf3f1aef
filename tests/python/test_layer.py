# SPDX-License-Identifier: Apache-2.0
"""What a layer computes, in every way of giving it weights, routing and outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest

import hopyard
import layers

BF16_ERROR = 0.012


@pytest.fixture(scope="module")
def data():
    return layers.arrays()


@pytest.fixture(scope="module")
def expected(data):
    return layers.reference(data, *layers.softmax_route(data.logits))


def run(data, weights, spec=None, **call):
    layer = hopyard.MoeLayer(spec or layers.spec(), weights, max_tokens=layers.TOKENS)
    return layer(data.bits, **({"logits": data.logits} | call))


def test_numpy_and_torch_give_the_same_bits(data, expected):
    torch = pytest.importorskip("torch")
    output = run(data, data.weights(layers.spec()))
    assert output.dtype == np.uint16
    assert layers.worst_row(output, expected) < BF16_ERROR
    experts = hopyard.ExpertWeights(
        gemm1=torch.from_numpy(data.gemm1).bfloat16(), gemm2=torch.from_numpy(data.down).bfloat16()
    )
    layer = hopyard.MoeLayer(layers.spec(), hopyard.Weights(layers.spec(), experts), layers.TOKENS)
    hidden = torch.from_numpy(data.hidden).bfloat16()
    result = layer(hidden, logits=torch.from_numpy(data.logits))
    assert result.dtype == torch.bfloat16
    np.testing.assert_array_equal(result.view(torch.uint16).numpy(), output)


def interleaved(first, second):
    return np.stack([first, second], 2).reshape(first.shape[0], -1, first.shape[2])


LAYOUTS = {
    "up_gate": lambda d: {"gemm1": np.concatenate([d.up, d.gate], 1), "row_order": "up_gate"},
    "interleaved": lambda d: {
        "gemm1": interleaved(d.gate, d.up),
        "row_order": "interleaved_gate_up",
    },
    "interleaved_up": lambda d: {
        "gemm1": interleaved(d.up, d.gate),
        "row_order": "interleaved_up_gate",
    },
    "separate": lambda d: {"gemm1": None, "gate": d.gate, "up": d.up},
    "lists": lambda d: {"gemm1": None, "gate": list(d.gate), "up": list(d.up)},
    "mn_major": lambda d: {
        "gemm1": hopyard.Matrix(
            hopyard.to_bf16(np.ascontiguousarray(d.gemm1.transpose(0, 2, 1))), major="mn"
        )
    },
}


def as_bits(value):
    if isinstance(value, list):
        return [hopyard.to_bf16(v) for v in value]
    return hopyard.to_bf16(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_weight_layouts_give_the_same_bits(layout, data):
    changes = {name: as_bits(value) for name, value in LAYOUTS[layout](data).items()}
    output = run(data, data.weights(layers.spec(), **changes))
    np.testing.assert_array_equal(output, run(data, data.weights(layers.spec())))


PAIRS = [
    ("fp8_block128", "fp8_block128", "bf16", 0.06),
    ("fp8_block128", "fp8_block128", "fp8_block128", 0.12),
    ("fp8_per_tensor", "fp8_per_tensor", "bf16", 0.06),
    ("fp8_per_channel", "fp8_per_row", "fp8_per_token", 0.12),
    ("mxfp8", "mxfp8", "mxfp8", 0.12),
    ("mxfp4", "mxfp4", "bf16", 0.06),
    ("mxfp4", "mxfp4", "mxfp8", 0.12),
    ("nvfp4", "nvfp4", "bf16", 0.06),
    ("nvfp4", "nvfp4", "nvfp4_per_token", 0.6),
    ("mxint4", "mxint4", "bf16", 0.06),
]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("weights", "name", "activations", "bound"), PAIRS)
def test_number_formats(weights, name, activations, bound, kind):
    data = layers.arrays(3, hidden=256, width=128)
    spec = layers.spec(
        hidden_size=256, intermediate_size=128, weights=weights, activations=activations
    )
    gemm1, gemm2 = data.gemm1, data.down
    if kind == "torch":
        torch = pytest.importorskip("torch")
        gemm1, gemm2 = torch.from_numpy(gemm1), torch.from_numpy(gemm2)
    first, second = hopyard.quantize(gemm1, name), hopyard.quantize(gemm2, name)
    decoded = np.asarray(hopyard.dequantize(first))
    data.gate, data.up = decoded[:, :128], decoded[:, 128:]
    data.down = np.asarray(hopyard.dequantize(second))
    experts = hopyard.ExpertWeights(
        gemm1=hopyard.Matrix.from_quantized(first), gemm2=hopyard.Matrix.from_quantized(second)
    )
    output = run(data, hopyard.Weights(spec, experts), spec)
    wanted = layers.reference(data, *layers.softmax_route(data.logits))
    assert layers.worst_row(output, wanted) < bound


def test_bias_and_per_expert_activation_parameters(data):
    alpha = tuple(1 + 0.1 * e for e in range(layers.EXPERTS))
    activation = hopyard.Activation(alpha=alpha, beta=1.0, limit=2.0)
    spec = layers.spec(activation=activation)
    bias1 = layers.normal((layers.EXPERTS, 2 * layers.WIDTH), 20, 0.5)
    bias2 = layers.normal((layers.EXPERTS, layers.HIDDEN), 21, 0.5)
    weights = data.weights(
        spec,
        gemm1=hopyard.Matrix(hopyard.to_bf16(data.gemm1), bias=bias1),
        gemm2=hopyard.Matrix(hopyard.to_bf16(data.down), bias=hopyard.to_bf16(bias2)),
    )
    ids, routing = layers.softmax_route(data.logits)
    wanted = np.zeros(data.hidden.shape)
    for token, slot in np.ndindex(ids.shape):
        e = ids[token, slot]
        both = data.gemm1[e].astype(np.float64) @ data.hidden[token] + bias1[e]
        gate, up = np.minimum(both[: layers.WIDTH], 2), np.clip(both[layers.WIDTH :], -2, 2)
        inner = (up + 1) * gate / (1 + np.exp(-alpha[e] * gate))
        wanted[token] += routing[token, slot] * (data.down[e] @ inner + bias2[e])
    assert layers.worst_row(run(data, weights, spec), wanted) < BF16_ERROR


ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "geglu": lambda g, u: u * g * 0.5 * (1 + ERF(g / math.sqrt(2))),
    "geglu_tanh": lambda g, u: (
        u * 0.5 * g * (1 + np.tanh(0.7978845608028654 * (g + 0.044715 * g**3)))
    ),
    "relu2": lambda g, u: np.maximum(u, 0) ** 2,
    "silu": lambda g, u: u / (1 + np.exp(-u)),
    "gelu": lambda g, u: u * 0.5 * (1 + ERF(u / math.sqrt(2))),
    "identity": lambda g, u: u,
}


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_activations(kind, data):
    spec = layers.spec(activation=hopyard.Activation(kind=kind))
    gemm1 = data.gemm1 if spec.activation.gated else data.up
    output = run(data, data.weights(spec, gemm1=hopyard.to_bf16(gemm1)), spec)
    routing = layers.softmax_route(data.logits)
    wanted = layers.reference(data, *routing, activation=ACTIVATIONS[kind])
    assert layers.worst_row(output, wanted) < BF16_ERROR


def test_shared_experts(data, expected):
    shared = layers.arrays(9, experts=2)
    spec = layers.spec(shared=hopyard.SharedExperts(count=2, per_token_weight=True))
    experts = hopyard.ExpertWeights(
        gemm1=hopyard.to_bf16(data.gemm1), gemm2=hopyard.to_bf16(data.down)
    )
    others = hopyard.ExpertWeights(
        gate=hopyard.to_bf16(shared.gate),
        up=hopyard.to_bf16(shared.up),
        gemm2=hopyard.to_bf16(shared.down),
    )
    weights = hopyard.Weights(spec, experts, shared=others)
    gates = np.random.default_rng(0).random((layers.TOKENS, 2), np.float32)
    output = run(data, weights, spec, shared_weights=gates)
    shared.hidden = data.hidden
    ids = np.tile(np.arange(2), (layers.TOKENS, 1))
    wanted = expected + layers.reference(shared, ids, gates)
    assert layers.worst_row(output, wanted) < BF16_ERROR


def test_router_weight_on_input(data):
    spec = layers.spec(top_k=1, routing=hopyard.RoutingRule.llama4(), router_weight_on_input=True)
    output = run(data, data.weights(spec), spec)
    ids = data.logits.argmax(-1)[:, None]
    scale = 1 / (1 + np.exp(-np.take_along_axis(data.logits, ids, -1).astype(np.float64)))
    data_in = layers.arrays()
    data_in.hidden = data.hidden * scale
    assert (
        layers.worst_row(output, layers.reference(data_in, ids, np.ones_like(scale))) < BF16_ERROR
    )


def test_routing_inputs_agree(data):
    layer, _ = layers.make()
    plain = layer(data.bits, logits=data.logits)
    ids, weights = hopyard.route(data.logits, layer.spec.routing, layers.TOP_K)
    unpacked = layer(data.bits, ids=ids, weights=weights)
    np.testing.assert_array_equal(unpacked, plain)
    replayed = layer(data.bits, ids=ids.astype(np.int16), logits=data.logits)
    np.testing.assert_array_equal(replayed, plain)
    bits = hopyard.to_bf16(weights)
    packed = (ids << 16) | bits.astype(np.int32)
    np.testing.assert_array_equal(
        layer(data.bits, packed=packed), layer(data.bits, ids=ids, weights=bits)
    )
    tokens = np.arange(layers.TOKENS, dtype=np.int32)
    hashed = layer(data.bits, token_ids=tokens, token_to_experts=ids, logits=data.logits)
    np.testing.assert_array_equal(hashed, plain)


def test_invalid_ids_skip_their_slot(data):
    layer, _ = layers.make()
    ids, weights = hopyard.route(data.logits, layer.spec.routing, layers.TOP_K)
    ids[0], ids[1, 0], ids[2, 1] = -1, layers.EXPERTS, 30000
    output = layer(data.bits, ids=ids, weights=weights)
    assert (output[0] == 0).all()
    wanted = layers.reference(data, ids, weights)
    assert layers.worst_row(output[1:], wanted[1:]) < BF16_ERROR


def test_ranges_and_tables_of_experts_sum_to_the_whole(data, expected):
    total = np.zeros_like(expected)
    for offset in (0, 3):
        count = 3 if offset == 0 else 5
        spec = layers.spec(local=hopyard.ExpertMap("range", offset, count))
        part = slice(offset, offset + count)
        weights = data.weights(
            spec,
            gemm1=hopyard.to_bf16(data.gemm1[part]),
            gemm2=hopyard.to_bf16(data.down[part]),
        )
        total += hopyard.from_bf16(run(data, weights, spec))
    assert layers.worst_row(total, expected) < 2 * BF16_ERROR

    order = np.random.default_rng(1).permutation(layers.EXPERTS)
    spec = layers.spec(local=hopyard.ExpertMap("table", count=layers.EXPERTS))
    weights = data.weights(
        spec, gemm1=hopyard.to_bf16(data.gemm1[order]), gemm2=hopyard.to_bf16(data.down[order])
    )
    table = np.argsort(order).astype(np.int32)
    output = run(data, weights, spec, expert_table=table)
    np.testing.assert_array_equal(output, run(data, data.weights(layers.spec())))


def test_outputs(data, expected):
    layer, _ = layers.make()
    ids, weights = layers.softmax_route(data.logits)
    replay = np.full((layers.TOKENS + 2, layers.TOP_K), -9, np.int16)
    load = np.zeros(layers.EXPERTS, np.int32)
    slots = layers.TOKENS * layers.TOP_K
    routing_weights = np.empty((layers.TOKENS, layers.TOP_K), np.float32)
    routing_ids = np.empty((layers.TOKENS, layers.TOP_K), np.int32)
    rows = np.zeros((slots, layers.HIDDEN), np.uint16)
    slot_to_row = np.empty((layers.TOKENS, layers.TOP_K), np.int32)
    inner = np.zeros((slots, layers.WIDTH), np.uint16)
    output = layer(
        data.bits,
        logits=data.logits,
        replay_out=replay,
        load_out=load,
        routing_weights_out=routing_weights,
        routing_ids_out=routing_ids,
        rows_out=rows,
        slot_to_row_out=slot_to_row,
        gemm1_activation_out=inner,
    )
    np.testing.assert_array_equal(output, layer(data.bits, logits=data.logits))
    np.testing.assert_array_equal(replay[:-2], ids)
    assert (replay[-2:] == -9).all()
    np.testing.assert_array_equal(load, np.bincount(ids.ravel(), minlength=layers.EXPERTS))
    np.testing.assert_allclose(routing_weights, weights, rtol=1e-6)
    np.testing.assert_array_equal(routing_ids, ids)
    np.testing.assert_array_equal(np.sort(slot_to_row.ravel()), np.arange(slots))
    summed = (hopyard.from_bf16(rows)[slot_to_row] * weights[..., None]).sum(1)
    assert layers.worst_row(summed, expected) < BF16_ERROR
    activated = hopyard.from_bf16(inner)[slot_to_row]
    first = activated[0, 0]
    gate, up = (m[ids[0, 0]] @ data.hidden[0] for m in (data.gate, data.up))
    np.testing.assert_allclose(first, layers.swiglu(gate, up), rtol=0.02, atol=0.01)


def test_out_narrow_and_accumulate(data):
    layer, _ = layers.make()
    whole = layer(data.bits, logits=data.logits)
    narrow = np.empty((layers.TOKENS, 40), np.uint16)
    assert layer(data.bits, logits=data.logits, out=narrow) is narrow
    np.testing.assert_array_equal(narrow, whole[:, :40])
    start = hopyard.to_bf16(np.full((layers.TOKENS, layers.HIDDEN), 3.0))
    layer(data.bits, logits=data.logits, out=start, accumulate=True)
    np.testing.assert_allclose(
        hopyard.from_bf16(start), hopyard.from_bf16(whole) + 3, rtol=2**-7, atol=2**-8
    )


@pytest.mark.parametrize("count", [0, 5, np.array(5, np.int32), np.array([24], np.int32)])
def test_num_tokens(count, data):
    layer, _ = layers.make()
    whole = layer(data.bits, logits=data.logits)
    live = int(count) if isinstance(count, int) else int(count.ravel()[0])
    output = layer(data.bits, logits=data.logits, num_tokens=count)
    np.testing.assert_array_equal(output[:live], whole[:live])
    assert (output[live:] == 0).all()
    kept = np.full_like(whole, 7)
    layer(data.bits, logits=data.logits, num_tokens=count, out=kept)
    assert (kept[live:] == 7).all()


def test_zero_tokens():
    layer, data = layers.make()
    output = layer(data.bits[:0], logits=data.logits[:0])
    assert output.shape == (0, layers.HIDDEN)


def test_lora_delta_on_gemm1(data):
    layer, _ = layers.make()
    ids, weights = layers.softmax_route(data.logits)
    delta = layers.normal((layers.TOKENS, layers.TOP_K, 2 * layers.WIDTH), 30, 0.3)
    output = layer(data.bits, logits=data.logits, gemm1_delta=hopyard.to_bf16(delta))
    wanted = np.zeros(data.hidden.shape)
    for token, slot in np.ndindex(ids.shape):
        e = ids[token, slot]
        up = data.up[e] @ data.hidden[token] + delta[token, slot, : layers.WIDTH]
        gate = data.gate[e] @ data.hidden[token] + delta[token, slot, layers.WIDTH :]
        wanted[token] += weights[token, slot] * (data.down[e] @ layers.swiglu(gate, up))
    assert layers.worst_row(output, wanted) < BF16_ERROR


def test_a_token_does_not_depend_on_its_batch(data):
    layer, _ = layers.make()
    whole = layer(data.bits, logits=data.logits)
    for t in range(0, layers.TOKENS, 7):
        one = layer(data.bits[t : t + 1], logits=data.logits[t : t + 1])
        np.testing.assert_array_equal(one[0], whole[t])


def test_workspace_cap_gives_the_same_bits(data):
    layer, _ = layers.make()
    one = hopyard.MoeLayer(layer.spec, layer.weights, max_tokens=1).workspace_bytes
    cap = (one + layer.workspace_bytes) // 2
    capped, _ = layers.make(workspace_cap=cap)
    assert capped.workspace_bytes <= cap
    assert capped.tokens_per_chunk < layers.TOKENS
    np.testing.assert_array_equal(
        capped(data.bits, logits=data.logits), layer(data.bits, logits=data.logits)
    )


def test_overlap_of_launches_gives_the_same_bits(data):
    layer, _ = layers.make()
    apart, _ = layers.make(overlap_launches=False)
    np.testing.assert_array_equal(
        apart(data.bits, logits=data.logits), layer(data.bits, logits=data.logits)
    )


def test_layers_of_one_plan_differ_in_their_weights_only(data):
    layer, _ = layers.make()
    other = layers.arrays(40)
    twin = layer.with_weights(other.weights(layers.spec()))
    wanted = run(data, other.weights(layers.spec()))
    np.testing.assert_array_equal(twin(data.bits, logits=data.logits), wanted)
    np.testing.assert_array_equal(
        layer(data.bits, logits=data.logits), run(data, data.weights(layers.spec()))
    )
    assert twin._plan is layer._plan
    assert twin._workspaces is layer._workspaces
    narrow = layers.spec(top_k=1)
    with pytest.raises(ValueError, match="made for a spec with top_k=1, wanted top_k=2"):
        layer.with_weights(data.weights(narrow))
