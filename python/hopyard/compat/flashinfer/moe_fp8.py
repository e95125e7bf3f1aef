# SPDX-License-Identifier: Apache-2.0
"""FP8 weights: 128x128 blocks, MXFP8, and one scale per tensor."""

from __future__ import annotations

from typing import Any

from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import (
    Problem,
    check_layout,
    check_routing_limits,
    check_shared,
    problem_of,
    single,
)
from hopyard.compat.flashinfer.enums import (
    ActivationType,
    Fp8QuantizationType,
    WeightLayout,
)
from hopyard.compat.flashinfer.moe_bf16 import (
    check_matrices,
    check_swiglu_parameters,
    hidden_size,
    operands_of,
)
from hopyard.compat.flashinfer.operands import (
    Layout,
    Operands,
    check_parameters,
    check_weight,
    run,
)
from hopyard.compat.flashinfer.signature import Arguments, entry

_E4M3 = ["float8_e4m3fn"]


def _require_e4m3(a: Arguments) -> None:
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        checks.require(getattr(a, name), name, "a float8_e4m3fn array")
        checks.check_type(getattr(a, name), name, _E4M3)


def _deepseek_scales(a: Arguments, p: Problem) -> dict[str, Any]:
    """hidden_scales of the call, after checks of all float32 block scales."""
    scale = a.hidden_states_scale
    name = "hidden_states_scale"
    checks.require(scale, name, f"float32 [{p.hidden // 128}, {p.tokens}]")
    check(ops.is_type(scale, "float32"), f"{name} must be float; got {ops.type_of(scale)}")
    checks.check_ndim(scale, name, 2)
    shape = ops.shape_of(scale)
    check(
        shape[0] == p.hidden // 128,
        f"{name} dim0 must match hidden_states dim1 / 128 = {p.hidden // 128}; got {shape[0]}",
    )
    check(
        shape[1] == p.tokens,
        f"{name} dim1 must match hidden_states dim0 = {p.tokens}; got {shape[1]}",
    )
    checks.check_device(scale, name, a.hidden_states)
    for matrix, rows, cols in (("gemm1", p.rows, p.hidden), ("gemm2", p.hidden, p.inter)):
        name = f"{matrix}_weights_scale"
        array = getattr(a, name)
        checks.require(array, name, "a float32 array of 128x128 block scales")
        check(ops.is_type(array, "float32"), f"{name} must be float; got {ops.type_of(array)}")
        checks.check_ndim(array, name, 3)
        check_weight(array, name, (p.experts, rows // 128, cols // 128), a.hidden_states)
    return {"hidden_scales": ops.permuted(scale, (1, 0))}


def _mx_scales(a: Arguments, p: Problem) -> tuple[dict[str, Any], Array, Array]:
    """hidden_scales of the call and both stacks of uint8 scales, one row an expert."""
    wanted = {
        "hidden_states_scale": (p.tokens, p.hidden // 32),
        "gemm1_weights_scale": (p.experts, p.rows * p.hidden // 32),
        "gemm2_weights_scale": (p.experts, p.hidden * p.inter // 32),
    }
    found = []
    for name, shape in wanted.items():
        array = getattr(a, name)
        checks.require(array, name, "a uint8 array of UE8M0 block scales")
        check(
            ops.is_type(array, "uint8"),
            f"{name} must be uint8 (UE8M0 bytes) for MxFp8; got {ops.type_of(array)}",
        )
        count = shape[0] * shape[1]
        check(
            ops.numel(array) == count,
            f"{name} has incorrect shape: {ops.numel(array)} elements, wanted {count}",
        )
        checks.check_contiguous(array, name)
        checks.check_device(array, name, a.hidden_states)
        found.append(array.reshape(shape))
    return {"hidden_scales": found[0]}, found[1], found[2]


def _check_block_arguments(a: Arguments, p: Problem, layout: WeightLayout) -> bool:
    """What depends on the quantisation type; whether it is MXFP8."""
    kind = a.fp8_quantization_type
    given = [a.gemm1_alpha, a.gemm1_beta, a.gemm1_clamp_limit]
    known = (Fp8QuantizationType.DeepSeekFp8, Fp8QuantizationType.MxFp8)
    check(
        kind in known or all(array is None for array in given),
        "gemm1_alpha, gemm1_beta and gemm1_clamp_limit are only supported for "
        f"Fp8QuantizationType.MxFp8 and DeepSeekFp8; got {kind!r}",
        ValueError,
    )
    check(
        kind in known,
        f"fp8_quantization_type: the operation only supports DeepSeekFp8 or MxFp8; got {kind!r}",
        NotImplementedError,
    )
    check_swiglu_parameters(a, p)
    if kind == Fp8QuantizationType.MxFp8:
        check(bool(a.use_shuffled_weight), "use_shuffled_weight must be true for MxFp8; got False")
        check(
            layout is WeightLayout.MajorK,
            f"weight_layout must be 0 for MxFp8; got {int(layout)} ({layout.name})",
        )
        check(
            p.hidden % 32 == 0 and p.inter % 32 == 0,
            f"hidden_size={p.hidden} and intermediate_size={p.inter} must be multiples of 32",
        )
        return True
    check(
        p.activation is ActivationType.Swiglu,
        "activation_type: DeepSeekFp8 only supports ActivationType::Swiglu; got "
        f"{p.activation.name}",
        NotImplementedError,
    )
    for name, size in (("hidden_size", p.hidden), ("intermediate_size", p.inter)):
        check(size % 128 == 0, f"{name} must be a multiple of 128 for DeepSeekFp8; got {size}")
    return False


def _check_block_limits(a: Arguments, p: Problem) -> None:
    check_routing_limits(a)
    check(p.num_experts % 4 == 0, f"num_experts must be divisible by 4; got {p.num_experts}")
    check(
        p.num_experts > p.top_k,
        f"num_experts must be greater than top_k={p.top_k}; got {p.num_experts}",
    )


def _run_block(a: Arguments) -> Array | list[Array]:
    p = problem_of(a, hidden_size(a))
    layout = check_layout(a.weight_layout)
    check_shared(a, p)
    _check_block_limits(a, p)
    mx = _check_block_arguments(a, p, layout)
    _require_e4m3(a)
    check_matrices(a, p, layout, 128)
    shuffled = bool(a.use_shuffled_weight)
    if mx:
        scales, scale1, scale2 = _mx_scales(a, p)
        read = Layout("mxfp8", "mxfp8")
    else:
        scales = _deepseek_scales(a, p)
        scale1, scale2 = a.gemm1_weights_scale, a.gemm2_weights_scale
        read = Layout(
            "fp8_block128",
            "fp8_block128",
            row_order="up_gate",
            row_map="shuffled64" if shuffled else "natural",
            major="block_k" if layout is WeightLayout.BlockMajorK else "k",
            scale_layout="linear",
        )
    operands = Operands(a.gemm1_weights, a.gemm2_weights, scale1, scale2, **operands_of(a))
    check_parameters(operands, p, a.hidden_states, RuntimeError)
    return single(run(a, p, operands, read, scales, shuffled=shuffled))


@entry(
    "routing_logits routing_bias hidden_states hidden_states_scale gemm1_weights "
    "gemm1_weights_scale gemm2_weights gemm2_weights_scale num_experts top_k n_group topk_group "
    "intermediate_size local_expert_offset local_num_experts routed_scaling_factor "
    "routing_method_type=0 use_shuffled_weight=False weight_layout=0 do_finalize=True "
    "enable_pdl=None tune_max_num_tokens=8192 "
    "fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8 num_fused_shared_experts=None "
    "activation_type=ActivationType.Swiglu norm_topk_prob=True routing_replay_out=None "
    "gemm1_alpha=None gemm1_beta=None gemm1_clamp_limit=None output=None"
)
def trtllm_fp8_block_scale_moe(a: Arguments) -> Array | list[Array]:
    """FP8 experts with block scales (DeepSeek 128x128, or MXFP8), routed from logits.

    Args:
        routing_logits: [T, E] float32 or bfloat16.
        routing_bias: [E] selection bias of DeepSeekV3 and MiniMax2; None = zeros.
        hidden_states: [T, H] float8_e4m3fn.
        hidden_states_scale: float32 [H / 128, T]; MXFP8: uint8 [T, H / 32].
        gemm1_weights: [local, f * I, H], rows up, then gate; MXFP8 and shuffled ones as the
            `prepare_*` helpers leave them; [local, H / 128, f * I, 128] with BlockMajorK.
        gemm1_weights_scale: float32 [local, f * I / 128, H / 128], never shuffled; MXFP8: uint8,
            shuffled and in the 128x4 layout.
        num_fused_shared_experts: S; the weights then have S more experts, each of weight 1.
        routing_replay_out: int16 [>= T, top_k], also with shared experts.

    Returns:
        The output [T, H] bfloat16, or with `do_finalize=False` the list [GEMM2 rows, weights, row
        of each slot or -1].
    """
    return _run_block(a)


@entry(
    "topk_ids routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale "
    "gemm2_weights gemm2_weights_scale num_experts top_k n_group topk_group intermediate_size "
    "local_expert_offset local_num_experts routed_scaling_factor routing_method_type=0 "
    "use_shuffled_weight=False weight_layout=0 do_finalize=True enable_pdl=None "
    "gemm1_lora_delta=None output=None tune_max_num_tokens=8192 "
    "fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8 activation_type=ActivationType.Swiglu "
    "gemm1_alpha=None gemm1_beta=None gemm1_clamp_limit=None * routing_replay_out=None"
)
def trtllm_fp8_block_scale_routed_moe(a: Arguments) -> Array | list[Array]:
    """FP8 experts with block scales, routed elsewhere.

    Args:
        topk_ids: int32 [T, K], global id << 16 | bfloat16 bits of the weight; or the pair (ids
            int32, weights bfloat16 or float32).
        gemm1_lora_delta: [T, K, 2 * I] bfloat16, up then gate, added to GEMM1.
        routing_replay_out: int16 [>= T, top_k], receives the ids (Hopyard's own).

    Returns:
        As `trtllm_fp8_block_scale_moe`; with a delta the list [output, row of each slot,
        activation rows], or with `do_finalize=False` also the activation rows.
    """
    return _run_block(a)


def check_scalar(array: Array | None, argument: str, experts: int, hidden: Array) -> None:
    """One of the three scalars: float32 [experts]. FlashInfer's C++ calls them `*_scales_*`."""
    name = argument.replace("_scale_", "_scales_", 1)
    if array is None:
        raise RuntimeError(f"{name} is required; got {argument}=None, wanted float32 [{experts}]")
    checks.require(array, argument, f"float32 [{experts}]")
    check(ops.is_type(array, "float32"), f"{name} must be float; got {ops.type_of(array)}")
    checks.check_ndim(array, name, 1)
    got = ops.shape_of(array)[0]
    check(got == experts, f"{name} dim 0: incorrect dim 0, got {got}, wanted {experts}")
    checks.check_contiguous(array, argument)
    checks.check_device(array, argument, hidden)


def _run_per_tensor(a: Arguments) -> Array | list[Array]:
    p = problem_of(a, hidden_size(a))
    _require_e4m3(a)
    check_weight(a.gemm1_weights, "gemm1_weights", (p.local, p.rows, p.hidden), a.hidden_states)
    check_weight(a.gemm2_weights, "gemm2_weights", (p.local, p.hidden, p.inter), a.hidden_states)
    for name in ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar"):
        check_scalar(getattr(a, name), name, p.local, a.hidden_states)
    operands = Operands(
        a.gemm1_weights,
        a.gemm2_weights,
        scale1=a.output1_scales_scalar,
        gate1=a.output1_scales_gate_scalar,
        scale2=a.output2_scales_scalar,
    )
    return single(run(a, p, operands, Layout("fp8_per_tensor", "fp8_per_tensor")))


@entry(
    "routing_logits routing_bias hidden_states gemm1_weights output1_scales_scalar "
    "output1_scales_gate_scalar gemm2_weights output2_scales_scalar num_experts top_k n_group "
    "topk_group intermediate_size local_expert_offset local_num_experts routed_scaling_factor "
    "use_routing_scales_on_input routing_method_type=0 do_finalize=True enable_pdl=None "
    "tune_max_num_tokens=8192 activation_type=ActivationType.Swiglu norm_topk_prob=True "
    "routing_replay_out=None output=None"
)
def trtllm_fp8_per_tensor_scale_moe(a: Arguments) -> Array | list[Array]:
    """FP8 experts with one scale each and calibrated activations, routed from logits.

    Args:
        hidden_states: [T, H] float8_e4m3fn.
        gemm1_weights: [local, f * I, H] as `prepare_trtllm_fp8_per_tensor_weights` makes them.
        output1_scales_scalar: float32 [local], with `output1_scales_gate_scalar` and
            `output2_scales_scalar` from the same helper.
        use_routing_scales_on_input: the weight multiplies GEMM1's input (Llama-4).
        routing_replay_out: int16 [>= T, top_k], receives the selected ids.

    Returns:
        The output [T, H] bfloat16, or with `do_finalize=False` the list [GEMM2 rows, weights, row
        of each slot or -1].
    """
    return _run_per_tensor(a)


@entry(
    "topk_ids routing_bias hidden_states gemm1_weights output1_scales_scalar "
    "output1_scales_gate_scalar gemm2_weights output2_scales_scalar num_experts top_k n_group "
    "topk_group intermediate_size local_expert_offset local_num_experts routed_scaling_factor "
    "use_routing_scales_on_input routing_method_type=0 do_finalize=True enable_pdl=None "
    "tune_max_num_tokens=8192 activation_type=ActivationType.Swiglu routing_replay_out=None "
    "output=None"
)
def trtllm_fp8_per_tensor_scale_routed_moe(a: Arguments) -> Array | list[Array]:
    """FP8 experts with one scale each, routed elsewhere.

    Args:
        topk_ids: int32 [T, K], global id << 16 | bfloat16 bits of the weight; or the pair (ids
            int32, weights bfloat16 or float32).
        routing_replay_out: int16 [>= T, top_k], receives the ids.

    Returns:
        As `trtllm_fp8_per_tensor_scale_moe`.
    """
    return _run_per_tensor(a)
