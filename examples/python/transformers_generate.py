# SPDX-License-Identifier: Apache-2.0
"""Text generation by transformers with the experts run by Hopyard, and the routing recorded.

The model is small and random, so that nothing is downloaded; from_pretrained takes
experts_implementation="hopyard" in the same way.
Run it with torch and transformers installed: python examples/python/transformers_generate.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads must not spin

import tempfile

import torch
import transformers

import hopyard
import hopyard.integrations.transformers as hopyard_experts  # registers "hopyard"

STEPS = 24


def save_model(directory: str) -> None:
    """A random Qwen3-MoE of three layers."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        directory
    )


def generate(model: transformers.PreTrainedModel, prompt: torch.Tensor) -> list[int]:
    """The tokens that follow a prompt."""
    output = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    return output[0, prompt.shape[1] :].tolist()


def main() -> None:
    """Generate with eager experts, with Hopyard's, and with Hopyard's in MXFP4."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, experts_implementation="hopyard"
        )
    prompt = torch.randint(0, 128, (1, 6))
    with hopyard.record_routing(model) as record:
        tokens = generate(model, prompt)
    ids = record.ids
    print(f"tokens: {tokens}")
    print(
        f"routing: {ids.dtype} {list(ids.shape)} [tokens, layers, top_k]; first: {ids[0].tolist()}"
    )
    print(f"busiest expert of each layer: {record.loads.argmax(-1).tolist()}")
    if int(record.loads.sum()) != ids.numel():
        raise SystemExit("the loads are not those of the ids")

    hopyard_experts.register("hopyard_mxfp4", weight_format="mxfp4")
    for name in ("eager", "hopyard_mxfp4"):
        model.set_experts_implementation(name)
        same = sum(a == b for a, b in zip(generate(model, prompt), tokens, strict=True))
        print(f"{name}: {same} of {STEPS} tokens are the same")


if __name__ == "__main__":
    main()
