# SPDX-License-Identifier: Apache-2.0
"""Layers for the compat tests: FlashInfer's arguments of every mode, and the layer they stand for.

Weights are quantised with the compat quantisers, decoded by the definitions of compat_reference,
and put into the layouts that FlashInfer's recipes prescribe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import compat_reference as ref
import hopyard
import hopyard.compat.flashinfer as fi

ACTIVATIONS = {
    "swiglu": fi.ActivationType.Swiglu,
    "geglu": fi.ActivationType.Geglu,
    "situ": fi.ActivationType.Situ,
    "relu2": fi.ActivationType.Relu2,
    "identity": fi.ActivationType.Identity,
}
# Torch sees a GPU, and the library was built for it.
CUDA = (
    torch.cuda.is_available() and hopyard.explain(hopyard.MoeSpec(128, 128, 4, 2), "cuda").supported
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not CUDA, reason="no GPU, or a library without its kernels"),
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Small tensors: torch's threads would wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Sizes:
    hidden: int = 256
    inter: int = 128
    experts: int = 8
    top_k: int = 2
    tokens: int = 8


@dataclass
class Case:
    """One layer in one mode.

    Attributes:
        mode: key of MODES.
        sizes: of the layer.
        arguments: of the operation, without routing.
        layer: what they stand for.
        x: decoded hidden states.
        places: of every expert in `layer`, where several have the same weights.
    """

    mode: str
    sizes: Sizes
    arguments: dict
    layer: ref.Layer
    x: torch.Tensor
    activation: str
    places: torch.Tensor | None = None


def normal(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def split(weights, gated):
    """(gate, up) of [E, rows, K]: up rows come first."""
    if not gated:
        return weights, None
    inter = weights.shape[1] // 2
    return weights[:, inter:], weights[:, :inter]


def shuffled(weights, gated, tile=128):
    """Every expert's rows: gate and up in turn, then shuffled."""
    rows = []
    for one in weights.view(torch.uint8) if weights.dtype != torch.uint8 else weights:
        one = fi.reorder_rows_for_gated_act_gemm(one) if gated else one
        rows.append(fi.shuffle_matrix_a(one, tile))
    return torch.stack(rows)


def shuffled_scales(scales, gated):
    stored = []
    for one in scales:
        one = fi.reorder_rows_for_gated_act_gemm(one) if gated else one
        stored.append(fi.shuffle_matrix_sf_a(one, 128, 16).reshape(one.shape))
    return torch.stack(stored)


def in_blocks(weights, size):
    return torch.stack([fi.convert_to_block_layout(one, size) for one in weights])


def each(weights, quantize):
    pairs = [quantize(one) for one in weights]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def bf16_weights(w1, w2, gated):
    def stored(w, g):
        return in_blocks(shuffled(w.view(torch.uint8), g), 128).view(torch.bfloat16)

    arrays = {"gemm1_weights": stored(w1, gated), "gemm2_weights": stored(w2, False)}
    return arrays, w1.double(), w2.double(), None


def deepseek_weights(w1, w2, gated, form="unshuffled"):
    arrays, decoded = {}, []
    for name, w in (("gemm1", w1), ("gemm2", w2)):
        one = hopyard.quantize(w, "fp8_block128")
        codes = one.codes
        scale = one.scales.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
        decoded.append(codes.double() * scale)
        if form != "unshuffled":
            codes = shuffled(codes, False, 64).view(torch.float8_e4m3fn)
        if form == "blocks":
            codes = in_blocks(codes.view(torch.uint8), 128).view(torch.float8_e4m3fn)
        arrays |= {f"{name}_weights": codes, f"{name}_weights_scale": one.scales}
    arrays["use_shuffled_weight"] = form != "unshuffled"
    blocks = form == "blocks"
    arrays["weight_layout"] = fi.WeightLayout.BlockMajorK if blocks else fi.WeightLayout.MajorK
    return arrays, *decoded, None


def mxfp8_weights(w1, w2, gated):
    arrays, decoded = {}, []
    for name, w, g in (("gemm1", w1, gated), ("gemm2", w2, False)):
        codes, scales = each(
            w, lambda m: (lambda q, s: (q, s.view(len(m), -1)))(*fi.mxfp8_quantize(m, False))
        )
        decoded.append(ref.with_scales(codes.double(), ref.decode_e8m0(scales), 32))
        arrays[f"{name}_weights"] = shuffled(codes, g).view(torch.float8_e4m3fn)
        arrays[f"{name}_weights_scale"] = shuffled_scales(scales, g)
    arrays |= {
        "use_shuffled_weight": True,
        "fp8_quantization_type": fi.Fp8QuantizationType.MxFp8,
    }
    return arrays, *decoded, None


def fp4_weights(w1, w2, gated, block):
    """NVFP4 (16) with a multiplier per expert, or MXFP4 (32)."""
    arrays, decoded, multipliers = {}, [], []
    for name, w, g in (("gemm1", w1, gated), ("gemm2", w2, False)):
        amax = w.float().abs().amax((1, 2))
        multiplier = torch.exp2(torch.floor(torch.log2(2688 / amax)))
        multiplier = multiplier if block == 16 else torch.ones_like(multiplier)
        pairs = [
            fi.fp4_quantize(one, m[None], block, block == 32, is_sf_swizzled_layout=False)
            for one, m in zip(w, multiplier, strict=True)
        ]
        codes = torch.stack([p[0] for p in pairs])
        scales = torch.stack([p[1] for p in pairs])
        values = (
            scales.view(torch.float8_e4m3fn).double() if block == 16 else ref.decode_e8m0(scales)
        )
        values = values / multiplier.double()[:, None, None]
        decoded.append(ref.with_scales(ref.decode_e2m1(codes), values, block))
        arrays[f"{name}_weights"] = shuffled(codes, g)
        arrays[f"{name}_weights_scale"] = shuffled_scales(scales, g).view(torch.float8_e4m3fn)
        multipliers.append(multiplier)
    return arrays, *decoded, multipliers


def per_tensor_weights(w1, w2, gated):
    arrays, decoded, multipliers = {}, [], []
    for name, w, g in (("gemm1", w1, gated), ("gemm2", w2, False)):
        multiplier = 448 / w.float().abs().amax((1, 2))
        codes = (w.float() * multiplier[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        decoded.append(codes.double() / multiplier.double()[:, None, None])
        arrays[f"{name}_weights"] = shuffled(codes, g).view(torch.float8_e4m3fn)
        multipliers.append(multiplier)
    return arrays, *decoded, multipliers


def mxint4_weights(w1, w2, gated):
    arrays, decoded = {}, []
    for name, w, g in (("gemm1", w1, gated), ("gemm2", w2, False)):
        one = hopyard.quantize(w, "mxint4")
        decoded.append(ref.with_scales(ref.decode_int4(one.codes), one.scales.double(), 32))
        arrays[f"{name}_weights"] = in_blocks(shuffled(one.codes, g), 128)
        arrays[f"{name}_weights_scale"] = shuffled_scales(one.scales, g)
    return arrays, *decoded, None


WEIGHTS = {
    "bf16": bf16_weights,
    "deepseek": deepseek_weights,
    "deepseek_shuffled": lambda *a: deepseek_weights(*a, form="shuffled"),
    "deepseek_blocks": lambda *a: deepseek_weights(*a, form="blocks"),
    "mxfp8": mxfp8_weights,
    "per_tensor": per_tensor_weights,
    "nvfp4": lambda *a: fp4_weights(*a, 16),
    "nvfp4_per_token": lambda *a: fp4_weights(*a, 16),
    "mxfp4_mxfp8": lambda *a: fp4_weights(*a, 32),
    "mxfp4_bf16": lambda *a: fp4_weights(*a, 32),
    "mxfp4_e4m3": lambda *a: fp4_weights(*a, 32),
    "mxint4": mxint4_weights,
}
OPERATIONS = {
    "bf16": "trtllm_bf16",
    "deepseek": "trtllm_fp8_block_scale",
    "deepseek_shuffled": "trtllm_fp8_block_scale",
    "deepseek_blocks": "trtllm_fp8_block_scale",
    "mxfp8": "trtllm_fp8_block_scale",
    "per_tensor": "trtllm_fp8_per_tensor_scale",
    "mxint4": "trtllm_mxint4_block_scale",
}
# FlashInfer's share of close elements, and the worst row.
PERCENT = {"bf16": 0.925, "per_tensor": 0.92, "mxint4": 0.925, "nvfp4_per_token": 0.9}
TOLERANCE = {"bf16": 0.01, "mxint4": 0.01, "mxfp4_bf16": 0.01, "nvfp4": 0.1, "nvfp4_per_token": 0.1}
OPTIONAL_FP4 = [
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_bias",
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
]


def percent_of(mode):
    return PERCENT.get(mode, 0.92 if "fp4" in mode else 0.79)


def hidden_states(mode, x):
    """Arguments, decoded values [T, H] in double, and the multiplier that was used."""
    tokens = len(x)
    if mode in ("bf16", "mxint4"):
        return {"hidden_states": x}, x.double(), None
    if mode == "mxfp4_bf16":
        return {"hidden_states": x, "hidden_states_scale": None}, x.double(), None
    if mode.startswith("deepseek"):
        one = hopyard.quantize(x, "fp8_block1x128")
        arrays = {"hidden_states": one.codes, "hidden_states_scale": one.scales.T.contiguous()}
        return arrays, ref.with_scales(one.codes.double(), one.scales, 128), None
    if mode in ("mxfp8", "mxfp4_mxfp8"):
        codes, scales = fi.mxfp8_quantize(x, False)
        scales = scales.view(tokens, -1)
        values = ref.with_scales(codes.double(), ref.decode_e8m0(scales), 32)
        if mode == "mxfp4_mxfp8":
            scales = scales.view(torch.float8_e4m3fn)
        return {"hidden_states": codes, "hidden_states_scale": scales}, values, None
    if mode in ("per_tensor", "mxfp4_e4m3"):
        multiplier = torch.tensor(32.0)
        codes = (x.float() * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
        arrays = {"hidden_states": codes}
        if mode == "mxfp4_e4m3":
            arrays["hidden_states_scale"] = None
        return arrays, codes.double() / multiplier, multiplier
    return nvfp4_hidden(mode, x)


def nvfp4_hidden(mode, x):
    if mode == "nvfp4":
        multiplier = torch.exp2(torch.floor(torch.log2(2688 / x.float().abs().max())))
        codes, scales = fi.fp4_quantize(x, multiplier[None], is_sf_swizzled_layout=False)
        values = scales.view(torch.float8_e4m3fn).double() / multiplier.double()
        per_token = {}
    else:
        steps = x.float().abs().amax(1).clamp(min=1e-6) / 2688
        steps = torch.exp2(torch.ceil(torch.log2(steps)))
        pairs = [
            fi.fp4_quantize(row[None], 1 / step[None], is_sf_swizzled_layout=False)
            for row, step in zip(x, steps, strict=True)
        ]
        codes = torch.cat([p[0] for p in pairs])
        scales = torch.cat([p[1] for p in pairs])
        values = scales.view(torch.float8_e4m3fn).double() * steps.double()[:, None]
        per_token, multiplier = {"per_token_scale": steps}, torch.tensor(1.0)
    arrays = {
        "hidden_states": codes,
        "hidden_states_scale": scales.view(torch.float8_e4m3fn),
        **per_token,
    }
    return arrays, ref.with_scales(ref.decode_e2m1(codes), values, 16), multiplier


def rounding(mode, multiplier):
    """How a mode rounds the activation of an expert."""
    if mode.startswith("deepseek"):
        return lambda values, _: ref.round_1x128(values)
    if mode in ("mxfp8", "mxfp4_mxfp8"):
        return lambda values, _: ref.round_mxfp8(values)
    if mode in ("per_tensor", "mxfp4_e4m3"):
        return lambda values, _: ref.e4m3(values * multiplier) / multiplier
    if mode == "nvfp4":
        return lambda values, _: ref.round_nvfp4(values, multiplier)
    if mode == "nvfp4_per_token":
        return lambda values, _: ref.round_nvfp4_rows(values)
    return lambda values, _: ref.bf16(values)


def stored(mode, hidden, inter, experts, gated, seed):
    """Weights of a mode: its arrays, both matrices decoded, and their multipliers."""
    rows = (2 if gated else 1) * inter
    w1 = normal((experts, rows, hidden), seed, hidden**-0.5)
    w2 = normal((experts, hidden, inter), seed + 1, inter**-0.5)
    return WEIGHTS[mode](w1, w2, gated)


def make(mode, sizes=None, activation="swiglu", seed=0, device="cpu", weights=stored, **options):
    """A case; options: bias=True, alpha, beta, limit (lists, natural units), zero=True."""
    s = sizes or Sizes()
    if mode == "mxint4":  # blocks of 256 columns
        s = replace(s, inter=max(s.inter, 256))
    gated = activation not in ("relu2", "identity")
    arrays, d1, d2, multipliers = weights(mode, s.hidden, s.inter, s.experts, gated, seed)
    x = normal((s.tokens, s.hidden), seed + 2, 0.0 if options.get("zero") else 2.0)
    hidden, decoded, g_x = hidden_states(mode, x)
    gate, up = split(d1, gated)
    layer = ref.Layer(gate, up, d2, activation)
    g_mid = torch.tensor(64.0) if mode in ("per_tensor", "nvfp4", "mxfp4_e4m3") else None
    round_mid = rounding(mode, g_mid)
    # On a GPU the activation is BF16 before it is rounded to GEMM2's operand (docs/hopper.md).
    on_gpu = torch.device(device).type == "cuda"
    layer.round_mid = (lambda v, e: round_mid(ref.bf16(v), e)) if on_gpu else round_mid
    arguments = {**hidden, **arrays, "intermediate_size": s.inter}
    if "fp4" in mode:
        arguments |= dict.fromkeys(name for name in OPTIONAL_FP4 if name not in arguments)
    elif mode == "mxint4":
        arguments |= dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"))
    elif mode == "per_tensor":
        arguments["use_routing_scales_on_input"] = False
    a, o = add_scalars(mode, arguments, multipliers, (g_x, g_mid), s.experts, activation)
    add_bias(arguments, layer, options, (a, o), seed)
    add_parameters(arguments, layer, options, a, activation)
    if mode not in ("mxint4",):
        arguments["activation_type"] = ACTIVATIONS[activation]
    arguments = {name: move(value, device) for name, value in arguments.items()}
    return Case(mode, s, arguments, layer, decoded, activation)


def arrays_of_experts(case):
    """The arguments of a case that have a row for every expert."""
    return {
        name: array
        for name, array in case.arguments.items()
        if isinstance(array, torch.Tensor) and "hidden" not in name and "token" not in name
    }


def spread(case, places):
    """The case with one expert for each of `places`, which has the weights that are there."""
    places = torch.as_tensor(places)
    arguments = dict(case.arguments)
    for name, array in arrays_of_experts(case).items():
        bytes_ = array.view(torch.uint8) if array.element_size() == 1 else array
        arguments[name] = bytes_[places.to(array.device)].view(array.dtype)
    sizes = replace(case.sizes, experts=len(places))
    return replace(case, sizes=sizes, arguments=arguments, places=places)


def move(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def add_scalars(mode, arguments, multipliers, globals_, experts, activation):
    """The three scalars; returns s_ab and output2_scale_scalar, ones where there are none."""
    g_x, g_mid = globals_
    ones = torch.ones(experts)
    if mode not in ("per_tensor", "nvfp4", "nvfp4_per_token", "mxfp4_e4m3"):
        return ones, ones
    g_w1, g_w2 = multipliers
    a = 1 / (g_w1 * g_x)
    mid = ones if g_mid is None else ones * g_mid
    o = 1 / (mid * g_w2)
    alone = activation in ("situ", "relu2", "identity")
    word = "scales" if mode == "per_tensor" else "scale"
    arguments[f"output1_{word}_scalar"] = mid if alone else mid * a
    arguments[f"output1_{word}_gate_scalar"] = a
    arguments[f"output2_{word}_scalar"] = o
    return a, o


def add_bias(arguments, layer, options, scales, seed):
    if not options.get("bias"):
        return
    a, o = scales
    experts, inter, _ = layer.gate.shape
    hidden = layer.down.shape[1]
    natural = normal((experts, 2 * inter), seed + 3, 0.5).float()
    down = normal((experts, hidden), seed + 4, 0.5).float()
    raw = natural / a[:, None]
    arguments["gemm1_bias"] = torch.stack(
        [
            fi.shuffle_matrix_a(fi.reorder_rows_for_gated_act_gemm(b[:, None]), 128)[:, 0]
            for b in raw
        ]
    ).contiguous()
    raw = down / o[:, None]
    arguments["gemm2_bias"] = torch.stack(
        [fi.shuffle_matrix_a(b[:, None], 128)[:, 0] for b in raw]
    ).contiguous()
    layer.bias = (natural[:, inter:], natural[:, :inter], down)


def add_parameters(arguments, layer, options, a, activation):
    for name, argument in (("alpha", "alpha"), ("beta", "beta"), ("limit", "clamp_limit")):
        if options.get(name) is None:
            continue
        values = torch.tensor(options[name], dtype=torch.float32)
        setattr(layer, name, values)
        raw = name == "limit" or (name == "beta" and activation != "situ")
        arguments[f"gemm1_{argument}"] = values / a if raw else values


def routing_of(sizes, **changes):
    """Routing arguments of an operation."""
    return {
        "num_experts": sizes.experts,
        "top_k": sizes.top_k,
        "n_group": 0,
        "topk_group": 0,
        "local_expert_offset": 0,
        "local_num_experts": sizes.experts,
        "routed_scaling_factor": None,
        "routing_method_type": fi.RoutingMethodType.Renormalize,
        **changes,
    }


def routing_by(rule, case, seed=9):
    """Arguments of `call` that route a case by a rule."""
    logits = logits_of(case, seed, getattr(torch, rule.logits))
    bias = None
    if rule.bias:
        generator = torch.Generator().manual_seed(seed - 4)
        bias = torch.randn(logits.shape[1], generator=generator).to(getattr(torch, rule.bias))
    deepseek = rule.method == "DeepSeekV3"
    arguments = {
        "logits": logits,
        "bias": bias,
        "routing_method_type": fi.RoutingMethodType[rule.method],
        "n_group": rule.groups if deepseek else 0,
        "topk_group": rule.kept if deepseek else 0,
        "routed_scaling_factor": rule.scale,
    }
    if not rule.renormalise:
        arguments["norm_topk_prob"] = False
    return arguments


def method_of(call):
    """What of `routing_by` the routed operations take, too."""
    names = ("routing_method_type", "n_group", "topk_group", "routed_scaling_factor")
    return {name: call[name] for name in names}


NO_BIAS = ("trtllm_bf16_routed_moe", "trtllm_mxint4_block_scale_routed_moe")


def call(case, routed=None, logits=None, bias=None, **changes):
    """Run the operation of a case, from logits or routed by ids."""
    name = OPERATIONS.get(case.mode, "trtllm_fp4_block_scale")
    device = case.arguments["hidden_states"].device
    arguments = {**case.arguments, **routing_of(case.sizes), **changes}
    if routed is None:
        name += "_moe"
        arguments |= {"routing_logits": move(logits, device), "routing_bias": move(bias, device)}
    else:
        name += "_routed_moe"
        arguments["topk_ids"] = routed
        if name not in NO_BIAS:
            arguments["routing_bias"] = None
    result = getattr(fi, name)(**arguments)
    return result[0] if isinstance(result, list) and len(result) == 1 else result


def judge(case, output, ids, weights, **call):
    """compat_reference.judge with what the mode is held to."""
    if case.places is not None:
        places = case.places.to(ids.device)
        ids = torch.where(ids < 0, ids, places[ids.clamp(min=0)])
    return ref.judge(
        case.layer,
        case.x,
        ids,
        weights,
        output,
        percent=percent_of(case.mode),
        tolerance=TOLERANCE.get(case.mode, 0.05),
        **call,
    )


def logits_of(case, seed=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.sizes.tokens, case.sizes.experts, generator=generator).to(dtype)


def bits(tensor):
    return tensor.cpu().view(torch.uint16).numpy()


def same(left, right):
    np.testing.assert_array_equal(bits(left), bits(right))
