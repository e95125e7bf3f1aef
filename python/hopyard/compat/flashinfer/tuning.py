# SPDX-License-Identifier: Apache-2.0
"""Kernels of a problem, by number and by name."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hopyard
from hopyard.compat.flashinfer import engine
from hopyard.compat.flashinfer.checks import check
from hopyard.compat.flashinfer.common import activation_of, check_layout
from hopyard.compat.flashinfer.enums import DtypeTrtllmGen, Fp8QuantizationType, member
from hopyard.compat.flashinfer.signature import Arguments, entry

# (weights, activations) of the operations -> formats of hopyard.
_PAIRS = {
    (DtypeTrtllmGen.Bfloat16, DtypeTrtllmGen.Bfloat16): ("bf16", "bf16"),
    (DtypeTrtllmGen.E4m3, DtypeTrtllmGen.E4m3): ("fp8_per_tensor", "fp8_per_tensor"),
    (DtypeTrtllmGen.MxE4m3, DtypeTrtllmGen.MxE4m3): ("mxfp8", "mxfp8"),
    (DtypeTrtllmGen.E2m1, DtypeTrtllmGen.E2m1): ("nvfp4", "nvfp4"),
    (DtypeTrtllmGen.MxE2m1, DtypeTrtllmGen.MxE4m3): ("mxfp4", "mxfp8"),
    (DtypeTrtllmGen.MxE2m1, DtypeTrtllmGen.E4m3): ("mxfp4", "fp8_per_tensor"),
    (DtypeTrtllmGen.MxE2m1, DtypeTrtllmGen.Bfloat16): ("mxfp4", "bf16"),
    (DtypeTrtllmGen.MxInt4, DtypeTrtllmGen.Bfloat16): ("mxint4", "bf16"),
}
# FlashInfer's answer knows these weights only, and takes MxE4m3 activations for MxE2m1 ones.
_ANSWERED = (
    DtypeTrtllmGen.Bfloat16,
    DtypeTrtllmGen.E4m3,
    DtypeTrtllmGen.E2m1,
    DtypeTrtllmGen.MxE2m1,
)


@functools.cache
def is_trtllm_moe_supported(
    dtype_weights: DtypeTrtllmGen,
    dtype_act: DtypeTrtllmGen,
    quant_method: Any = None,
) -> bool:
    """Whether there are kernels for a pair of element types.

    FlashInfer's table, without its demand for a GPU of compute capability 10: what it answers with
    True runs on the CPU and, in a build for it, on Hopper.
    """
    pair = (
        member(DtypeTrtllmGen, dtype_weights, "dtype_weights"),
        member(DtypeTrtllmGen, dtype_act, "dtype_act"),
    )
    return pair[0] in _ANSWERED and pair in _PAIRS


def _formats(a: Arguments) -> tuple[str, str]:
    if a.fp8_quantization_type == Fp8QuantizationType.DeepSeekFp8:
        return "fp8_block128", "fp8_block128"
    pair = (a.dtype_weights, a.dtype_act)
    check(
        pair in _PAIRS,
        f"No kernel found for the given options: dtype_weights={pair[0].name}, "
        f"dtype_act={pair[1].name}",
    )
    weights, activations = _PAIRS[pair]
    if a.use_per_token_scaling:
        check(
            activations == "nvfp4",
            f"only support NvFP4 x NvFP4 when using per-token scaling; got {weights} x "
            f"{activations}",
        )
        activations = "nvfp4_per_token"
    return weights, activations


def _kernels(a: Arguments) -> tuple[str, ...]:
    """Names of the kernels that can run a problem, in the library's order."""
    check_layout(a.weight_layout)
    kind = activation_of(a.act_type).name.lower()
    weights, activations = _formats(a)
    experts = max(int(a.num_local_experts), int(a.top_k))
    spec = hopyard.MoeSpec(
        hidden_size=int(a.hidden_size),
        intermediate_size=int(a.intermediate_size),
        num_experts=experts,
        top_k=int(a.top_k),
        activation=hopyard.Activation(kind, beta=1.0 if kind == "situ" else 0.0),  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        activations=activations,  # type: ignore[arg-type]
    )
    with engine.flashinfer_errors():
        return _kernels_of(spec, _device(), max(int(a.num_tokens), 1))


@functools.lru_cache(maxsize=1024)
def _kernels_of(spec: hopyard.MoeSpec, device: str, tokens: int) -> tuple[str, ...]:
    candidates = hopyard.explain(spec, device, max_tokens=tokens).candidates
    # A kernel may be listed for each GEMM. Those that round more than the operation says are
    # nobody's valid tactic: a tuner would take them for their speed.
    kernels = dict.fromkeys(c.kernel for c in candidates if "by name only" not in c.reason)
    return tuple(n for n in kernels if _runs(spec, device, tokens, n))


def _device() -> str:
    """Where calls are likely to run: on torch's GPU if it sees one and the library has kernels."""
    torch = sys.modules.get("torch")
    seen = torch is not None and torch.cuda.is_available()
    small = hopyard.MoeSpec(128, 128, 4, 2)
    return "cuda" if seen and hopyard.explain(small, "cuda").supported else "cpu"


def _runs(spec: hopyard.MoeSpec, device: str, tokens: int, kernel: str) -> bool:
    try:
        return hopyard.explain(spec, device, max_tokens=tokens, tactic=kernel).supported
    except ValueError:  # no kernel of this layer
        return False


def _tile(kernel: str) -> int:
    """Rows of tokens in a tile, by a GPU kernel's name; a CPU kernel has tiles of one."""
    found = re.search(r"_m\d+n(\d+)", kernel)
    return int(found.group(1)) if found else 1


_PROBLEM = (
    "dtype_act dtype_weights fp8_quantization_type top_k hidden_size intermediate_size "
    "num_local_experts act_type use_shuffled_weight weight_layout use_per_token_scaling "
    "num_tokens has_gemm1_lora_delta=False"
)


@entry(_PROBLEM)
def trtllm_get_valid_moe_configs(a: Arguments) -> list[list[int]]:
    """Tactics [tile_N, config] of a problem; the config is the place in this list.

    Args:
        dtype_act: element type of the activations; also of the weights.
        top_k: with the shared experts, as is num_local_experts.
        num_tokens: T.
        use_shuffled_weight: as weight_layout and has_gemm1_lora_delta no matter: every kernel reads
            every layout, and adds a delta.

    Raises:
        RuntimeError: no kernel knows the types or the activation.
    """
    return [[_tile(kernel), index] for index, kernel in enumerate(_kernels(a))]


@entry("tactic " + _PROBLEM)
def trtllm_moe_tactic_name(a: Arguments) -> str:
    """The name of a tactic, for `hopyard.PlanOptions.tactic` and `forced_tactic`; "" for -1.

    Args:
        tactic: [tile_N, config] from `trtllm_get_valid_moe_configs` with the same arguments; -1 in
            either place leaves that part to the library.

    Raises:
        RuntimeError: not a pair, or no such tile or config.
    """
    pair = list(a.tactic) if isinstance(a.tactic, Sequence) else [a.tactic]
    check(len(pair) == 2, f"tactic is expected to be [tile_N, config]; got {pair}")
    tile, config = pair
    kernels = _kernels(a)
    tiles = sorted({_tile(kernel) for kernel in kernels})
    if tile == -1:
        return ""
    check(tile in tiles, f"missing MoE launcher for tile_N={tile}; wanted one of {tiles}")
    if config == -1:
        return next(kernel for kernel in kernels if _tile(kernel) == tile)
    valid = 0 <= config < len(kernels) and _tile(kernels[config]) == tile
    check(
        valid,
        f"Invalid MoE tactic {config} for tile_N={tile}; wanted one of "
        f"{[i for i, kernel in enumerate(kernels) if _tile(kernel) == tile]}",
    )
    return kernels[config]


forced_tactic: Callable[[str], contextlib.AbstractContextManager[None]] = engine.tactic
