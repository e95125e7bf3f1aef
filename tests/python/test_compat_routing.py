# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's routing operations alone: its grids, shared experts, metadata and packed ids."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import compat_reference as ref
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401
from hopyard.compat.flashinfer import ops

METHOD = fi.RoutingMethodType
DEVICES = pytest.mark.parametrize("device", cl.DEVICES)


def tie_free(tokens, experts, hot=None):
    generator = torch.Generator().manual_seed(tokens + experts)
    rows = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
    logits = (torch.stack(rows) + 1).float() / 32
    if hot is not None:
        logits[:, hot] += 8
    return logits


# --- trtllm_gen_routing


@dataclass(frozen=True)
class Routing:
    """One case.

    Attributes:
        rule: routing.
        experts: number of experts; of them `top_k` for a token.
        top_k: the same.
        tokens: number of tokens.
        tile: rows of a tile.
        hot: an expert that most tokens want.
        offset: first expert of the rank.
        local: experts of the rank; None = all.
    """

    rule: ref.Rule
    experts: int
    top_k: int
    tokens: int
    tile: int
    hot: int | None = None
    offset: int = 0
    local: int | None = None


def deepseek(experts, groups, kept, top_k):
    return ref.Rule("DeepSeekV3", groups, kept, 2.5, bias="float32"), experts, top_k


SIX = ("Default", "Renormalize", "RenormalizeNaive", "TopK", "SigmoidRenorm", "Sigmoid")
TYPES = ("float32", "bfloat16")
BIASED = [
    deepseek(256, 8, 4, 8),
    deepseek(128, 4, 2, 4),
    deepseek(96, 1, 1, 8),
    deepseek(512, 1, 1, 22),
    deepseek(384, 1, 1, 8),
    deepseek(160, 1, 1, 8),
    deepseek(72, 1, 1, 6),
    (ref.Rule("MiniMax2", scale=2.0, bias="float32"), 256, 6),
]
RANKS = [
    (ref.Rule("Renormalize"), 16, 4, (0, 8), (8, 8), (4, 4)),
    (ref.Rule("Renormalize"), 256, 8, (64, 64), (192, 64)),
    (ref.Rule("Renormalize"), 96, 8, (32, 32)),
    (*deepseek(256, 8, 4, 8), (0, 64), (192, 64)),
    (*deepseek(128, 4, 2, 4), (32, 32)),
]
ROUTINGS = [
    *(
        Routing(ref.Rule(method, logits=logits), *sizes, tokens, tile, hot)
        for method, sizes, logits, tokens, tile, hot in product(
            SIX, ((16, 1), (16, 4), (256, 8)), TYPES, (1, 8, 150), (8, 32), (None, 3)
        )
    ),
    *(
        Routing(ref.Rule("Llama4", logits=logits), experts, 1, tokens, tile)
        for experts, logits, tokens, tile in product((16, 128), TYPES, (1, 8, 150), (8, 32))
    ),
    *(Routing(*one, t, tile) for one, t, tile in product(BIASED, (1, 8, 150), (8, 32))),
    *(
        Routing(rule, experts, top_k, tokens, tile, None, offset, local)
        for rule, experts, top_k, *ranks in RANKS
        for (offset, local), tokens, tile in product(ranks, (8, 150), (8, 32))
    ),
    Routing(ref.Rule("Renormalize"), 256, 8, 4096, 64),
    Routing(*deepseek(256, 8, 4, 8), 4096, 64),
]


def gen_routing(r, logits, bias, **rank):
    grouped = r.rule.method == "DeepSeekV3"
    return fi.trtllm_gen_routing(
        logits,
        bias,
        METHOD[r.rule.method],
        r.top_k,
        n_group=r.rule.groups if grouped else 0,
        topk_group=r.rule.kept if grouped else 0,
        routed_scaling_factor=r.rule.scale or 1.0,
        tile_tokens_dim=r.tile,
        **rank,
    )


def check_permutation(result, ids, local, tile):
    """Every expert's rows lie in its own tiles; `ids` are those of the rank, others negative."""
    here = (ids >= 0) & (ids < local)
    counts = torch.bincount(ids[here], minlength=local)
    padded = (counts + tile - 1) // tile * tile
    e2p = result.expanded_idx_to_permuted_idx.long()
    assert int(result.total_num_padded_tokens) == padded.sum()
    assert ((e2p == -1) == ~here).all()
    rows, own = e2p[here], ids[here]
    assert rows.unique().numel() == rows.numel()
    starts = padded.cumsum(0) - padded
    assert ((rows >= starts[own]) & (rows < starts[own] + counts[own])).all()
    assert (result.permuted_idx_to_token_idx.long()[rows] == torch.nonzero(here)[:, 0]).all()
    tiles = int(result.num_non_exiting_ctas)
    assert tiles == padded.sum() // tile
    batch = result.cta_idx_xy_to_batch_idx[:tiles].long()
    each = torch.arange(local, device=ids.device)
    assert (batch == torch.repeat_interleave(each, padded // tile)).all()
    ends = (torch.arange(tiles, device=ids.device) + 1) * tile
    limit = result.cta_idx_xy_to_mn_limit[:tiles]
    assert (limit == torch.minimum(ends, (starts + counts)[batch])).all()


def name_of(r):
    rank = "" if r.local is None else f"-rank{r.offset}+{r.local}"
    hot = "" if r.hot is None else "-hot"
    words = (r.rule.method, r.rule.logits, f"E{r.experts}K{r.top_k}T{r.tokens}tile{r.tile}")
    return "-".join(words) + hot + rank


@DEVICES
@pytest.mark.parametrize("r", ROUTINGS, ids=name_of)
def test_trtllm_gen_routing(r, device):
    logits = tie_free(r.tokens, r.experts, r.hot).to(getattr(torch, r.rule.logits)).to(device)
    bias = None
    if r.rule.bias:
        order = torch.randperm(r.experts, generator=torch.Generator().manual_seed(r.experts))
        bias = (order * 4.0 / r.experts - 2).to(device)
    whole = gen_routing(r, logits, bias)
    ids = whole.topk_ids.long()
    weights = r.rule.confirm(ids, logits, bias)
    local = r.experts if r.local is None else r.local
    part = whole
    if r.local is not None:
        part = gen_routing(r, logits, bias, local_expert_offset=r.offset, local_num_experts=local)
    here = (ids >= r.offset) & (ids < r.offset + local)
    assert (torch.where(here, ids, -1) == part.topk_ids).all()
    torch.testing.assert_close(part.topk_weights.double(), weights, rtol=0.004, atol=1e-6)
    check_permutation(part, ids - r.offset, local, r.tile)


# --- fused_topk_deepseek

# What FlashInfer's grid leaves of experts x topk_group x n_group x topk, by its own limits.
TOPK = [
    (experts, groups, kept, top_k)
    for experts, groups, kept, top_k in product((256, 384), *[(1, 2, 4, 8)] * 3)
    if kept <= groups
    and kept * groups >= top_k
    and (groups == 1 or (experts <= 256 and experts // groups <= 32))
    and (groups == 1 or experts // groups * kept <= 128)
]
# More than FlashInfer's kernel can do, which its checks let pass.
BEYOND = [(64, 8, 6, 8), (128, 16, 8, 8), (96, 32, 3, 4)]
# Relative error of a result that is rounded to its type.
STEP = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@DEVICES
@pytest.mark.parametrize("scores_type", STEP)
@pytest.mark.parametrize("bias_type", STEP)
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
@pytest.mark.parametrize("sizes", TOPK + BEYOND)
def test_fused_topk_deepseek(sizes, tokens, bias_type, scores_type, device):
    experts, groups, kept, top_k = sizes
    scores = cl.normal((tokens, experts), experts + tokens).to(scores_type).to(device)
    bias = cl.normal((experts,), tokens).to(bias_type).to(device)
    results = []
    for replay in (torch.full((tokens + 4, top_k), -1, dtype=torch.int16, device=device), None):
        values = torch.zeros(tokens, top_k, dtype=scores_type, device=device)
        ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
        arguments = (scores, bias, groups, kept, top_k, 2.5, values, ids)
        assert fi.fused_topk_deepseek(*arguments, routing_replay_out=replay) is None
        results.append((values, ids, replay))
    values, ids, replay = results[0]
    assert (replay[:tokens] == ids).all()
    assert (replay[tokens:] == -1).all()
    assert (values == results[1][0]).all()
    assert (ids == results[1][1]).all()
    rule = ref.Rule("DeepSeekV3", groups, kept, 2.5)
    weights = rule.confirm(ids, scores.float(), bias)
    torch.testing.assert_close(values.double(), weights, rtol=STEP[scores_type], atol=1e-6)


def test_the_grid_of_fused_topk_deepseek():
    assert len(TOPK) == 14
    assert (256, 8, 4, 8) in TOPK


# --- hash_topk


@DEVICES
@pytest.mark.parametrize("shared", [0, 1])
def test_hash_topk(shared, device):
    logits = cl.normal((6, 16), 3).float().to(device)
    table = (torch.arange(40).view(10, 4) * 7 % 16).int().to(device)
    tokens = torch.tensor([0, 9, 3, 3, 5, 1], device=device)
    weights, ids = fi.hash_topk(logits, tokens, table, shared, 2.5)
    assert (ids[:, :4] == table[tokens]).all()
    score = torch.sqrt(torch.nn.functional.softplus(logits.double()))
    chosen = score.gather(1, ids[:, :4].long())
    wanted = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(weights[:, :4].double(), wanted, rtol=1e-5, atol=1e-7)
    if shared:
        assert (ids[:, 4] == 16).all()
        assert (weights[:, 4] == 1 / 2.5).all()
    outside = torch.tensor([0, 10, -1, 3, 5, 1], device=device)
    weights, ids = fi.hash_topk(logits, outside, table, shared, 2.5)
    assert (ids[1:3, :4] == -1).all()
    assert (weights[1:3, :4] == 0).all()
    for array in fi.hash_topk(logits[:0], tokens[:0], table, shared, 2.5):
        assert array.shape == (0, 4 + shared)


# --- defects of FlashInfer that are not repeated


@DEVICES
@pytest.mark.parametrize(
    "rule", [("DeepSeekV3", 1, 1), ("DeepSeekV3", 4, 2), ("MiniMax2", 0, 0)], ids=str
)
def test_a_missing_bias_is_zeros(rule, device):
    method, groups, kept = rule
    logits = tie_free(5, 16).to(device)
    call = {"n_group": groups, "topk_group": kept, "routed_scaling_factor": 2.5}
    missing, zeros = (
        fi.trtllm_gen_routing(logits, bias, METHOD[method], 4, **call)
        for bias in (None, torch.zeros(16, device=device))
    )
    assert (missing.topk_ids == zeros.topk_ids).all()
    assert (missing.topk_weights == zeros.topk_weights).all()
    if groups < 2:
        best = logits.topk(4).indices
        assert (missing.topk_ids.long().sort(-1).values == best.sort(-1).values).all()


@DEVICES
@pytest.mark.parametrize("groups", [1, 4])
def test_a_float32_bias_is_not_rounded(groups, device):
    """Of equal logits the bias chooses experts, by less than BF16 can tell apart."""
    bias = 8 + torch.arange(16).float() / 1024
    assert bias.bfloat16().unique().numel() == 1
    logits = torch.zeros(3, 16, device=device)
    r = fi.trtllm_gen_routing(
        logits, bias.to(device), METHOD.DeepSeekV3, 4, n_group=groups, topk_group=min(groups, 2)
    )
    assert (r.topk_ids.cpu() == torch.tensor([15, 14, 13, 12])).all()


@DEVICES
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_llama4_of_few_tokens_on_a_rank_with_an_offset(tokens, device):
    logits = tie_free(tokens, 16).to(device)
    best = logits.argmax(-1)
    for offset in (0, 4, 12):
        r = fi.trtllm_gen_routing(
            logits, None, METHOD.Llama4, 1, local_expert_offset=offset, local_num_experts=4
        )
        here = (best >= offset) & (best < offset + 4)
        assert (r.topk_ids[:, 0] == torch.where(here, best, -1)).all()
        check_permutation(r, torch.where(here, best - offset, -1)[:, None], 4, 8)


# --- metadata and packed ids


def test_gen_routing_with_shared_experts_and_metadata():
    logits = tie_free(9, 16)
    grouped = {"n_group": 4, "topk_group": 2, "num_fused_shared_experts": 2}
    r = fi.trtllm_gen_routing(logits, None, METHOD.DeepSeekV3, 2, **grouped)
    assert (r.topk_ids[:, 2:] == torch.tensor([16, 17])).all()
    assert (r.topk_weights[:, 2:] == 1).all()
    ids, weights = ref.route("Renormalize", logits, 2)
    packed = fi.pack_topk_ids(ids.int(), -weights.float())
    assert ((packed >> 16) == ids).all()
    usual = {"num_experts": 16, "top_k": 2, "local_expert_offset": 4, "num_local_experts": 8}
    mode = fi.RoutingInputMode.PackedPrecomputed
    both = fi.trtllm_moe_allocate_routing_metadata_multi_tile(
        packed, tile_ns=[16, 8], routing_input_mode=mode, **usual
    )
    assert both.tile_ns == (8, 16)
    direct = fi.trtllm_gen_routing(
        logits, None, 1, 2, local_expert_offset=4, local_num_experts=8, tile_tokens_dim=16
    )
    slot = both.slots[1]
    assert (slot.expanded_idx_to_permuted_idx.view(9, 2) == direct[3]).all()
    assert int(slot.num_non_exiting_ctas) == int(direct.num_non_exiting_ctas)
    assert (slot.expert_weights == -weights.bfloat16()).all()
    before = slot.expanded_idx_to_permuted_idx
    fi.populate_trtllm_moe_routing_metadata_(both, packed.flip(0))
    assert both.slots[1].expanded_idx_to_permuted_idx is before
    single = fi.trtllm_moe_allocate_routing_metadata(
        packed.flip(0), tile_n=16, routing_input_mode=mode, **usual
    )
    assert (single.expanded_idx_to_permuted_idx == before).all()
    with pytest.raises(ValueError, match="tile_ns must contain unique values"):
        fi.trtllm_moe_allocate_routing_metadata_multi_tile(
            packed, tile_ns=[8, 8], routing_input_mode=mode, **usual
        )


UNPACKED = {
    "num_experts": 16,
    "top_k": 2,
    "local_expert_offset": 0,
    "num_local_experts": 16,
    "tile_ns": [8],
    "routing_input_mode": fi.RoutingInputMode.UnpackedPrecomputed,
}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        (torch.ones(2), r"topk_weights has shape \[2\], wanted that of topk_ids, \[3, 2\]"),
        (torch.ones(3, 1), r"topk_weights has shape \[3, 1\]"),
        (torch.ones(3, 2, dtype=torch.int32), "topk_weights must be bfloat16 or float32"),
        (torch.ones(3, 2, device="meta"), "topk_weights must be where topk_ids are, cpu; got meta"),
        (None, "topk_weights is None"),
        ([1.0], r"topk_weights is \[1.0\], wanted weights"),
    ],
)
def test_weights_of_routing_metadata(weights, part):
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    right = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    metadata = fi.trtllm_moe_allocate_routing_metadata_multi_tile(
        ids, topk_weights=right, **UNPACKED
    )
    assert (metadata.slots[0].expert_weights == right).all()
    with pytest.raises(ValueError, match=part):
        fi.populate_trtllm_moe_routing_metadata_(metadata, ids, weights)
    assert (metadata.slots[0].expert_weights == right).all()
    if weights is not None:
        with pytest.raises(ValueError, match=part):
            fi.trtllm_moe_allocate_routing_metadata_multi_tile(
                ids, topk_weights=weights, **UNPACKED
            )


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_weights_of_the_other_type_are_converted(first):
    ids = np.array([[0, 1], [2, 3]], np.int32)
    exact = np.array([[0.5, 0.25], [1.5, 3.0]], np.float32)
    both = {"float32": exact, "bfloat16": ops.bfloat16(exact)}
    other = both["bfloat16" if first == "float32" else "float32"]
    metadata = fi.trtllm_moe_allocate_routing_metadata_multi_tile(
        ids, topk_weights=both[first][::-1], **UNPACKED
    )
    fi.populate_trtllm_moe_routing_metadata_(metadata, ids, other)
    assert (np.asarray(metadata.slots[0].expert_weights) == both[first]).all()


def test_ids_that_cannot_be_packed():
    for number in (32767, -32768, -1):
        packed = fi.pack_topk_ids(torch.tensor([[number, 1]]), torch.ones(1, 2))
        assert (packed >> 16).tolist() == [[number, 1]]
    for number in (32768, 40000, -32769):
        for ids in (torch.tensor([[1, number]]), np.array([[1, number]])):
            weights = torch.ones(1, 2) if isinstance(ids, torch.Tensor) else np.ones((1, 2))
            with pytest.raises(ValueError, match=f"within -32768 .. 32767.*got .{number}."):
                fi.pack_topk_ids(ids, weights)
    with pytest.raises(ValueError, match=r"weights have shape \[2\], wanted that of ids"):
        fi.pack_topk_ids(torch.zeros(3, 2).int(), torch.ones(2))
    with pytest.raises(ValueError, match="ids must be integers; got float32"):
        fi.pack_topk_ids(torch.zeros(3, 2), torch.ones(3, 2))


def test_what_computes_on_the_host_cannot_be_captured(monkeypatch):
    codes, scales = fi.fp4_quantize(torch.zeros(2, 32))
    weights = torch.zeros(1, 512, 256).bfloat16(), torch.zeros(1, 256, 256).bfloat16()
    sizes = {"num_local_experts": 1, "hidden_size": 256, "intermediate_size": 256}
    monkeypatch.setattr(ops, "is_capturing", lambda array: True)
    for call in (
        lambda: fi.e2m1_and_ufp8sf_scale_to_float(codes, scales),
        lambda: fi.mxfp8_dequantize_host(codes, scales),
        lambda: fi.prepare_trtllm_mxint4_weights(*weights, **sizes),
        lambda: fi.shuffle_matrix_a(torch.zeros(128, 2, device="meta"), 128),
    ):
        with pytest.raises(RuntimeError, match="is being captured, and this function computes on"):
            call()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_local_experts": 0}, "num_local_experts=0: wanted at least one expert"),
        ({"local_expert_offset": 1}, "local_expert_offset=1 with num_local_experts=16"),
        ({"local_expert_offset": -1}, "local_expert_offset=-1"),
    ],
)
def test_ranges_of_routing_metadata(changes, part):
    ids = torch.zeros(3, 2, dtype=torch.int32)
    allocate = fi.trtllm_moe_allocate_routing_metadata_multi_tile
    with pytest.raises(ValueError, match=part):
        allocate(ids, topk_weights=torch.ones(3, 2), **(UNPACKED | changes))
    metadata = allocate(ids, topk_weights=torch.ones(3, 2), **UNPACKED)
    with pytest.raises(ValueError, match="topk_ids must be int32; got int64"):
        fi.populate_trtllm_moe_routing_metadata_(metadata, ids.long(), torch.ones(3, 2))
