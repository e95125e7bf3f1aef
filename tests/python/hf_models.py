# SPDX-License-Identifier: Apache-2.0
"""Small random transformers models of the supported families, and their MoE modules."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import hopyard

LAYER = 1  # the first layer is dense in some families
TOKENS = 96

_COMMON = {
    "vocab_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """How a family is configured, and what its router returns."""

    config: Callable[..., Any]
    options: dict[str, Any]
    module: str = "mlp"
    router: str = "gate"
    sorted_ids: bool = True  # ids come in descending score order

    def make(self, hidden: int = 64, width: int = 40, **more: Any) -> Any:
        """A configuration with these sizes of the MoE layer."""
        options = {**_COMMON, **self.options, "hidden_size": hidden, **more}
        options["moe_intermediate_size" if "n_routed_experts" in options else "_"] = width
        if self.config is transformers.Qwen3MoeConfig:
            options["moe_intermediate_size"] = width
        options.setdefault("intermediate_size", width)
        options.pop("_", None)
        return self.config(**options)


_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
}
FAMILIES = {
    "mixtral": Family(
        transformers.MixtralConfig,
        {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        transformers.Qwen3MoeConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "intermediate_size": 64,
        },
    ),
    "deepseek_v3": Family(
        transformers.DeepseekV3Config,
        {
            **_DEEPSEEK,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        sorted_ids=False,
    ),
    "gpt_oss": Family(
        transformers.GptOssConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
        },
        router="router",
    ),
    "llama4": Family(
        transformers.Llama4TextConfig,
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
        module="feed_forward",
        router="router",
    ),
    "glm4_moe": Family(
        transformers.Glm4MoeConfig,
        {**_DEEPSEEK, "head_dim": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        sorted_ids=False,
    ),
}


def moe_module(model: Any, family: Family) -> Any:
    """The MoE module of layer `LAYER`."""
    return getattr(model.model.layers[LAYER], family.module)


def random_model(family: Family, seed: int, **sizes: Any) -> Any:
    """A BF16 model whose MoE weights have the spread of trained ones: every term matters."""
    torch.manual_seed(seed)
    config = family.make(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    module = moe_module(model, family)
    router = getattr(module, family.router)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if name.endswith("bias") else min(parameter.shape[-2:]) ** -0.5
            parameter.normal_(0, scale)
        router.weight.normal_(0, 1.5 * router.weight.shape[-1] ** -0.5)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.normal_(0, 0.1)
    return model


@dataclass(frozen=True)
class Routing:
    """What the FP32 router of a family chose, in its own order."""

    logits: torch.Tensor  # [T, E] float32
    ids: torch.Tensor  # [T, K]
    router_output: tuple[torch.Tensor, ...]  # what the router returned


def reference_routing(module: Any, family: Family, hidden: torch.Tensor) -> Routing:
    """Route with an FP32 copy of the module's router."""
    router = copy.deepcopy(getattr(module, family.router)).float()
    output = router(hidden.float())
    if family.config is transformers.Llama4TextConfig:
        scores, logits = output
        return Routing(logits, scores.topk(router.top_k, dim=-1)[1], output)
    logits, _, ids = output
    return Routing(logits, ids, output)


def run_module(module: Any, family: Family, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Run the module [T, H] -> [T, H] with the given routing, in the module's own dtypes."""
    router = getattr(module, family.router)
    native = router(hidden)
    forced = tuple(
        given.to(own.dtype) for given, own in zip(routing.router_output, native, strict=True)
    )
    hook = router.register_forward_hook(lambda *_: forced)
    try:
        output = module(hidden[None])
    finally:
        hook.remove()
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(hidden.shape)


def _write(directory: Path, source: Path, tensors: dict[str, Any], quantization: Any) -> None:
    """A checkpoint like `source` with these tensors and this quantization_config."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint in the published layout, and what transformers decodes it to."""

    directory: Path
    model: Any  # FP32


def _finish(source: Path, stored: Any, decoded: Any, quantization: Any) -> QuantizedCheckpoint:
    directory = source / "quantized"
    _write(directory, source, stored, quantization)
    _write(source / "decoded", source, decoded, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source / "decoded", dtype=torch.float32
    )
    return QuantizedCheckpoint(directory, model.eval())


def quantize_fp8(source: Path) -> QuantizedCheckpoint:
    """Experts of a saved DeepSeek-V3 as FP8 128x128 blocks: weight and weight_scale_inv."""
    decode = Fp8Dequantize(None)._dequantize_one
    stored = safetensors.torch.load_file(source / "model.safetensors")
    decoded = {name: tensor.float() for name, tensor in stored.items()}
    for name in [n for n in stored if re.search(r"experts\..*_proj\.weight$", n)]:
        quantized = hopyard.quantize(stored[name], "fp8_block128")
        stored[name] = quantized.codes
        stored[name + "_scale_inv"] = quantized.scales
        decoded[name] = decode(quantized.codes, quantized.scales, output_dtype=torch.float32)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    return _finish(source, stored, decoded, quantization)


def quantize_mxfp4(source: Path) -> QuantizedCheckpoint:
    """Experts of a saved gpt-oss as MXFP4: _blocks [E, rows, K / 32, 16] and _scales."""
    stored = safetensors.torch.load_file(source / "model.safetensors")
    decoded = {name: tensor.float() for name, tensor in stored.items()}
    for name in [n for n in stored if re.search(r"experts\.(gate_up|down)_proj$", n)]:
        rows_k = stored.pop(name).transpose(1, 2).contiguous()  # K is the last one as published
        quantized = hopyard.quantize(rows_k, "mxfp4")
        blocks = quantized.codes.unflatten(-1, (-1, 16))
        stored[name + "_blocks"] = blocks
        stored[name + "_scales"] = quantized.scales
        decoded[name] = convert_moe_packed_tensors(
            blocks, quantized.scales, dtype=torch.float32
        ).contiguous()
    return _finish(source, stored, decoded, {"quant_method": "mxfp4"})
