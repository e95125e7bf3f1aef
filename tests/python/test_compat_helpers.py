# SPDX-License-Identifier: Apache-2.0
"""Signatures, enumerations, layouts and `autotune` of the compat package, by the
definitions of FlashInfer's documents."""

from __future__ import annotations

import enum
import inspect
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401

METHOD, D = fi.RoutingMethodType, fi.DtypeTrtllmGen

# Positional order and defaults, as FlashInfer documents them; what follows "*" is Hopyard's own.
SIGNATURES = {
    "trtllm_bf16_moe": "routing_logits, routing_bias, hidden_states, gemm1_weights, gemm2_weights, "
    "num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, "
    "local_num_experts, routed_scaling_factor=None, routing_method_type=0, "
    "use_shuffled_weight=True, weight_layout=2, do_finalize=True, enable_pdl=True, "
    "tune_max_num_tokens=8192, activation_type=3, norm_topk_prob=True, routing_replay_out=None, "
    "gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None, output=None",
    "trtllm_bf16_routed_moe": "topk_ids, hidden_states, gemm1_weights, gemm2_weights, num_experts, "
    "top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts, "
    "routed_scaling_factor=None, routing_method_type=0, use_shuffled_weight=True, "
    "weight_layout=2, do_finalize=True, enable_pdl=True, gemm1_lora_delta=None, "
    "tune_max_num_tokens=8192, activation_type=3, routing_replay_out=None, gemm1_alpha=None, "
    "gemm1_beta=None, gemm1_clamp_limit=None, output=None",
    "trtllm_fp8_per_tensor_scale_moe": "routing_logits, routing_bias, hidden_states, "
    "gemm1_weights, output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, "
    "output2_scales_scalar, num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts, routed_scaling_factor, use_routing_scales_on_input, "
    "routing_method_type=0, do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, "
    "activation_type=3, norm_topk_prob=True, routing_replay_out=None, output=None",
    "trtllm_fp8_per_tensor_scale_routed_moe": "topk_ids, routing_bias, hidden_states, "
    "gemm1_weights, output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, "
    "output2_scales_scalar, num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts, routed_scaling_factor, use_routing_scales_on_input, "
    "routing_method_type=0, do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, "
    "activation_type=3, routing_replay_out=None, output=None",
    "trtllm_fp8_block_scale_moe": "routing_logits, routing_bias, hidden_states, "
    "hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, "
    "num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, "
    "local_num_experts, routed_scaling_factor, routing_method_type=0, use_shuffled_weight=False, "
    "weight_layout=0, do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, "
    "fp8_quantization_type=1, num_fused_shared_experts=None, activation_type=3, "
    "norm_topk_prob=True, routing_replay_out=None, gemm1_alpha=None, gemm1_beta=None, "
    "gemm1_clamp_limit=None, output=None",
    "trtllm_fp8_block_scale_routed_moe": "topk_ids, routing_bias, hidden_states, "
    "hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, "
    "num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, "
    "local_num_experts, routed_scaling_factor, routing_method_type=0, use_shuffled_weight=False, "
    "weight_layout=0, do_finalize=True, enable_pdl=None, gemm1_lora_delta=None, output=None, "
    "tune_max_num_tokens=8192, fp8_quantization_type=1, activation_type=3, gemm1_alpha=None, "
    "gemm1_beta=None, gemm1_clamp_limit=None, *, routing_replay_out=None",
    "trtllm_fp4_block_scale_moe": "routing_logits, routing_bias, hidden_states, "
    "hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm1_alpha, "
    "gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, "
    "output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, num_experts, top_k, "
    "n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts, "
    "routed_scaling_factor, routing_method_type=0, do_finalize=True, enable_pdl=None, "
    "activation_type=3, per_token_scale=None, output=None, tune_max_num_tokens=8192, "
    "norm_topk_prob=True, routing_replay_out=None, num_fused_shared_experts=None",
    "trtllm_fp4_block_scale_routed_moe": "topk_ids, routing_bias, hidden_states, "
    "hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm1_alpha, "
    "gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, "
    "output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, num_experts, top_k, "
    "n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts, "
    "routed_scaling_factor, routing_method_type=0, do_finalize=True, enable_pdl=None, "
    "activation_type=3, per_token_scale=None, output=None, tune_max_num_tokens=8192, "
    "gemm1_lora_delta=None, *, routing_replay_out=None",
    "trtllm_mxint4_block_scale_moe": "routing_logits, routing_bias, hidden_states, gemm1_weights, "
    "gemm1_weights_scale, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, "
    "gemm2_weights_scale, num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type=0, "
    "do_finalize=True, enable_pdl=None, output=None, tune_max_num_tokens=8192, "
    "norm_topk_prob=True, routing_replay_out=None",
    "trtllm_mxint4_block_scale_routed_moe": "topk_ids, hidden_states, gemm1_weights, "
    "gemm1_weights_scale, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, "
    "gemm2_weights_scale, num_experts, top_k, n_group, topk_group, intermediate_size, "
    "local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type=0, "
    "do_finalize=True, enable_pdl=None, gemm1_lora_delta=None, output=None, "
    "tune_max_num_tokens=8192, *, routing_replay_out=None",
    "fused_topk_deepseek": "scores, bias, n_group, topk_group, topk, routed_scaling_factor, "
    "topk_values, topk_indices, launch_with_pdl=True, routing_replay_out=None, *, "
    "backend='default'",
    "hash_topk": "router_logits, input_ids, tid2eid, num_fused_shared_experts=0, "
    "routed_scaling_factor=1.0, launch_with_pdl=True",
    "trtllm_gen_routing": "routing_logits, routing_bias, routing_method, top_k, *, "
    "num_fused_shared_experts=0, n_group=0, topk_group=0, local_expert_offset=0, "
    "local_num_experts=None, routed_scaling_factor=1.0, tile_tokens_dim=8, norm_topk_prob=True, "
    "enable_pdl=None",
    "autotune": "tune_mode=True, cache=None, tuning_buckets=None, round_up=None, skip_ops=None",
    "is_trtllm_moe_supported": "dtype_weights, dtype_act, quant_method=None",
    "prepare_cutlass_bf16_weights": "w1_bf16, w2_bf16, *, num_local_experts, hidden_size, "
    "intermediate_size, activation=None, device=None",
    "prepare_cutlass_w4a16_weights": "w1_bf16, w2_bf16, *, num_local_experts, hidden_size, "
    "intermediate_size, activation=None, device=None",
    "prepare_trtllm_fp4_weights": "w1_bf16, w2_bf16, *, variant=None, num_local_experts, "
    "hidden_size, intermediate_size, activation=None, device=None, permute_cache=None",
    "shuffle_matrix_a": "input_tensor, epilogue_tile_m",
    "shuffle_matrix_sf_a": "input_tensor, epilogue_tile_m, num_elts_per_sf=16",
    "block_scale_interleave": "unswizzled_sf",
    "reorder_rows_for_gated_act_gemm": "x",
    "convert_to_block_layout": "input_tensor, blockK",
    "get_reorder_rows_for_gated_act_gemm_row_indices": "x",
    "get_shuffle_matrix_a_row_indices": "input_tensor, epilogue_tile_m",
    "get_shuffle_matrix_sf_a_row_indices": "input_tensor, epilogue_tile_m, num_elts_per_sf=16",
    "_maybe_get_cached_w3_w1_permute_indices": "_cache_permute_indices, dst_w3_w1_weight, "
    "epilogue_tile_m, num_elts_per_sf=None, is_gated_act_gemm=True",
    "get_w2_permute_indices_with_cache": "_cache_permute_indices, dst_w2_weight, "
    "epilogue_tile_m, num_elts_per_sf=None, is_gated_act_gemm=None",
    "fp4_quantize": "input, global_scale=None, sf_vec_size=16, sf_use_ue8m0=False, "
    "is_sf_swizzled_layout=True, is_sf_8x4_layout=False, is_global_scale_inversed=False, "
    "enable_pdl=None, backend='cuda'",
    "nvfp4_quantize": "a, a_global_sf, sfLayout=fi.SfLayout.layout_128x4, do_shuffle=False, "
    "sf_vec_size=16, enable_pdl=None, backend='cuda'",
    "mxfp8_quantize": "input, is_sf_swizzled_layout=True, alignment=32, enable_pdl=None, "
    "backend='cuda', sf_swizzle_layout=None",
    "trtllm_get_valid_moe_configs": "dtype_act, dtype_weights, fp8_quantization_type, top_k, "
    "hidden_size, intermediate_size, num_local_experts, act_type, use_shuffled_weight, "
    "weight_layout, use_per_token_scaling, num_tokens, has_gemm1_lora_delta=False",
    "trtllm_moe_allocate_routing_metadata": "topk_ids, *, num_experts, top_k, "
    "local_expert_offset, num_local_experts, tile_n, routing_input_mode, topk_weights=None",
    "trtllm_moe_allocate_routing_metadata_multi_tile": "topk_ids, *, num_experts, top_k, "
    "local_expert_offset, num_local_experts, tile_ns, routing_input_mode, topk_weights=None",
    "populate_trtllm_moe_routing_metadata_": "metadata, topk_ids, topk_weights=None",
    "prepare_trtllm_bf16_weights": "w1_bf16, w2_bf16, *, num_local_experts, hidden_size, "
    "intermediate_size, activation=None, device=None, permute_cache=None",
    "prepare_trtllm_fp4_activations": "hidden_states_bf16, *, variant",
    "prepare_trtllm_fp8_block_weights": "w1_bf16, w2_bf16, *, variant, num_local_experts, "
    "hidden_size, intermediate_size, activation=None, device=None",
    "prepare_trtllm_fp8_block_activations": "hidden_states_bf16, *, variant",
    "prepare_trtllm_fp8_per_tensor_weights": "w1_bf16, w2_bf16, *, hidden_states_scale_global, "
    "intermediate_scale_global, num_local_experts, hidden_size, intermediate_size, "
    "activation=None, device=None",
    "prepare_trtllm_fp8_per_tensor_activations": "hidden_states_bf16, *, "
    "hidden_states_scale_global",
    "prepare_trtllm_mxint4_weights": "w1_bf16, w2_bf16, *, num_local_experts, hidden_size, "
    "intermediate_size, activation=None, device=None, permute_cache=None",
    "e2m1_and_ufp8sf_scale_to_float": "e2m1_tensor, ufp8_scale_tensor, global_scale_tensor=None, "
    "sf_vec_size=16, ufp8_type=1, is_sf_swizzled_layout=True",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    def plain(text):
        namespace = {"fi": fi}
        exec(f"def function({text}): pass", namespace)
        return [
            (p.name, p.kind, p.default)
            for p in inspect.signature(namespace["function"]).parameters.values()
        ]

    given = inspect.signature(getattr(fi, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in given] == plain(SIGNATURES[name])
    assert getattr(fi, name).__doc__


def test_enumerations():
    methods = "Default Renormalize DeepSeekV3 Llama4 RenormalizeNaive TopK SigmoidRenorm MiniMax2 "
    methods += "Sigmoid TopKSigmoid Unspecified"
    assert [m.name for m in METHOD] == methods.split()
    assert [m.value for m in METHOD] == list(range(11))
    activations = "Gelu Relu Silu Swiglu Geglu SwigluBias Relu2 SwigluStep GegluTanh Identity Situ"
    assert [a.name for a in fi.ActivationType] == [*activations.split(), "InvalidType"]
    assert [a.value for a in fi.ActivationType] == list(range(12))
    gated = {a.name for a in fi.ActivationType if fi.is_gated_activation(a)}
    assert gated == {"Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ"}
    assert [x.value for x in fi.WeightLayout] == [0, 1, 2]
    assert [x.name for x in fi.SfLayout] == ["layout_128x4", "layout_8x4", "layout_linear"]
    assert (D.Bfloat16, D.E4m3, D.E2m1) == (0x101000, 0x100805, 0x1100402)
    assert (D.MxE2m1, D.MxE4m3, D.MxInt4) == (0x110040C, 0x110080D, 0x111040E)
    assert len({d.value & 0xFF for d in D}) == 22
    assert {d.name for d in D if fi.has_block_scale(d)} == {"E2m1", "MxE2m1", "MxE4m3", "MxInt4"}


class Foreign(enum.Enum):
    """An enumeration that is not ours, with FlashInfer's values."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


def foreign(one):
    """A member of another library's plain enumeration with the value of one of ours."""
    return enum.Enum(type(one).__name__, {m.name: m.value for m in type(one)})(one.value)


@pytest.mark.parametrize("give", [lambda one: Foreign(one.value), lambda one: one.value])
@pytest.mark.parametrize("layout", list(fi.SfLayout))
def test_scale_layouts_of_anybody(layout, give):
    x, g = cl.normal((130, 96), 1), torch.tensor([64.0])
    wanted, given = fi.nvfp4_quantize(x, g, layout), fi.nvfp4_quantize(x, g, give(layout))
    assert (given[1] == wanted[1]).all()
    wanted = fi.mxfp8_quantize(x, sf_swizzle_layout=layout)
    given = fi.mxfp8_quantize(x, sf_swizzle_layout=give(layout))
    assert (given[1] == wanted[1]).all()


def test_enumerations_of_anybody():
    A, Q = fi.ActivationType, fi.QuantVariant
    assert fi.is_gated_activation(foreign(A.Geglu))
    assert not fi.is_gated_activation(foreign(A.Relu2))
    assert fi.has_block_scale(foreign(D.MxE2m1))
    assert fi.is_trtllm_moe_supported(foreign(D.Bfloat16), foreign(D.Bfloat16))
    case = cl.make("deepseek")
    logits = cl.logits_of(case)
    usual = {"routing_method_type": METHOD.Renormalize, "activation_type": A.Swiglu}
    usual |= {"weight_layout": fi.WeightLayout.MajorK}
    usual |= {"fp8_quantization_type": fi.Fp8QuantizationType.DeepSeekFp8}
    others = {name: foreign(one) for name, one in usual.items()}
    cl.same(cl.call(case, logits=logits, **others), cl.call(case, logits=logits, **usual))
    r = fi.trtllm_gen_routing(logits, None, foreign(METHOD.Renormalize), 2)
    assert (r.topk_ids == fi.trtllm_gen_routing(logits, None, METHOD.Renormalize, 2).topk_ids).all()
    w1, w2 = cl.normal((2, 128, 128), 0), cl.normal((2, 128, 128), 1)
    sizes = {"num_local_experts": 2, "hidden_size": 128, "intermediate_size": 128}
    assert fi.prepare_trtllm_fp4_weights(
        w1, w2, variant=foreign(Q.MXFP4), activation=foreign(A.Relu2), **sizes
    )["gemm1_weights_scale"].shape == (2, 128, 4)


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda x: fi.nvfp4_quantize(x, 1.0, 3), ValueError, "unknown scale layout: 3; sfLayout"),
        (lambda x: fi.mxfp8_quantize(x, sf_swizzle_layout="linear"), ValueError, "'linear'; sf_sw"),
        (lambda x: fi.is_gated_activation(99), ValueError, "99; activation_type must be"),
        (lambda x: fi.is_trtllm_moe_supported(D.E2m1, 7), ValueError, "7; dtype_act must be"),
        (
            lambda x: fi.trtllm_moe_allocate_routing_metadata(
                x.int(), num_experts=4, top_k=64, local_expert_offset=0, num_local_experts=4,
                tile_n=8, routing_input_mode=5,
            ),
            ValueError,
            "5; routing_input_mode must be a RoutingInputMode",
        ),
    ],
)  # fmt: skip
def test_unknown_values_of_enumerations(call, error, part):
    with pytest.raises(error, match=part):
        call(cl.normal((2, 64), 0))


def test_dtype_deduction_and_support():
    codes, e4m3 = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 128).to(torch.float8_e4m3fn)
    deduce = fi.deduce_trtllm_gen_tensor_dtype
    assert deduce(e4m3.bfloat16(), None) == D.Bfloat16
    assert deduce(e4m3, None) == D.E4m3
    assert deduce(e4m3, codes) == D.MxE4m3
    assert deduce(codes, torch.zeros(32)) == D.E2m1
    assert deduce(codes, torch.zeros(4, 4)) == D.MxE2m1
    supported = {(w, a) for w in D for a in D if fi.is_trtllm_moe_supported(w, a)}
    mixed = {(D.MxE2m1, D.MxE4m3), (D.MxE2m1, D.E4m3), (D.MxE2m1, D.Bfloat16)}
    assert supported == {(d, d) for d in (D.Bfloat16, D.E4m3, D.E2m1)} | mixed


# --- layouts

MAP16 = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
MAP32 = [8 * (old % 4) + old // 4 for old in range(32)]


def kinds(tensor):
    return [tensor, tensor.numpy()]


def test_row_orders():
    rows = torch.arange(96, dtype=torch.uint8)[:, None].expand(96, 3).contiguous()
    for x in kinds(rows):
        paired = np.asarray(fi.reorder_rows_for_gated_act_gemm(x))[:, 0]
        assert paired[:6].tolist() == [0, 48, 1, 49, 2, 50]
        for tile, block, order in ((128, 32, MAP32), (64, 16, MAP16)):
            stored = np.asarray(fi.shuffle_matrix_a(x, tile))[:, 0]
            for old in range(96):
                assert stored[old // block * block + order[old % block]] == old
    with pytest.raises(AssertionError, match="100 rows, wanted a multiple of 32"):
        fi.shuffle_matrix_a(torch.zeros(100, 2), 128)
    with pytest.raises(AssertionError, match="even"):
        fi.reorder_rows_for_gated_act_gemm(torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 4), (130, 7), (2, 128, 6)])
def test_scale_interleave(shape, dtype):
    scales = torch.randint(1, 99, shape).to(dtype)
    flat = fi.block_scale_interleave(scales)
    experts, rows, cols = (1, *shape) if len(shape) == 2 else shape
    each = -(-rows // 128) * 128 * (-(-cols // 4) * 4)
    wanted = torch.zeros(experts * each, dtype=dtype)
    source = scales.reshape(experts, rows, cols)
    for e, m, k in np.ndindex(experts, rows, cols):
        tile = (m // 128) * -(-cols // 4) * 512 + (k // 4) * 512
        wanted[e * each + tile + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4] = source[e, m, k]
    assert (flat == wanted).all()
    bits = scales.view(torch.uint16).numpy() if dtype == torch.bfloat16 else scales.numpy()
    np.testing.assert_array_equal(
        fi.block_scale_interleave(bits), flat.view(torch.uint8).numpy().view(bits.dtype)
    )
    with pytest.raises(AssertionError, match="wanted uint8 or bfloat16"):
        fi.block_scale_interleave(scales.float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_scales_are_shuffled_alike_for_both_block_sizes(dtype):
    scales = torch.randint(1, 99, (128, 6)).to(dtype)
    first, second = (fi.shuffle_matrix_sf_a(scales, 128, vec) for vec in (16, 32))
    assert torch.equal(first, second)
    assert torch.equal(first, fi.block_scale_interleave(fi.shuffle_matrix_a(scales, 128)))


def test_blocks_and_cached_indices():
    x = torch.arange(6 * 8).view(6, 8)
    blocks = fi.convert_to_block_layout(x, 4)
    assert blocks.shape == (2, 6, 4)
    for kb, m, j in np.ndindex(2, 6, 4):
        assert blocks[kb, m, j] == x[m, kb * 4 + j]
    cache = {}
    w1, w2 = torch.zeros(256, 8, dtype=torch.uint8), torch.zeros(128, 8, dtype=torch.uint8)
    index = fi._maybe_get_cached_w3_w1_permute_indices(cache, w1, 128)
    reorder = fi.get_reorder_rows_for_gated_act_gemm_row_indices(w1)
    assert (index == reorder[fi.get_shuffle_matrix_a_row_indices(w1, 128)]).all()
    assert fi._maybe_get_cached_w3_w1_permute_indices(cache, w1, 128) is index
    plain = fi._maybe_get_cached_w3_w1_permute_indices(cache, w1, 128, None, False)
    assert (plain == fi.get_shuffle_matrix_a_row_indices(w1, 128)).all()
    second = fi.get_w2_permute_indices_with_cache(cache, w2, 128, 16)
    assert (second == fi.get_shuffle_matrix_sf_a_row_indices(w2, 128)).all()
    assert len(cache) == 3


def test_import_does_not_import_torch():
    code = "import sys, hopyard.compat.flashinfer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
