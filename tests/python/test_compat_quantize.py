# SPDX-License-Identifier: Apache-2.0
"""Quantisers and `prepare_*` helpers of the compat package, by the definitions of FlashInfer's
documents."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import compat_layers as cl
import compat_reference as ref
import hopyard
import hopyard.compat.flashinfer as fi
from compat_layers import one_torch_thread  # noqa: F401

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
        (lambda x: fi.fp4_quantize(x[:, :0]), ValueError, "K a multiple of 16"),
        (lambda x: fi.mxfp8_quantize(x, alignment=48), ValueError, "multiple of 32"),
        (lambda x: fi.mxfp8_quantize(x.to("meta")), ValueError, "input is a meta tensor"),
        (
            lambda x: fi.mxfp8_dequantize_host(x.char(), x.to("meta").char()),
            ValueError,
            "the scale tensor is a meta tensor",
        ),
        (
            lambda x: fi.prepare_trtllm_fp8_block_activations(
                x.bfloat16().to("meta"), variant=fi.QuantVariant.DeepSeekFp8
            ),
            ValueError,
            "hidden_states_bf16 is a meta tensor",
        ),
    ],
)
def test_bad_input_of_quantisers(call, error, part):
    with pytest.raises(error, match=part):
        call(torch.zeros(2, 32))


def all_kinds(bits):
    """torch and NumPy arrays of the same bfloat16 values."""
    return bits, bits.view(torch.uint16).numpy()


def test_no_tokens():
    g = torch.tensor([64.0])
    for x in all_kinds(torch.zeros(0, 256).bfloat16()):
        for swizzled in (False, True):
            codes, scales = fi.fp4_quantize(x, g, is_sf_swizzled_layout=swizzled)
            assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 128), (0, 16))
            assert tuple(fi.e2m1_and_ufp8sf_scale_to_float(codes, scales).shape) == (0, 256)
            codes, scales = fi.mxfp8_quantize(x, swizzled)
            assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 256), (0,))
            assert tuple(fi.mxfp8_dequantize_host(codes, scales, swizzled).shape) == (0, 256)
        for options in ({"do_shuffle": True}, {"sfLayout": fi.SfLayout.layout_8x4}):
            codes, scales = fi.nvfp4_quantize(x, g, **options)
            assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 128), (0, 16))
        codes, scales = fi.mxfp4_quantize(x)
        assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 128), (0, 8))
        assert tuple(fi.mxfp4_dequantize(codes, scales).shape) == (0, 256)
        V = fi.QuantVariant
        for variant, wanted in ((V.NVFP4, (0, 16)), (V.MXFP4, (0, 8))):
            scales = fi.prepare_trtllm_fp4_activations(x, variant=variant)[1]
            assert tuple(scales.shape) == wanted
        for variant, wanted in ((V.MxFp8, (0, 8)), (V.DeepSeekFp8, (2, 0))):
            codes, scales = fi.prepare_trtllm_fp8_block_activations(x, variant=variant)
            assert (tuple(codes.shape), tuple(scales.shape)) == ((0, 256), wanted)
        codes, _ = fi.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=2.0)
        assert tuple(codes.shape) == (0, 256)
    assert fi.fp4_quantize(torch.zeros(3, 0, 32))[0].shape == (3, 0, 16)


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
PREPARED += [("per_tensor", "relu2")]
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
        share = (given == right).float().mean()
        # per tensor: 448 / amax and its inverse round apart
        assert share > (0.99 if mode == "per_tensor" else 0.999999)
    if mode == "per_tensor":
        a = views["output1_scales_gate_scalar"]
        torch.testing.assert_close(a, w1.float().abs().amax((1, 2)) / 448 / 32)
        torch.testing.assert_close(
            views["output1_scales_scalar"], a * 64 if gated else torch.full((4,), 64.0)
        )


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
    block, per_tensor = (
        lambda x: fi.prepare_trtllm_fp8_block_activations(x, variant=fi.QuantVariant.MxFp8),
        lambda x: fi.prepare_trtllm_fp8_per_tensor_activations(x, hidden_states_scale_global=1.0),
    )
    for prepare in (block, per_tensor):
        with pytest.raises(ValueError, match="hidden_states_bf16 is float32, wanted bfloat16"):
            prepare(x.float())
        with pytest.raises(ValueError, match=r"has shape \[256\], wanted \[tokens, hidden\]"):
            prepare(x[0])
    with pytest.raises(TypeError, match="hidden_states_bf16 is float32, wanted bfloat16"):
        fi.prepare_trtllm_fp4_activations(x.float(), variant=fi.QuantVariant.MXFP4)


def test_per_tensor_scales_of_zeros_and_of_no_numbers():
    w1, w2 = cl.normal((2, 256, 128), 0), cl.normal((2, 128, 128), 1)
    sizes = {"num_local_experts": 2, "hidden_size": 128, "intermediate_size": 128}
    given = {"hidden_states_scale_global": 32.0, "intermediate_scale_global": 64.0, **sizes}
    w1[1] = 0
    views = fi.prepare_trtllm_fp8_per_tensor_weights(w1, w2, **given)
    assert views["output1_scales_gate_scalar"][1] == 1 / 32
    assert (views["gemm1_weights"][1].float() == 0).all()
    for value in (torch.nan, torch.inf):
        w2[0, 3, 5] = value
        with pytest.raises(ValueError, match="w2_bf16 holds values that are not finite"):
            fi.prepare_trtllm_fp8_per_tensor_weights(w1, w2, **given)


CUTLASS = {"num_local_experts": 4, "hidden_size": 256, "intermediate_size": 128}


def layer_of(views, weights):
    """A layer of Hopyard over what a `prepare_cutlass_*` function returned."""
    spec = hopyard.MoeSpec(256, 128, 4, 2, weights=weights)
    matrices = {
        f"gemm{i}": hopyard.Matrix(
            views[f"fc{i}_expert_weights"], scales=views.get(f"fc{i}_expert_scales")
        )
        for i in (1, 2)
    }
    experts = hopyard.ExpertWeights(**matrices, row_order="up_gate")
    return hopyard.MoeLayer(spec, hopyard.Weights(spec, experts), 8)


def test_cutlass_weights_are_the_same_layer():
    w1, w2 = cl.normal((4, 256, 256), 0, 0.1), cl.normal((4, 256, 128), 1, 0.1)
    x, logits = cl.normal((8, 256), 5), cl.normal((8, 4), 6).float()
    usual = {"intermediate_size": 128, **cl.routing_of(cl.Sizes(256, 128, 4, 2, 8))}
    gaps = torch.cat([w1, w1], -1)[..., :256]
    views = fi.prepare_cutlass_bf16_weights(gaps, w2, **CUTLASS)
    assert sorted(views) == ["fc1_expert_weights", "fc2_expert_weights"]
    assert all(v.is_contiguous() for v in views.values())
    cl.same(views["fc1_expert_weights"], w1)
    cl.same(views["fc2_expert_weights"], w2)
    prepared = fi.prepare_trtllm_bf16_weights(w1, w2, **CUTLASS)
    wanted = fi.trtllm_bf16_moe(logits, None, x, **prepared, **usual)
    cl.same(layer_of(views, "bf16")(x, logits=logits), wanted)
    major = {"use_shuffled_weight": False, "weight_layout": fi.WeightLayout.MajorK}
    cl.same(fi.trtllm_bf16_moe(logits, None, x, *views.values(), **usual, **major), wanted)

    views = fi.prepare_cutlass_w4a16_weights(w1, w2, **CUTLASS)
    assert views["fc1_expert_weights"].shape == (4, 256, 128)
    assert views["fc2_expert_scales"].shape == (4, 256, 4)
    kind = fi.QuantVariant.W4A16
    prepared = fi.prepare_trtllm_fp4_weights(w1, w2, variant=kind, **CUTLASS)
    rest = dict.fromkeys(n for n in [*cl.OPTIONAL_FP4, "hidden_states_scale"] if n not in prepared)
    wanted = fi.trtllm_fp4_block_scale_moe(logits, None, x, **prepared, **rest, **usual)[0]
    cl.same(layer_of(views, "mxfp4")(x, logits=logits), wanted)
    bits = [w.view(torch.uint16).numpy() for w in (w1, w2)]
    for name, array in fi.prepare_cutlass_w4a16_weights(*bits, **CUTLASS).items():
        np.testing.assert_array_equal(array, views[name].numpy())


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"w1_bf16": torch.zeros(4, 256, 256)}, TypeError, "w1_bf16 is float32, wanted bfloat16"),
        ({"w2_bf16": cl.normal((4, 256, 64), 0)}, ValueError, "wanted [4, 256, 128]"),
        ({"activation": cl.ACTIVATIONS["relu2"]}, ValueError, "wanted [4, 128, 256]"),
        ({"num_local_experts": 0}, ValueError, "num_local_experts is 0, wanted at least 1"),
        ({"w1_bf16": torch.zeros(4, 256, 256).to("meta")}, ValueError, "w1_bf16 is a meta tensor"),
        ({"activation": "nonsense"}, ValueError, "activation is 'nonsense', wanted an Activation"),
    ],
)
@pytest.mark.parametrize("name", ["prepare_cutlass_bf16_weights", "prepare_cutlass_w4a16_weights"])
def test_bad_input_of_the_cutlass_helpers(name, changes, error, part):
    right = {"w1_bf16": cl.normal((4, 256, 256), 0), "w2_bf16": cl.normal((4, 256, 128), 1)}
    with pytest.raises(error) as caught:
        getattr(fi, name)(**(right | CUTLASS | changes))
    assert part in str(caught.value)


def test_sizes_of_prepared_weights():
    for name, w1, w2, sizes, part in (
        ("prepare_cutlass_w4a16_weights", (4, 192, 256), (4, 256, 96), (256, 96), "96, wanted a "),
        ("prepare_trtllm_mxint4_weights", (4, 256, 256), (4, 256, 128), (256, 128), "of 256"),
        ("prepare_trtllm_bf16_weights", (4, 192, 256), (4, 256, 96), (256, 96), "multiple of 64"),
        (
            "prepare_trtllm_fp4_weights",
            (4, 192, 256),
            (4, 256, 96),
            (256, 96),
            "rows of GEMM1 is 192",
        ),
        ("prepare_trtllm_fp4_weights", (4, 256, 160), (4, 160, 128), (160, 128), "multiple of 128"),
    ):
        usual = dict(zip(("hidden_size", "intermediate_size"), sizes, strict=True))
        with pytest.raises(ValueError, match=part):
            getattr(fi, name)(cl.normal(w1, 0), cl.normal(w2, 1), num_local_experts=4, **usual)
