# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's fused MoE functions over Hopyard: change the import and run on Hopper or a CPU.

    from hopyard.compat.flashinfer import trtllm_fp4_block_scale_moe, RoutingMethodType

Names, positional order, defaults, enumerations, results and exception classes are FlashInfer's
(0.6.18). Arrays are torch tensors on any device or NumPy arrays. docs/compat-flashinfer.md tells
what differs.
"""

from hopyard.compat.flashinfer.autotuner import autotune, set_autotune_process_group
from hopyard.compat.flashinfer.engine import clear_caches
from hopyard.compat.flashinfer.enums import (
    ActivationType,
    DtypeTrtllmGen,
    Fp8QuantizationType,
    GatedActType,
    QuantVariant,
    RoutingInputMode,
    RoutingMethodType,
    SfLayout,
    WeightLayout,
    has_block_scale,
    is_gated_activation,
)
from hopyard.compat.flashinfer.layouts import (
    _maybe_get_cached_w3_w1_permute_indices,
    block_scale_interleave,
    convert_to_block_layout,
    deduce_trtllm_gen_tensor_dtype,
    get_reorder_rows_for_gated_act_gemm_row_indices,
    get_shuffle_matrix_a_row_indices,
    get_shuffle_matrix_sf_a_row_indices,
    get_w2_permute_indices_with_cache,
    nvfp4_block_scale_interleave,
    reorder_rows_for_gated_act_gemm,
    shuffle_matrix_a,
    shuffle_matrix_sf_a,
)
from hopyard.compat.flashinfer.metadata import (
    TrtllmMoERoutingMetadata,
    TrtllmMoERoutingMetadataSlot,
    pack_topk_ids,
    populate_trtllm_moe_routing_metadata_,
    trtllm_moe_allocate_routing_metadata,
    trtllm_moe_allocate_routing_metadata_multi_tile,
)
from hopyard.compat.flashinfer.moe_bf16 import trtllm_bf16_moe, trtllm_bf16_routed_moe
from hopyard.compat.flashinfer.moe_fp4 import (
    trtllm_fp4_block_scale_moe,
    trtllm_fp4_block_scale_routed_moe,
    trtllm_mxint4_block_scale_moe,
    trtllm_mxint4_block_scale_routed_moe,
)
from hopyard.compat.flashinfer.moe_fp8 import (
    trtllm_fp8_block_scale_moe,
    trtllm_fp8_block_scale_routed_moe,
    trtllm_fp8_per_tensor_scale_moe,
    trtllm_fp8_per_tensor_scale_routed_moe,
)
from hopyard.compat.flashinfer.moe_runner import MoERunner
from hopyard.compat.flashinfer.prepare import (
    prepare_cutlass_bf16_weights,
    prepare_cutlass_w4a16_weights,
    prepare_trtllm_bf16_weights,
    prepare_trtllm_fp4_activations,
    prepare_trtllm_fp4_weights,
    prepare_trtllm_fp8_block_activations,
    prepare_trtllm_fp8_block_weights,
    prepare_trtllm_fp8_per_tensor_activations,
    prepare_trtllm_fp8_per_tensor_weights,
    prepare_trtllm_mxint4_weights,
)
from hopyard.compat.flashinfer.quantize import (
    e2m1_and_ufp8sf_scale_to_float,
    fp4_quantize,
    mxfp4_dequantize,
    mxfp4_quantize,
    mxfp8_dequantize_host,
    mxfp8_quantize,
    nvfp4_quantize,
)
from hopyard.compat.flashinfer.routing import (
    TrtllmGenRoutingResult,
    fused_topk_deepseek,
    hash_topk,
    trtllm_gen_routing,
)
from hopyard.compat.flashinfer.tuning import (
    forced_tactic,
    is_trtllm_moe_supported,
    trtllm_get_valid_moe_configs,
    trtllm_moe_tactic_name,
)

__all__ = [
    "ActivationType",
    "DtypeTrtllmGen",
    "Fp8QuantizationType",
    "GatedActType",
    "MoERunner",
    "QuantVariant",
    "RoutingInputMode",
    "RoutingMethodType",
    "SfLayout",
    "TrtllmGenRoutingResult",
    "TrtllmMoERoutingMetadata",
    "TrtllmMoERoutingMetadataSlot",
    "WeightLayout",
    "_maybe_get_cached_w3_w1_permute_indices",
    "autotune",
    "block_scale_interleave",
    "clear_caches",
    "convert_to_block_layout",
    "deduce_trtllm_gen_tensor_dtype",
    "e2m1_and_ufp8sf_scale_to_float",
    "forced_tactic",
    "fp4_quantize",
    "fused_topk_deepseek",
    "get_reorder_rows_for_gated_act_gemm_row_indices",
    "get_shuffle_matrix_a_row_indices",
    "get_shuffle_matrix_sf_a_row_indices",
    "get_w2_permute_indices_with_cache",
    "has_block_scale",
    "hash_topk",
    "is_gated_activation",
    "is_trtllm_moe_supported",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
    "nvfp4_block_scale_interleave",
    "nvfp4_quantize",
    "pack_topk_ids",
    "populate_trtllm_moe_routing_metadata_",
    "prepare_cutlass_bf16_weights",
    "prepare_cutlass_w4a16_weights",
    "prepare_trtllm_bf16_weights",
    "prepare_trtllm_fp4_activations",
    "prepare_trtllm_fp4_weights",
    "prepare_trtllm_fp8_block_activations",
    "prepare_trtllm_fp8_block_weights",
    "prepare_trtllm_fp8_per_tensor_activations",
    "prepare_trtllm_fp8_per_tensor_weights",
    "prepare_trtllm_mxint4_weights",
    "reorder_rows_for_gated_act_gemm",
    "set_autotune_process_group",
    "shuffle_matrix_a",
    "shuffle_matrix_sf_a",
    "trtllm_bf16_moe",
    "trtllm_bf16_routed_moe",
    "trtllm_fp4_block_scale_moe",
    "trtllm_fp4_block_scale_routed_moe",
    "trtllm_fp8_block_scale_moe",
    "trtllm_fp8_block_scale_routed_moe",
    "trtllm_fp8_per_tensor_scale_moe",
    "trtllm_fp8_per_tensor_scale_routed_moe",
    "trtllm_gen_routing",
    "trtllm_get_valid_moe_configs",
    "trtllm_moe_allocate_routing_metadata",
    "trtllm_moe_allocate_routing_metadata_multi_tile",
    "trtllm_moe_tactic_name",
    "trtllm_mxint4_block_scale_moe",
    "trtllm_mxint4_block_scale_routed_moe",
]
