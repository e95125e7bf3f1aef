# SPDX-License-Identifier: Apache-2.0
"""Routing against a NumPy definition in double."""

from __future__ import annotations

import numpy as np
import pytest

import hopyard

TOKENS = 200


def scores_of(rule, logits):
    z = logits.astype(np.float64)
    if rule.score == "softmax":
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    if rule.score == "sigmoid":
        return 1 / (1 + np.exp(-z))
    if rule.score == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, z))
    return z


def kept_by_groups(rule, ranked):
    """Scores with the experts of dropped groups at -inf."""
    if rule.num_groups == 1:
        return ranked
    tokens, experts = ranked.shape
    groups = ranked.reshape(tokens, rule.num_groups, -1)
    best_two = np.sort(groups, -1)[..., -2:].sum(-1)
    order = np.argsort(-best_two, -1, kind="stable")[:, : rule.top_groups]
    keep = np.zeros((tokens, rule.num_groups), bool)
    np.put_along_axis(keep, order, True, -1)
    return np.where(np.repeat(keep, experts // rule.num_groups, -1), ranked, -np.inf)


def weights_of(rule, logits, scores, ids):
    chosen = np.take_along_axis(scores, ids, -1)
    z = np.take_along_axis(logits.astype(np.float64), ids, -1)
    if rule.weight == "softmax_selected":
        e = np.exp(z - z.max(-1, keepdims=True))
        chosen = e / e.sum(-1, keepdims=True)
    elif rule.weight == "sigmoid_selected":
        chosen = 1 / (1 + np.exp(-z))
    total = chosen.sum(-1, keepdims=True)
    if rule.renormalise == "sum_plus_epsilon":
        chosen = chosen / (total + 1e-20)
    elif rule.renormalise == "sum_at_least":
        chosen = chosen / np.maximum(total, 1e-20)
    return chosen * rule.scaling_factor


def reference(rule, logits, top_k, bias):
    scores = scores_of(rule, logits)
    ranked = scores + (bias if rule.use_bias and bias is not None else 0.0)
    ids = np.argsort(-kept_by_groups(rule, ranked), -1, kind="stable")[:, :top_k]
    return ids, weights_of(rule, logits, scores, ids)


RULE = hopyard.RoutingRule
METHODS = {
    "default": (RULE.default(), 64, 8),
    "renormalize": (RULE.renormalize(), 128, 8),
    "deepseek_v3": (RULE.deepseek_v3(8, 4, 2.5), 256, 8),
    "deepseek_v3_one_group": (RULE.deepseek_v3(1, 1, 2.0), 72, 6),
    "llama4": (RULE.llama4(), 16, 1),
    "top_k": (RULE.top_k(), 33, 5),
    "sigmoid_renorm": (RULE.sigmoid_renorm(), 64, 8),
    "sigmoid_norm_off": (RULE.sigmoid_renorm(False), 64, 8),
    "minimax2": (RULE.minimax2(1.5), 256, 8),
    "sigmoid": (RULE.sigmoid(), 60, 4),
    "top_k_sigmoid": (RULE.top_k_sigmoid(), 64, 32),
    "sqrt_softplus": (RULE.sqrt_softplus(1.5), 2048, 6),
}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_method_matches_the_definition(method, kind):
    rule, experts, top_k = METHODS[method]
    rng = np.random.default_rng(experts * 100 + top_k)
    values = rng.standard_normal((TOKENS, experts)).astype(np.float32) * 2
    bias = (rng.standard_normal(experts) * 0.1).astype(np.float32) if rule.use_bias else None
    if kind == "bfloat16":
        logits = hopyard.to_bf16(values)
        values = hopyard.from_bf16(logits)
    else:
        logits = values.astype(kind)
        values = logits.astype(np.float32)
    ids, weights = hopyard.route(logits, rule, top_k, bias=bias)
    want_ids, want_weights = reference(rule, values, top_k, bias)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    # Equal logits (16-bit inputs) tie exactly; sums of score and bias may round together in FP32.
    rows = (ids == want_ids).all(-1)
    assert rows.mean() > (0.99 if rule.use_bias or rule.score != "logit" else 0.9999)
    np.testing.assert_allclose(weights[rows], want_weights[rows], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(weights.sum(-1), want_weights.sum(-1), rtol=1e-5)


def test_ties_go_to_the_smaller_id():
    logits = np.zeros((3, 40), np.float32)
    ids, weights = hopyard.route(logits, RULE.renormalize(), 8)
    np.testing.assert_array_equal(ids, np.tile(np.arange(8), (3, 1)))
    np.testing.assert_array_equal(weights, np.full((3, 8), 0.125, np.float32))


def test_nan_and_infinite_logits_give_valid_ids():
    logits = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    logits[0, :] = np.nan
    logits[1, 3] = np.nan
    logits[2, 5] = np.inf
    logits[3, :] = -np.inf
    for rule in (RULE.default(), RULE.renormalize(), RULE.deepseek_v3(4, 2, 1.0), RULE.sigmoid()):
        ids, weights = hopyard.route(logits, rule, 4)
        assert ((ids >= 0) & (ids < 16)).all()
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert np.isnan(weights[:2]).all()


def test_replay_and_load():
    logits = np.random.default_rng(1).standard_normal((50, 24)).astype(np.float32)
    replay = np.full((60, 4), -7, np.int16)
    load = np.full(24, 100, np.int64)
    rule = RULE.renormalize()
    ids, weights = hopyard.route(logits, rule, 4, replay_out=replay, load_out=load)
    np.testing.assert_array_equal(replay[:50], ids)
    assert (replay[50:] == -7).all()
    np.testing.assert_array_equal(load - 100, np.bincount(ids.ravel(), minlength=24))
    again, same = hopyard.route(logits, rule, 4, forced_ids=replay[:50])
    np.testing.assert_array_equal(again, ids)
    np.testing.assert_array_equal(same, weights)
    without, _ = hopyard.route(logits, rule, 4)
    np.testing.assert_array_equal(without, ids)


def test_forced_ids_skip_what_is_out_of_range():
    logits = np.zeros((1, 8), np.float32)
    ids, weights = hopyard.route(
        logits, RULE.sigmoid(), 3, forced_ids=np.array([[2, -1, 8]], np.int32)
    )
    np.testing.assert_array_equal(ids, [[2, -1, -1]])
    np.testing.assert_array_equal(weights, [[0.5, 0, 0]])


def test_hash_routing():
    table = np.array([[1, 3], [0, 2], [7, 6]], np.int32)
    logits = np.random.default_rng(2).standard_normal((4, 8)).astype(np.float32)
    tokens = np.array([2, 0, 1, 2], np.int64)
    ids, weights = hopyard.route(
        logits, RULE.sqrt_softplus(), 2, token_ids=tokens, token_to_experts=table
    )
    np.testing.assert_array_equal(ids, table[tokens])
    scores = np.take_along_axis(np.sqrt(np.logaddexp(0, logits.astype(np.float64))), ids, -1)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 3, np.array([3], np.int32)])
def test_num_tokens(count):
    logits = np.random.default_rng(3).standard_normal((5, 8)).astype(np.float32)
    live = int(np.ravel(count)[0])
    ids, weights = hopyard.route(logits, RULE.renormalize(), 2, num_tokens=count)
    full, full_weights = hopyard.route(logits, RULE.renormalize(), 2)
    np.testing.assert_array_equal(ids[:live], full[:live])
    np.testing.assert_array_equal(weights[:live], full_weights[:live])
    assert (ids[live:] == -1).all()
    assert (weights[live:] == 0).all()


def test_bf16_weights_are_the_rounded_ones():
    logits = np.random.default_rng(4).standard_normal((9, 16)).astype(np.float32)
    _, weights = hopyard.route(logits, RULE.renormalize(), 4)
    _, bits = hopyard.route(logits, RULE.renormalize(), 4, weights_dtype="bfloat16")
    np.testing.assert_array_equal(bits, hopyard.to_bf16(weights))


KINDS = ["numpy", "torch"]


def maker(kind):
    """Makes an array of the kind of a NumPy array."""
    return np.array if kind == "numpy" else pytest.importorskip("torch").from_numpy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [("ids_out",), ("weights_out",), ("ids_out", "weights_out")])
def test_given_results_are_written_and_returned(given, kind):
    make = maker(kind)
    logits = np.random.default_rng(6).standard_normal((9, 16)).astype(np.float32)
    want_ids, want_weights = hopyard.route(logits, RULE.renormalize(), 4)
    buffers = {
        "ids_out": make(np.full((9, 4), 77, np.int32)),
        "weights_out": make(np.full((9, 4), 77, np.float32)),
    }
    call = {name: buffers[name] for name in given}
    for count in (5, None):  # rows beyond the count are left alone
        ids, weights = hopyard.route(
            make(logits), RULE.renormalize(), 4, num_tokens=count, **{**call, "forced_ids": None}
        )
        assert (ids is buffers["ids_out"]) == ("ids_out" in given)
        assert (weights is buffers["weights_out"]) == ("weights_out" in given)
        live = 9 if count is None else count
        np.testing.assert_array_equal(ids[:live], want_ids[:live])
        np.testing.assert_array_equal(weights[:live], want_weights[:live])
        if count is not None:
            assert (np.asarray(ids[live:]) == (77 if "ids_out" in given else -1)).all()
            assert (np.asarray(weights[live:]) == (77 if "weights_out" in given else 0)).all()


def test_given_weights_say_their_dtype():
    logits = np.random.default_rng(7).standard_normal((3, 8)).astype(np.float32)
    _, wanted = hopyard.route(logits, RULE.renormalize(), 2, weights_dtype="bfloat16")
    for dtype in (None, "bfloat16"):
        bits = np.zeros((3, 2), np.uint16)
        hopyard.route(logits, RULE.renormalize(), 2, weights_dtype=dtype, weights_out=bits)
        np.testing.assert_array_equal(bits, wanted)
    message = "weights_out has dtype uint16, wanted float32, the weights_dtype; leave weights_dtype"
    with pytest.raises(ValueError, match=message):
        hopyard.route(logits, RULE.renormalize(), 2, weights_dtype="float32", weights_out=bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("ids_out", np.full((2, 2), 7, np.int64), "expert_ids is i64; wanted i32"),
        (
            "ids_out",
            np.full((2, 3), 7, np.int32),
            r"expert_ids has shape \[2, 3\]; wanted \[2, 2\]",
        ),
        (
            "ids_out",
            np.full((3, 2), 7, np.int32),
            r"expert_ids has shape \[3, 2\]; wanted \[2, 2\]",
        ),
        ("weights_out", np.full((2, 2), 7, np.float64), "weights is f64; wanted f32 or bf16"),
        ("weights_out", np.full((1, 2), 7, np.float32), r"weights has shape \[1, 2\]; wanted"),
        ("weights_out", "float32", "weights_out is a str, wanted a NumPy array, a torch tensor"),
    ],
)
def test_bad_results_are_refused_and_not_written(name, array, message, kind):
    make = maker(kind)
    logits = make(np.zeros((2, 8), np.float32))
    given = make(array) if isinstance(array, np.ndarray) else array
    other = {"ids_out": make(np.full((2, 2), 7, np.int32))} if name == "weights_out" else {}
    with pytest.raises(ValueError, match=message):
        hopyard.route(logits, RULE.renormalize(), 2, **other, **{name: given})
    for written in (given, *other.values()):
        assert isinstance(written, str) or (np.asarray(written) == 7).all()


def test_read_only_results_are_refused():
    logits, frozen = np.zeros((2, 8), np.float32), np.zeros((2, 2), np.int32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="ids_out is read-only, wanted an array that can be writ"):
        hopyard.route(logits, RULE.renormalize(), 2, ids_out=frozen)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (8, 4), (2, 1)])
def test_fused_topk_deepseek(groups, kept):
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((64, 128)).astype(np.float32)
    bias = (rng.standard_normal(128) * 0.1).astype(np.float32)
    replay = np.zeros((64, 6), np.int16)
    values, indices = hopyard.fused_topk_deepseek(
        scores, bias, groups, kept, 6, 2.5, routing_replay_out=replay
    )
    rule = RULE.deepseek_v3(groups, kept, 2.5)
    want_ids, want = reference(rule, scores, 6, bias)
    np.testing.assert_array_equal(indices, want_ids)
    np.testing.assert_array_equal(replay, indices)
    np.testing.assert_allclose(values, want, rtol=2e-6)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    logits = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    ids, weights = hopyard.route(logits, RULE.renormalize(), 4)
    assert isinstance(ids, torch.Tensor)
    want = torch.topk(torch.softmax(logits, -1), 4)
    assert torch.equal(ids.long(), want.indices)
    torch.testing.assert_close(weights, want.values / want.values.sum(-1, keepdim=True))
    values, indices = hopyard.fused_topk_deepseek(
        logits.bfloat16(), torch.zeros(32), 4, 2, 4, 1.0, topk_indices=torch.empty_like(ids)
    )
    assert values.dtype == torch.bfloat16
    assert indices.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k"),
        ({"logits": np.zeros(8, np.float32)}, "logits"),
        ({"logits": np.zeros((2, 8), np.int32)}, "logits is i32; wanted f32 or bf16 or f16"),
        ({"rule": RULE(score="sigmoid", num_groups=3)}, "groups"),
        ({"rule": RULE(score="magic")}, "routing.score is 'magic', wanted one of logit, softmax"),
        ({"replay_out": np.zeros((1, 2), np.int16)}, "replay"),
        ({"load_out": np.zeros(8, np.float32)}, "load"),
        ({"num_tokens": 5}, "num_tokens"),
        ({"bias": np.zeros(7, np.float32)}, "bias"),
        ({"forced_ids": np.zeros((2, 2), np.float32)}, "forced_ids"),
        ({"token_ids": np.zeros(2, np.int32)}, "token_to_experts"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "logits": np.zeros((2, 8), np.float32),
        "rule": RULE.deepseek_v3(2, 1, 1.0),
        "top_k": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        hopyard.route(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((2, 16), np.int32)}, "scores is i32; wanted f32 or bf16 or f16"),
        ({"bias": np.zeros(15, np.float32)}, r"bias has shape \[15\]; wanted \[16\]"),
        ({"top_k": 33}, "topk_indices has 33 columns, the top_k; wanted 1 .. 32"),
        ({"num_groups": 3}, "num_experts=16 is not divisible by num_groups=3"),
        ({"top_groups": 5}, r"top_groups=5; wanted 1 .. num_groups=4"),
        ({"topk_values": np.zeros((2, 4), np.float16)}, "topk_values is f16; wanted the dtype of"),
        ({"topk_indices": np.zeros((2, 4), np.int64)}, "topk_indices is i64; wanted i32"),
        ({"routing_replay_out": np.zeros((1, 4), np.int16)}, "replay has 1 rows; wanted at least"),
    ],
)
def test_bad_arguments_of_fused_topk_deepseek(change, message):
    arguments = {
        "scores": np.zeros((2, 16), np.float32),
        "bias": np.zeros(16, np.float32),
        "num_groups": 4,
        "top_groups": 2,
        "top_k": 4,
        "scaling_factor": 1.0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        hopyard.fused_topk_deepseek(**arguments)


def test_unknown_argument():
    with pytest.raises(TypeError, match="forced_idz"):
        hopyard.route(np.zeros((1, 2), np.float32), RULE.top_k(), 1, forced_idz=None)
