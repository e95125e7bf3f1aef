# SPDX-License-Identifier: Apache-2.0
"""BF16 weights and activations."""

from __future__ import annotations

from hopyard.arrays import Array
from hopyard.compat.flashinfer import checks, ops
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import (
    Problem,
    check_layout,
    problem_of,
    single,
)
from hopyard.compat.flashinfer.enums import ActivationType, WeightLayout
from hopyard.compat.flashinfer.operands import Layout, Operands, check_parameters, run
from hopyard.compat.flashinfer.signature import Arguments, entry


def hidden_size(a: Arguments) -> int:
    """Columns of hidden_states, which must be there."""
    checks.require(a.hidden_states, "hidden_states", "an array [num_tokens, hidden_size]")
    checks.check_ndim(a.hidden_states, "hidden_states", 2)
    checks.check_contiguous(a.hidden_states, "hidden_states")
    return ops.shape_of(a.hidden_states)[1]


def check_matrices(a: Arguments, p: Problem, layout: WeightLayout, block: int) -> None:
    """Shapes of both stacks: [experts, rows, K] or, in blocks of `block`, [experts, K / block,
    rows, block]."""
    for name, rows, cols, k_name in (
        ("gemm1_weights", p.rows, p.hidden, "hidden_size"),
        ("gemm2_weights", p.hidden, p.inter, "intermediate_size"),
    ):
        array = getattr(a, name)
        shape = ops.shape_of(array)
        blocked = layout is WeightLayout.BlockMajorK
        if len(shape) != (4 if blocked else 3):
            wanted = "[experts, K / b, rows, b]" if blocked else "[experts, rows, K]"
            remedy = "" if blocked else "; for 4 dimensions weight_layout must be BlockMajorK"
            raise RuntimeError(
                f"{name} has shape {list(shape)}; wanted {wanted} for {layout.name}{remedy}"
            )
        got_rows = shape[2] if blocked else shape[1]
        got_cols = shape[1] * shape[3] if blocked else shape[2]
        check(
            shape[0] == p.experts,
            f"{name} dim0 must match the experts with weights here, {p.experts}; got {shape[0]}",
        )
        if name == "gemm1_weights" and p.gated:
            check(got_rows % 2 == 0, f"{name} rows must be even, gate and up; got {got_rows}")
        what = "intermediate_size" if name == "gemm1_weights" else "hidden_size"
        check(
            got_rows == rows, f"{what} has incorrect shape: {name} has {got_rows} rows, not {rows}"
        )
        check(
            got_cols == cols,
            f"{name}: K dimension must be equal to {k_name}={cols}; got {got_cols}",
        )
        if blocked and shape[3] != block:
            raise RuntimeError(
                f"{name} has blocks of {shape[3]} columns; wanted {block}, 128 bytes"
            )
        checks.check_contiguous(array, name)
        checks.check_device(array, name, a.hidden_states)


def operands_of(a: Arguments) -> dict[str, Array | None]:
    """alpha, beta and limit of a call."""
    return {"alpha": a.gemm1_alpha, "beta": a.gemm1_beta, "limit": a.gemm1_clamp_limit}


def check_swiglu_parameters(a: Arguments, p: Problem) -> None:
    """Parameters belong to SwiGLU."""
    for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        check(
            getattr(a, name) is None or p.activation is ActivationType.Swiglu,
            f"{name} is only supported for ActivationType.Swiglu; got {p.activation.name}",
            ValueError,
        )


def _run(a: Arguments) -> Array | list[Array]:
    p = problem_of(a, hidden_size(a))
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        checks.require(getattr(a, name), name, "a bfloat16 array")
        checks.check_type(getattr(a, name), name, ["bfloat16"])
    layout = check_layout(a.weight_layout)
    check(p.inter % 128 == 0, f"intermediate_size must be a multiple of 128; got {p.inter}")
    check_matrices(a, p, layout, 64)
    check_swiglu_parameters(a, p)
    shuffled = bool(a.use_shuffled_weight)
    operands = Operands(a.gemm1_weights, a.gemm2_weights, **operands_of(a))
    check_parameters(operands, p, a.hidden_states, ValueError)
    read = Layout(
        "bf16",
        "bf16",
        row_order="interleaved_up_gate" if shuffled else "up_gate",
        row_map="shuffled128" if shuffled else "natural",
        major="block_k" if layout is WeightLayout.BlockMajorK else "k",
    )
    return single(run(a, p, operands, read, shuffled=shuffled))


@entry(
    "routing_logits routing_bias hidden_states gemm1_weights gemm2_weights num_experts top_k "
    "n_group topk_group intermediate_size local_expert_offset local_num_experts "
    "routed_scaling_factor=None routing_method_type=0 use_shuffled_weight=True "
    "weight_layout=WeightLayout.BlockMajorK do_finalize=True enable_pdl=True "
    "tune_max_num_tokens=8192 activation_type=ActivationType.Swiglu norm_topk_prob=True "
    "routing_replay_out=None gemm1_alpha=None gemm1_beta=None gemm1_clamp_limit=None output=None"
)
def trtllm_bf16_moe(a: Arguments) -> Array | list[Array]:
    """BF16 experts, routed from logits.

    Args:
        routing_logits: [T, E] float32 or bfloat16.
        routing_bias: [E] selection bias of DeepSeekV3 and MiniMax2; None = zeros.
        hidden_states: [T, H] bfloat16.
        gemm1_weights: [local, H / 64, f * I, 64] bfloat16, as `prepare_trtllm_bf16_weights` makes
            them; with MajorK [local, f * I, H]; without shuffle rows are up, then gate.
        gemm2_weights: [local, I / 64, H, 64], or [local, H, I].
        gemm1_alpha: float32 [local], SwiGLU only; the same for beta and the clamp limit.
        routing_replay_out: int16 [>= T, top_k], receives the selected ids.
        output: [T, H] bfloat16 to write into.

    Returns:
        The output [T, H] bfloat16. With `do_finalize=False` the list [GEMM2 rows, weights [T, K]
        bfloat16, row of each slot or -1].
    """
    return _run(a)


@entry(
    "topk_ids hidden_states gemm1_weights gemm2_weights num_experts top_k n_group topk_group "
    "intermediate_size local_expert_offset local_num_experts routed_scaling_factor=None "
    "routing_method_type=0 use_shuffled_weight=True weight_layout=WeightLayout.BlockMajorK "
    "do_finalize=True enable_pdl=True gemm1_lora_delta=None tune_max_num_tokens=8192 "
    "activation_type=ActivationType.Swiglu routing_replay_out=None gemm1_alpha=None "
    "gemm1_beta=None gemm1_clamp_limit=None output=None"
)
def trtllm_bf16_routed_moe(a: Arguments) -> Array | list[Array]:
    """BF16 experts, routed elsewhere.

    Args:
        topk_ids: int32 [T, K], global id << 16 | bfloat16 bits of the weight; or the pair (ids
            int32, weights bfloat16 or float32).
        gemm1_lora_delta: [T, K, 2 * I] bfloat16, up then gate, added to GEMM1.
        routing_replay_out: int16 [>= T, top_k], receives the ids.

    Returns:
        As `trtllm_bf16_moe`; with a delta the list [output, row of each slot, activation rows], or
        with `do_finalize=False` also the activation rows.
    """
    return _run(a)
