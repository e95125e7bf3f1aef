# SPDX-License-Identifier: Apache-2.0
"""Hopyard: fused Mixture-of-Experts layers for LLM inference.

    spec = hopyard.MoeSpec(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
    weights = hopyard.Weights(spec, hopyard.ExpertWeights(gemm1=w13, gemm2=w2))
    layer = hopyard.MoeLayer(spec, weights, max_tokens=512)
    output = layer(hidden, logits=logits)

Arrays are NumPy arrays, torch tensors, or others that speak DLPack; a layer runs where its weights
lie, on the CPU or a Hopper GPU. NumPy has no bfloat16: there, uint16 arrays hold bfloat16 bits
(`to_bf16`, `from_bf16`). Errors: ValueError for a wrong argument, NotImplementedError
for what no kernel does, MemoryError, InternalError for a defect of Hopyard.
"""

from typing import Any

from hopyard._library import InternalError
from hopyard.arrays import Array, from_bf16, to_bf16
from hopyard.autotune import TuneOptions, TuneProgress, autotune, tune
from hopyard.checkpoint import Checkpoint, LoadedLayer, load_layer
from hopyard.formats import Format, Quantized, dequantize, quantize
from hopyard.layer import CallOptions, Candidate, Explanation, MoeLayer, PlanOptions, explain
from hopyard.routing import fused_topk_deepseek, route
from hopyard.spec import Activation, ExpertMap, MoeSpec, RoutingRule, SharedExperts
from hopyard.tuning import (
    CallPath,
    TunedLayer,
    TunedRange,
    TuningFault,
    TuningKey,
    TuningMachine,
    TuningStats,
    TuningTable,
    forget_tuning,
    reset_tuning_stats,
    token_buckets,
    tuning_stats,
    use_tuning,
    wait_for_tuning,
)
from hopyard.weights import ExpertWeights, Matrix, WeightOrders, Weights, can_pack

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Array",
    "CallOptions",
    "CallPath",
    "Candidate",
    "Checkpoint",
    "ExpertMap",
    "ExpertWeights",
    "Explanation",
    "Format",
    "InternalError",
    "LoadedLayer",
    "Matrix",
    "MoeLayer",
    "MoeSpec",
    "PlanOptions",
    "Quantized",
    "RoutingRule",
    "SharedExperts",
    "TuneOptions",
    "TuneProgress",
    "TunedLayer",
    "TunedRange",
    "TuningFault",
    "TuningKey",
    "TuningMachine",
    "TuningStats",
    "TuningTable",
    "WeightOrders",
    "Weights",
    "autotune",
    "can_pack",
    "dequantize",
    "explain",
    "forget_tuning",
    "from_bf16",
    "fused_topk_deepseek",
    "load_layer",
    "quantize",
    "reset_tuning_stats",
    "route",
    "to_bf16",
    "token_buckets",
    "tune",
    "tuning_stats",
    "use_tuning",
    "wait_for_tuning",
]

# Functions that need transformers, which the package imports when one of them is used.
_OF_TRANSFORMERS = ("record_routing", "replay_routing")


def __getattr__(name: str) -> Any:
    if name in _OF_TRANSFORMERS:
        from hopyard.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module 'hopyard' has no attribute {name!r}")
