# SPDX-License-Identifier: Apache-2.0
"""Signatures, enumerations, weight helpers, quantisers and routing of the compat package, by the
definitions of FlashInfer's documents."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import compat_reference as ref
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
    "shuffle_matrix_a": "input_tensor, epilogue_tile_m",
    "shuffle_matrix_sf_a": "input_tensor, epilogue_tile_m, num_elts_per_sf=16",
    "block_scale_interleave": "unswizzled_sf",
    "e2m1_and_ufp8sf_scale_to_float": "e2m1_tensor, ufp8_scale_tensor, global_scale_tensor=None, "
    "sf_vec_size=16, ufp8_type=1, is_sf_swizzled_layout=True",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    def plain(text):
        namespace = {}
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


# --- quantisers


def test_nvfp4_by_definition():
    x = cl.normal((130, 96), 1, 3.0)
    g = torch.tensor([512.0])
    codes, scales = fi.fp4_quantize(x, g, is_sf_swizzled_layout=False)
    blocks = x.double().view(130, 6, 16)
    wanted = ref.e4m3(blocks.abs().amax(-1) * 512 / 6)
    assert (scales.view(torch.float8_e4m3fn).double() == wanted).all()
    decoded = ref.with_scales(ref.decode_e2m1(codes), wanted / 512, 16)
    nearest = ref.with_scales(
        ref.e2m1((blocks / (wanted / 512)[..., None]).float()).flatten(-2).double(),
        wanted / 512,
        16,
    )
    assert (decoded == nearest).all()
    swizzled = fi.fp4_quantize(x, g)[1]
    assert swizzled.shape == (256, 8)
    assert (swizzled.reshape(-1) == fi.block_scale_interleave(scales)).all()
    small = fi.fp4_quantize(x, g, is_sf_8x4_layout=True)[1].reshape(-1)
    for m, k in np.ndindex(130, 6):
        at = m // 8 * 2 * 32 + k // 4 * 32 + m % 8 * 4 + k % 4
        assert small[at] == scales[m, k]
    inverse = fi.fp4_quantize(x, 1 / g, is_global_scale_inversed=True)
    assert (inverse[0] == codes).all()
    for swizzle, given in ((False, scales), (True, swizzled)):
        values = fi.e2m1_and_ufp8sf_scale_to_float(codes, given, 1 / g, 16, 1, swizzle)
        assert (values.double() == decoded).all()
    again, linear = fi.nvfp4_quantize(x, g, fi.SfLayout.layout_linear)
    assert (again == codes).all()
    assert (linear == scales).all()
    y = cl.normal((128, 64), 2)
    plain, flat = fi.fp4_quantize(y, g, is_sf_swizzled_layout=False)
    stored, stored_scales = fi.nvfp4_quantize(y, g, do_shuffle=True)
    assert (stored == fi.shuffle_matrix_a(plain, 128)).all()
    assert (stored_scales.reshape(-1) == fi.shuffle_matrix_sf_a(flat, 128)).all()


def test_mx_formats_by_definition():
    x = cl.normal((5, 64), 3, 2.0)
    amax = x.double().view(5, 2, 32).abs().amax(-1)
    codes, scales = fi.mxfp4_quantize(x)
    exponent = torch.ceil(torch.log2(amax / 6))
    linear = fi.fp4_quantize(x, None, 32, True, is_sf_swizzled_layout=False)[1]
    assert (linear.double() == exponent + 127).all()
    values = fi.mxfp4_dequantize(codes, scales)
    scaled = x.float().view(5, 2, 32) / torch.exp2(exponent).float()[..., None]
    wanted = ref.with_scales(ref.e2m1(scaled).flatten(-2).double(), torch.exp2(exponent), 32)
    assert (values.double() == wanted).all()
    codes, scales = fi.mxfp8_quantize(x, False)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (10,)
    assert (
        fi.mxfp8_dequantize_host(codes, scales, False).double() == ref.round_mxfp8(x.double())
    ).all()
    padded, more = fi.mxfp8_quantize(x, True, 128)
    assert padded.shape == (5, 128)
    assert more.shape == (512,)
    assert (
        fi.mxfp8_dequantize_host(padded, more)[:, :64].double() == ref.round_mxfp8(x.double())
    ).all()


def test_numpy_quantisers_give_the_same_bytes():
    x = cl.normal((128, 64), 4)
    bits = x.view(torch.uint16).numpy()
    for one, other in zip(fi.fp4_quantize(x, 64.0), fi.fp4_quantize(bits, 64.0), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    codes = fi.mxfp8_quantize(bits)[0]
    np.testing.assert_array_equal(codes, fi.mxfp8_quantize(x)[0].view(torch.uint8).numpy())
    assert fi.e2m1_and_ufp8sf_scale_to_float(*fi.fp4_quantize(bits, 64.0)).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda x: fi.fp4_quantize(x, None, 32), NotImplementedError, "wanted 16 with False"),
        (lambda x: fi.fp4_quantize(x[:, :17]), ValueError, "K a multiple of 16"),
        (lambda x: fi.fp4_quantize(x.int()), ValueError, "input has dtype int32"),
        (lambda x: fi.fp4_quantize(x, torch.ones(2)), ValueError, "has 2 elements"),
        (lambda x: fi.fp4_quantize(x, 0.0), ValueError, "finite number above 0"),
        (lambda x: fi.mxfp8_quantize(x, alignment=48), ValueError, "multiple of 32"),
    ],
)
def test_bad_input_of_quantisers(call, error, part):
    with pytest.raises(error, match=part):
        call(torch.zeros(2, 32))


# --- prepare


def prepared(mode, activation, gated):
    w1, w2 = cl.normal((4, 256 if gated else 128, 256), 0, 0.1), cl.normal((4, 256, 128), 1, 0.1)
    if mode == "mxint4":
        w1, w2 = cl.normal((4, 512, 256), 0, 0.1), cl.normal((4, 256, 256), 1, 0.1)
    usual = {
        "num_local_experts": 4,
        "hidden_size": 256,
        "intermediate_size": 256 if mode == "mxint4" else 128,
        "activation": activation,
    }
    variant = fi.QuantVariant
    if mode in ("nvfp4", "mxfp4_mxfp8"):
        kind = variant.NVFP4 if mode == "nvfp4" else variant.MXFP4
        return w1, w2, fi.prepare_trtllm_fp4_weights(w1, w2, variant=kind, **usual)
    if mode in ("deepseek", "mxfp8"):
        kind = variant.MxFp8 if mode == "mxfp8" else variant.DeepSeekFp8
        return w1, w2, fi.prepare_trtllm_fp8_block_weights(w1, w2, variant=kind, **usual)
    if mode == "per_tensor":
        scales = {"hidden_states_scale_global": 32.0, "intermediate_scale_global": 64.0}
        return w1, w2, fi.prepare_trtllm_fp8_per_tensor_weights(w1, w2, **scales, **usual)
    name = {"mxint4": "prepare_trtllm_mxint4_weights", "bf16": "prepare_trtllm_bf16_weights"}[mode]
    return w1, w2, getattr(fi, name)(w1, w2, **usual)


PREPARED = [("nvfp4", "swiglu"), ("nvfp4", "relu2"), ("mxfp4_mxfp8", "swiglu"), ("mxfp8", "relu2")]
PREPARED += [(m, "swiglu") for m in ("deepseek", "mxfp8", "per_tensor", "mxint4", "bf16")]


@pytest.mark.parametrize(("mode", "activation"), PREPARED)
def test_prepared_weights_are_what_the_recipes_give(mode, activation, monkeypatch):
    gated = activation == "swiglu"
    w1, w2, views = prepared(mode, cl.ACTIVATIONS[activation], gated)
    monkeypatch.setattr(cl.torch, "log2", lambda x: torch.zeros_like(x))  # multipliers of 1
    wanted = cl.WEIGHTS[mode](w1, w2, gated)[0]
    monkeypatch.undo()
    for name in ("gemm1_weights", "gemm2_weights", "gemm1_weights_scale", "gemm2_weights_scale"):
        if name not in wanted:
            continue
        assert views[name].shape == wanted[name].shape
        assert views[name].dtype == wanted[name].dtype
        given, right = views[name].view(torch.uint8), wanted[name].view(torch.uint8)
        share = (
            (given == right).float().mean()
        )  # per tensor: 448 / amax and its inverse round apart
        assert share > (0.99 if mode == "per_tensor" else 0.999999)
    if mode == "per_tensor":
        a = views["output1_scales_gate_scalar"]
        torch.testing.assert_close(a, w1.float().abs().amax((1, 2)) / 448 / 32)
        torch.testing.assert_close(views["output1_scales_scalar"], a * 64)


def test_prepared_activations_run():
    _, _, views = prepared("nvfp4", None, True)
    x = cl.normal((8, 256), 5)
    codes, scales = fi.prepare_trtllm_fp4_activations(x, variant=fi.QuantVariant.NVFP4)
    assert codes.shape == (8, 128)
    assert scales.shape == (8, 16)
    usual = cl.routing_of(cl.Sizes(256, 128, 4, 2, 8))
    rest = dict.fromkeys(n for n in cl.OPTIONAL_FP4 if n not in views)
    output = fi.trtllm_fp4_block_scale_moe(
        torch.zeros(8, 4), None, codes, scales, intermediate_size=128, **views, **rest, **usual
    )
    assert output[0].abs().max() > 0
    mx = fi.prepare_trtllm_fp8_block_activations(x, variant=fi.QuantVariant.MxFp8)
    assert [t.shape for t in mx] == [(8, 256), (8, 8)]
    deepseek = fi.prepare_trtllm_fp8_block_activations(x, variant=fi.QuantVariant.DeepSeekFp8)
    assert [t.shape for t in deepseek] == [(8, 256), (2, 8)]
    plain = fi.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=32.0)
    assert (plain[0].float() == (x.float() * 32).clamp(-448, 448).to(plain[0].dtype).float()).all()
    with pytest.raises(ValueError, match="one finite positive number"):
        fi.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=-1.0)
    with pytest.raises(ValueError, match="wanted one of QuantVariant"):
        fi.prepare_trtllm_fp4_activations(x, variant=fi.QuantVariant.BF16)


# --- routing


def tie_free(tokens, experts, hot=None):
    generator = torch.Generator().manual_seed(tokens + experts)
    rows = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
    logits = (torch.stack(rows) + 1).float() / 32
    if hot is not None:
        logits[:, hot] += 8
    return logits


GEN = [
    ("Default", 16, 4, {}),
    ("Renormalize", 256, 8, {}),
    ("RenormalizeNaive", 16, 1, {}),
    ("TopK", 16, 4, {}),
    ("SigmoidRenorm", 16, 4, {}),
    ("Sigmoid", 256, 8, {}),
    ("MiniMax2", 256, 6, {"scale": 2.0}),
    ("Llama4", 16, 1, {}),
    ("DeepSeekV3", 256, 8, {"groups": 8, "kept": 4, "scale": 2.5}),
    ("DeepSeekV3", 160, 8, {"groups": 1, "kept": 1}),
    ("DeepSeekV3", 512, 22, {"groups": 1, "kept": 1}),
]


@pytest.mark.parametrize("shard", [None, (0, 2), (1, 4)])
@pytest.mark.parametrize("tile", [8, 32])
@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize(("method", "experts", "top_k", "options"), GEN)
def test_trtllm_gen_routing(method, experts, top_k, options, tokens, tile, shard):
    logits = tie_free(tokens, experts, hot=3 if tile == 32 else None)
    local = experts if shard is None else experts // shard[1]
    offset = 0 if shard is None else shard[0] * local
    r = fi.trtllm_gen_routing(
        logits,
        None,
        METHOD[method],
        top_k,
        n_group=options.get("groups", 0),
        topk_group=options.get("kept", 0),
        routed_scaling_factor=options.get("scale", 1.0),
        tile_tokens_dim=tile,
        local_expert_offset=offset,
        local_num_experts=local,
    )
    ids, weights = ref.route(method, logits, top_k, **options)
    here = (ids >= offset) & (ids < offset + local)
    counts = torch.bincount((ids[here] - offset), minlength=local)
    padded = (counts + tile - 1) // tile * tile
    e2p = r.expanded_idx_to_permuted_idx.long()
    assert int(r.total_num_padded_tokens) == padded.sum()
    assert ((e2p == -1) == ~here).all()
    assert (torch.where(here, ids, -1) == r.topk_ids).all()
    torch.testing.assert_close(r.topk_weights.double(), weights, rtol=0.01, atol=1e-3)
    rows = e2p[here]
    assert rows.unique().numel() == rows.numel()
    starts = padded.cumsum(0) - padded
    own = ids[here] - offset
    assert ((rows >= starts[own]) & (rows < starts[own] + counts[own])).all()
    tokens_of = torch.nonzero(here)[:, 0]
    assert (r.permuted_idx_to_token_idx.long()[rows] == tokens_of).all()
    tiles = int(r.num_non_exiting_ctas)
    assert tiles == padded.sum() // tile
    batch, limit = r.cta_idx_xy_to_batch_idx[:tiles], r.cta_idx_xy_to_mn_limit[:tiles]
    assert (batch == torch.repeat_interleave(torch.arange(local), padded // tile)).all()
    ends = (torch.arange(tiles) + 1) * tile
    assert (limit == torch.minimum(ends, (starts + counts)[batch.long()])).all()


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


@pytest.mark.parametrize("scores_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(256, 8, 4, 8), (384, 1, 1, 1)])
def test_fused_topk_deepseek(experts, groups, kept, top_k, bias_type, scores_type):
    scores = tie_free(16, experts).to(scores_type)
    bias = (torch.arange(experts) / experts * 0.01).to(bias_type)
    values = torch.zeros(16, top_k, dtype=scores_type)
    ids = torch.zeros(16, top_k, dtype=torch.int32)
    replay = torch.full((20, top_k), -1, dtype=torch.int16)
    arguments = (scores, bias, groups, kept, top_k, 2.5, values, ids)
    assert fi.fused_topk_deepseek(*arguments, routing_replay_out=replay) is None
    wanted, weights = ref.route(
        "DeepSeekV3", scores.float(), top_k, bias=bias, groups=groups, kept=kept, scale=2.5
    )
    assert (ids == wanted).all()
    assert (replay[:16] == ids).all()
    assert (replay[16:] == -1).all()
    torch.testing.assert_close(values.double(), weights, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("shared", [0, 1])
def test_hash_topk(shared):
    logits = cl.normal((6, 16), 3).float()
    table = torch.randint(0, 16, (10, 4), dtype=torch.int32)
    tokens = torch.tensor([0, 9, 3, 3, 5, 1])
    weights, ids = fi.hash_topk(logits, tokens, table, shared, 2.5)
    assert (ids[:, :4] == table[tokens]).all()
    score = torch.sqrt(torch.nn.functional.softplus(logits.double()))
    chosen = score.gather(1, ids[:, :4].long())
    wanted = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(weights[:, :4].double(), wanted, rtol=1e-5, atol=1e-7)
    if shared:
        assert (ids[:, 4] == 16).all()
        assert (weights[:, 4] == 1 / 2.5).all()


# --- autotune


def test_autotune_runs_the_usual_kernels_and_says_so(caplog):
    from hopyard.compat.flashinfer import tuning

    tuning._say_once.cache_clear()
    for tokens in (1, 16):
        case = cl.make("nvfp4", cl.Sizes(256, 128, 16, 4, tokens))
        packed = fi.pack_topk_ids(torch.arange(4).expand(tokens, 4).int(), torch.ones(tokens, 4))
        outside = cl.call(case, routed=packed)
        with caplog.at_level(logging.WARNING), fi.autotune(True, tuning_buckets=(1, 16)):
            cl.same(cl.call(case, routed=packed), outside)
    assert len([r for r in caplog.records if "no autotuner yet" in r.message]) == 1


def test_import_does_not_import_torch():
    code = "import sys, hopyard.compat.flashinfer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
