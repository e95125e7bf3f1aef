# SPDX-License-Identifier: Apache-2.0
"""FP4 and INT4 weights."""

from __future__ import annotations

from typing import Any

from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import (
    Problem,
    check_shared,
    problem_of,
)
from hopyard.compat.flashinfer.layouts import swizzled_numel
from hopyard.compat.flashinfer.moe_bf16 import operands_of
from hopyard.compat.flashinfer.moe_fp8 import check_scalar
from hopyard.compat.flashinfer.operands import (
    Layout,
    Operands,
    check_parameters,
    check_weight,
    run,
)
from hopyard.compat.flashinfer.signature import Arguments, entry

_SCALES = ("float8_e4m3fn", "float8_e8m0fnu", "uint8")
_PAIRS = "NvFP4 x NvFP4, MxFP4 x MxFP8, MxFP4 x Bf16 and MxFP4 x E4m3 (weights x activations)"


def _hidden_size(a: Arguments) -> int:
    """Columns of hidden states, from the packed weights."""
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        checks.require(getattr(a, name), name, "an array")
    checks.check_ndim(a.hidden_states, "hidden_states", 2)
    checks.check_contiguous(a.hidden_states, "hidden_states")
    for name in ("gemm1_weights", "gemm2_weights"):
        array = getattr(a, name)
        check(
            ops.is_type(array, "uint8"),
            f"{name} must be packed in uint8, two codes a byte; got {ops.type_of(array)}",
        )
        checks.check_ndim(array, name, 3)
    return 2 * ops.shape_of(a.gemm1_weights)[2]


def _scale_rows(a: Arguments, name: str, p: Problem, layout: Layout) -> Array:
    """The block scales of a stack, one row an expert."""
    array = getattr(a, name)
    block = 16 if layout.weights == "nvfp4" else 32
    first = name.startswith("gemm1")
    rows, cols = (p.rows, p.hidden) if first else (p.hidden, p.inter)
    count = swizzled_numel(rows, -(-cols // block))
    wanted = p.experts * count
    check(
        ops.numel(array) >= wanted,
        f"weight scale tensor too small: {name} has {ops.numel(array)} elements, wanted {wanted} "
        f"for {p.experts} experts of {layout.weights} [{rows}, {cols}] in the 128x4 layout",
    )
    checks.check_contiguous(array, name)
    return array.reshape(-1)[:wanted].reshape(p.experts, count)


def _weight_block(a: Arguments, p: Problem) -> int:
    """Elements that share a scale: 16 is NVFP4, 32 MXFP4."""
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        array = getattr(a, name)
        checks.require(array, name, "float8_e4m3fn (or uint8) block scales")
        checks.check_type(array, name, _SCALES)
        checks.check_device(array, name, a.hidden_states)
    given = ops.numel(a.gemm1_weights_scale)
    if given >= p.experts * swizzled_numel(p.rows, p.hidden // 16):
        return 16
    if given <= p.experts * swizzled_numel(p.rows, p.hidden // 32):
        return 32
    # Too few for one and too many for the other: what hidden_states are decides which it was to be.
    return 16 if ops.shape_of(a.hidden_states)[1] == p.hidden // 2 else 32


def _activation_format(a: Arguments, p: Problem) -> str:
    """The format of hidden_states, by their type and scales."""
    hidden, scale = a.hidden_states, a.hidden_states_scale
    cols = ops.shape_of(hidden)[1]
    if ops.type_of(hidden) == "bfloat16":
        wanted, kind = p.hidden, "bf16"
    elif ops.type_of(hidden) == "float8_e4m3fn" or (
        ops.type_of(hidden) == "bytes" and cols == p.hidden
    ):
        wanted, kind = p.hidden, "fp8_per_tensor" if scale is None else "mxfp8"
    elif ops.is_type(hidden, "uint8"):
        wanted, kind = p.hidden // 2, "nvfp4"
    else:
        raise RuntimeError(
            "hidden_states must be bfloat16, float8_e4m3fn or uint8 (packed FP4); got "
            f"{ops.type_of(hidden)}"
        )
    check(
        cols == wanted,
        f"hidden_states has {cols} columns; gemm1_weights with {p.hidden} columns want {wanted} "
        f"of {ops.type_of(hidden)}",
    )
    if kind == "nvfp4" and scale is None:
        raise checks.MissingArgument(
            "hidden_states_scale must be provided for fp4 activation; got None, wanted "
            f"float8_e4m3fn [{p.tokens}, {p.hidden // 16}]"
        )
    return kind


def _hidden_scales(a: Arguments, p: Problem, kind: str) -> dict[str, Any]:
    scale = a.hidden_states_scale
    if kind in ("bf16", "fp8_per_tensor"):
        return {}  # a scale beside BF16 hidden states is taken for a placeholder
    checks.check_type(scale, "hidden_states_scale", _SCALES)
    checks.check_device(scale, "hidden_states_scale", a.hidden_states)
    block = 16 if kind.startswith("nvfp4") else 32
    elements, numel = p.tokens * p.hidden, ops.numel(scale)
    check(
        numel * 16 == elements or numel * 32 == elements,
        "hidden_states_scale: Unsupported hidden state scale shape "
        f"{list(ops.shape_of(scale))}; got {numel} scales for [{p.tokens}, {p.hidden}], wanted one "
        "for 16 or 32 elements",
        NotImplementedError,
    )
    check(
        numel * block == elements,
        f"hidden_states_scale has {numel} elements; {kind} hidden states of [{p.tokens}, "
        f"{p.hidden}] have {elements // block}. Only {_PAIRS} are supported by block scale MoE",
    )
    checks.check_contiguous(scale, "hidden_states_scale")
    return {"hidden_scales": ops.as_bytes(scale.reshape(p.tokens, p.hidden // block))}


def _formats(a: Arguments, p: Problem) -> Layout:
    weights = "nvfp4" if _weight_block(a, p) == 16 else "mxfp4"
    kind = _activation_format(a, p)
    check(
        (weights == "nvfp4") == (kind == "nvfp4"),
        f"gemm1_weights are {weights} by the number of their scales, hidden_states are {kind}. "
        f"Only {_PAIRS} are supported by block scale MoE",
    )
    per_token = a.per_token_scale
    if per_token is not None:
        check(
            kind == "nvfp4",
            "only support NvFP4 x NvFP4 when using per-token scaling: per_token_scale is given "
            f"with {kind} hidden_states",
        )
        checks.check_type(per_token, "per_token_scale", ["float32"])
        checks.check_shape(per_token, "per_token_scale", (p.tokens,))
        checks.check_device(per_token, "per_token_scale", a.hidden_states)
        kind = "nvfp4_per_token"
    return Layout(weights, kind)


def _check_weights(a: Arguments, p: Problem, packed: int) -> None:
    """Both stacks of codes, `packed` of them a byte."""
    for name, rows, cols in (
        ("gemm1_weights", p.rows, p.hidden),
        ("gemm2_weights", p.hidden, p.inter),
    ):
        array = getattr(a, name)
        got = ops.shape_of(array)
        check(
            got[0] == p.experts,
            f"{name}: {name[:5]} weights dim 0 must match the experts with weights here, "
            f"{p.experts}; got {got[0]}",
        )
        check_weight(array, name, (p.experts, rows, cols // packed), a.hidden_states)


def _check_biases(a: Arguments, p: Problem) -> None:
    for name, cols in (("gemm1_bias", p.rows), ("gemm2_bias", p.hidden)):
        array = getattr(a, name)
        if array is None:
            continue
        checks.check_type(array, name, ["float32"])
        checks.check_ndim(array, name, 2)
        shape = ops.shape_of(array)
        check(
            shape[0] == p.experts,
            f"{name} dim 0 must match the experts with weights here, {p.experts}; got {shape[0]}",
        )
        check(shape[1] == cols, f"{name} dim 1 must be {cols}; got {shape[1]}")
        checks.check_contiguous(array, name)
        checks.check_device(array, name, a.hidden_states)


def _check_fp4_scalars(a: Arguments, p: Problem, layout: Layout) -> None:
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        array = getattr(a, name)
        if array is not None or layout.scalars:
            check_scalar(array, name, p.experts, a.hidden_states)


def _run_fp4(a: Arguments) -> list[Array]:
    p = problem_of(a, _hidden_size(a))
    check_shared(a, p)
    _check_weights(a, p, 2)
    layout = _formats(a, p)
    scale1 = _scale_rows(a, "gemm1_weights_scale", p, layout)
    scale2 = _scale_rows(a, "gemm2_weights_scale", p, layout)
    _check_fp4_scalars(a, p, layout)
    _check_biases(a, p)
    operands = Operands(
        a.gemm1_weights,
        a.gemm2_weights,
        scale1,
        scale2,
        bias1=a.gemm1_bias,
        bias2=a.gemm2_bias,
        scale1=a.output1_scale_scalar,
        gate1=a.output1_scale_gate_scalar,
        scale2=a.output2_scale_scalar,
        **operands_of(a),
    )
    check_parameters(operands, p, a.hidden_states, RuntimeError)
    more = _hidden_scales(a, p, layout.activations)
    if a.per_token_scale is not None:
        more["token_scales"] = a.per_token_scale
    return run(a, p, operands, layout, more, narrow=True)


@entry(
    "routing_logits routing_bias hidden_states hidden_states_scale gemm1_weights "
    "gemm1_weights_scale gemm1_bias gemm1_alpha gemm1_beta gemm1_clamp_limit gemm2_weights "
    "gemm2_weights_scale gemm2_bias output1_scale_scalar output1_scale_gate_scalar "
    "output2_scale_scalar num_experts top_k n_group topk_group intermediate_size "
    "local_expert_offset local_num_experts routed_scaling_factor routing_method_type=0 "
    "do_finalize=True enable_pdl=None activation_type=ActivationType.Swiglu per_token_scale=None "
    "output=None tune_max_num_tokens=8192 norm_topk_prob=True routing_replay_out=None "
    "num_fused_shared_experts=None"
)
def trtllm_fp4_block_scale_moe(a: Arguments) -> list[Array]:
    """FP4 experts in the prepared layout, routed from logits.

    Args:
        routing_logits: [T, E] float32 or bfloat16.
        hidden_states: NVFP4 uint8 [T, H / 2]; MXFP8 or FP8 [T, H] float8_e4m3fn; [T, H] bfloat16.
        hidden_states_scale: linear block scales of NVFP4 (e4m3) and MXFP8 (e8m0 bytes), of any
            shape; None for FP8 with one scale; ignored for bfloat16.
        gemm1_weights: uint8 [local, f * I, H / 2] as `prepare_trtllm_fp4_weights` makes them.
        gemm1_weights_scale: of NVFP4 or MXFP4, which their number decides.
        gemm1_bias: float32 [local, f * I], rows in the order of the weights. On the raw
            accumulator, as are the clamp limit and SwiGLU's beta: for NVFP4 and FP8 hidden states
            divide them by `output1_scale_gate_scalar`, and gemm2_bias by `output2_scale_scalar`.
        gemm1_alpha: float32 [local]; the same for beta and the limit. SwiGLU and SiTU only.
        output1_scale_scalar: float32 [local], required for NVFP4 and FP8 hidden states; the same
            for the two others.
        per_token_scale: float32 [T], multipliers of NVFP4 tokens.
        output: [T, W] bfloat16, W <= H.
        routing_replay_out: int16 [>= T, top_k], also with shared experts.
        num_fused_shared_experts: S; all arrays of experts then have S more.

    Returns:
        The list [output], or with `do_finalize=False` [GEMM2 rows, weights [T, K + S], row of each
        slot or -1].
    """
    return _run_fp4(a)


@entry(
    "topk_ids routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale "
    "gemm1_bias gemm1_alpha gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale "
    "gemm2_bias output1_scale_scalar output1_scale_gate_scalar output2_scale_scalar num_experts "
    "top_k n_group topk_group intermediate_size local_expert_offset local_num_experts "
    "routed_scaling_factor routing_method_type=0 do_finalize=True enable_pdl=None "
    "activation_type=ActivationType.Swiglu per_token_scale=None output=None "
    "tune_max_num_tokens=8192 gemm1_lora_delta=None * routing_replay_out=None"
)
def trtllm_fp4_block_scale_routed_moe(a: Arguments) -> list[Array]:
    """FP4 experts in the prepared layout, routed elsewhere.

    Args:
        topk_ids: int32 [T, K], global id << 16 | bfloat16 bits of the weight; or the pair (ids
            int32, weights bfloat16 or float32).
        gemm1_lora_delta: [T, K, 2 * I] bfloat16, up then gate, in natural units; added beside a
            gemm1_bias.
        routing_replay_out: int16 [>= T, top_k], receives the ids (Hopyard's own).

    Returns:
        As `trtllm_fp4_block_scale_moe`; with a delta [output, row of each slot, activation rows],
        or with `do_finalize=False` also the activation rows.
    """
    return _run_fp4(a)


def _run_mxint4(a: Arguments) -> list[Array]:
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        checks.require(getattr(a, name), name, "an array")
    check(
        ops.is_type(a.hidden_states, "bfloat16"),
        f"hidden_states must be bf16; got {ops.type_of(a.hidden_states)}",
    )
    checks.check_ndim(a.hidden_states, "hidden_states", 2)
    checks.check_contiguous(a.hidden_states, "hidden_states")
    p = problem_of(a, ops.shape_of(a.hidden_states)[1])
    for name, size in (("hidden_size", p.hidden), ("intermediate_size", p.inter)):
        check(size % 256 == 0, f"{name} must be a multiple of 256; got {size}")
    scales = []
    for matrix, rows, cols in (("gemm1", p.rows, p.hidden), ("gemm2", p.hidden, p.inter)):
        weights, scale = getattr(a, f"{matrix}_weights"), getattr(a, f"{matrix}_weights_scale")
        check(
            ops.is_type(weights, "uint8"),
            f"{matrix}_weights must be packed in uint8, two codes a byte; got "
            f"{ops.type_of(weights)}",
        )
        shape = (p.local, cols // 256, rows, 128)
        check_weight(weights, f"{matrix}_weights", shape, a.hidden_states)
        name = f"{matrix}_weights_scale"
        checks.require(scale, name, "bfloat16 block scales")
        check(ops.is_type(scale, "bfloat16"), f"{name} must be bf16; got {ops.type_of(scale)}")
        count = rows * cols // 32
        check(
            ops.numel(scale) == p.local * count,
            f"unsupported weight_scale_vec_size: {name} has {ops.numel(scale)} elements, wanted "
            f"{p.local * count}, one for 32",
            NotImplementedError,
        )
        checks.check_contiguous(scale, name)
        checks.check_device(scale, name, a.hidden_states)
        scales.append(scale.reshape(p.local, count))
    operands = Operands(a.gemm1_weights, a.gemm2_weights, *scales, **operands_of(a))
    check_parameters(operands, p, a.hidden_states, RuntimeError)
    return run(a, p, operands, Layout("mxint4", "bf16", major="block_k"))


@entry(
    "routing_logits routing_bias hidden_states gemm1_weights gemm1_weights_scale gemm1_alpha "
    "gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale num_experts top_k n_group "
    "topk_group intermediate_size local_expert_offset local_num_experts routed_scaling_factor "
    "routing_method_type=0 do_finalize=True enable_pdl=None output=None tune_max_num_tokens=8192 "
    "norm_topk_prob=True routing_replay_out=None"
)
def trtllm_mxint4_block_scale_moe(a: Arguments) -> list[Array]:
    """INT4 experts in the prepared layout with SwiGLU, routed from logits.

    Args:
        hidden_states: [T, H] bfloat16.
        gemm1_weights: uint8 [local, H / 256, 2 * I, 128] as `prepare_trtllm_mxint4_weights` makes
            them.
        gemm1_weights_scale: bfloat16, shuffled and in the 128x4 layout.
        gemm1_alpha: float32 [local]; the same for beta and the clamp limit.
        routing_replay_out: int16 [>= T, top_k], receives the selected ids.

    Returns:
        The list [output], or with `do_finalize=False` [GEMM2 rows, weights, row of each slot or
        -1].
    """
    return _run_mxint4(a)


@entry(
    "topk_ids hidden_states gemm1_weights gemm1_weights_scale gemm1_alpha gemm1_beta "
    "gemm1_clamp_limit gemm2_weights gemm2_weights_scale num_experts top_k n_group topk_group "
    "intermediate_size local_expert_offset local_num_experts routed_scaling_factor "
    "routing_method_type=0 do_finalize=True enable_pdl=None gemm1_lora_delta=None output=None "
    "tune_max_num_tokens=8192 * routing_replay_out=None"
)
def trtllm_mxint4_block_scale_routed_moe(a: Arguments) -> list[Array]:
    """INT4 experts in the prepared layout with SwiGLU, routed elsewhere.

    Args:
        topk_ids: int32 [T, K], global id << 16 | bfloat16 bits of the weight; or the pair (ids
            int32, weights bfloat16 or float32), which is Hopyard's own.
        gemm1_lora_delta: [T, K, 2 * I] bfloat16, up then gate, added to GEMM1.
        routing_replay_out: int16 [>= T, top_k], receives the ids (Hopyard's own).

    Returns:
        As `trtllm_mxint4_block_scale_moe`; with a delta [output, row of each slot, activation
        rows], or with `do_finalize=False` also the activation rows.
    """
    return _run_mxint4(a)
