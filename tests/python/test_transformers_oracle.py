# SPDX-License-Identifier: Apache-2.0
"""Layers read from checkpoints of transformers models against the modules of transformers, on the
CPU and on a GPU.

Skipped without torch and transformers, except under `make test`, which installs them and sets
HOPYARD_REQUIRE_TRANSFORMERS.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest

import hopyard
from devices import DEVICES

if os.environ.get("HOPYARD_REQUIRE_TRANSFORMERS"):
    import torch
    import transformers

    import hf_models as hf
else:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("hf_models")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def worst_row_error(output, reference):
    """Largest relative L2 error of a token."""
    difference = (output.double() - reference.double()).norm(dim=-1)
    return float((difference / reference.double().norm(dim=-1)).max())


def random_hidden(width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(hf.TOKENS, width, generator=generator).bfloat16()


def run_layer(loaded, hidden, routing, device="cpu"):
    """Output and ids of our layer on a device, on the logits of the FP32 router."""
    placed = loaded.to(device)
    layer = hopyard.MoeLayer(placed.spec, placed.weights, max_tokens=hf.TOKENS)
    replay = torch.full((hf.TOKENS, placed.spec.top_k), -1, dtype=torch.int16, device=device)
    output = layer(
        hidden.to(device),
        logits=routing.logits.to(device),
        routing_bias=placed.routing_bias,
        replay_out=replay,
    )
    return output.cpu(), replay.cpu().long()


def check_ids(family, loaded, routing, replay):
    """Exactly the ids of the reference; in its order where it has one."""
    wanted = routing.ids
    alone, _ = hopyard.route(
        routing.logits, loaded.spec.routing, loaded.spec.top_k, bias=loaded.routing_bias
    )
    assert torch.equal(alone.long(), replay)
    if not family.sorted_ids:
        wanted, replay = wanted.sort(-1)[0], replay.sort(-1)[0]
    assert torch.equal(replay, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(hf.FAMILIES))
def test_bf16_layer_is_as_good_as_transformers(name, seed, device, tmp_path):
    family = hf.FAMILIES[name]
    model = hf.random_model(family, seed)
    model.save_pretrained(tmp_path)
    module = hf.moe_module(model, family)
    hidden = random_hidden(64, seed)
    routing = hf.reference_routing(module, family, hidden)
    reference = hf.run_module(copy.deepcopy(module).float(), family, hidden.float(), routing)
    plain = hf.run_module(module, family, hidden, routing)

    loaded = hopyard.load_layer(tmp_path, hf.LAYER)
    output, replay = run_layer(loaded, hidden, routing, device)

    check_ids(family, loaded, routing, replay)
    bound = 2 * worst_row_error(plain, reference)
    assert 0 < bound < 0.05
    assert worst_row_error(output, reference) <= bound


def test_sharded_checkpoint_is_the_same_layer(tmp_path):
    family = hf.FAMILIES["qwen3_moe"]
    model = hf.random_model(family, 6)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    hidden = random_hidden(64, 6)
    routing = hf.reference_routing(hf.moe_module(model, family), family, hidden)
    outputs = [
        run_layer(hopyard.load_layer(tmp_path / name, hf.LAYER), hidden, routing)[0]
        for name in ("one", "shards")
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", list(hf.FAMILIES))
def test_router_of_the_checkpoint_gives_the_reference_logits(name, tmp_path):
    family = hf.FAMILIES[name]
    model = hf.random_model(family, 2)
    model.save_pretrained(tmp_path)
    hidden = random_hidden(64, 2)
    routing = hf.reference_routing(hf.moe_module(model, family), family, hidden)
    loaded = hopyard.load_layer(tmp_path, hf.LAYER)
    np.testing.assert_allclose(
        loaded.router_logits(hidden.float().numpy()), routing.logits.numpy(), rtol=1e-5, atol=1e-5
    )


def test_the_oracle_notices_a_wrong_layer(tmp_path):
    """The bound has teeth: gate and up exchanged, or another scaling factor, fail it."""
    family = hf.FAMILIES["deepseek_v3"]
    model = hf.random_model(family, 3)
    module = hf.moe_module(model, family)
    hidden = random_hidden(64, 3)
    routing = hf.reference_routing(module, family, hidden)
    reference = hf.run_module(copy.deepcopy(module).float(), family, hidden.float(), routing)
    bound = 2 * worst_row_error(hf.run_module(module, family, hidden, routing), reference)

    def swap():
        experts = module.experts.gate_up_proj
        experts.copy_(torch.cat(experts.chunk(2, dim=1)[::-1], dim=1))

    def rescale():
        swap()  # back
        model.config.routed_scaling_factor *= 1.02

    for fault in (swap, rescale):
        fault()
        model.save_pretrained(tmp_path / fault.__name__)
        loaded = hopyard.load_layer(tmp_path / fault.__name__, hf.LAYER)
        output, _ = run_layer(loaded, hidden, routing)
        assert worst_row_error(output, reference) > bound, fault.__name__


def plain_fp8(module, hidden, routing):
    """DeepSeek's module in BF16 with activations rounded to e4m3 1x128 before each product."""

    def rounded(values):
        quantized = hopyard.quantize(values.contiguous(), "fp8_block1x128")
        return hopyard.dequantize(quantized, "bfloat16")

    def feed(values, gate, up, down):
        values = rounded(values)
        inner = torch.nn.functional.silu(values @ gate.T) * (values @ up.T)
        return rounded(inner) @ down.T

    shared = module.shared_experts
    parts = (p.weight for p in (shared.gate_proj, shared.up_proj, shared.down_proj))
    output = feed(hidden, *parts).float()
    _, weights, ids = routing.router_output
    for expert in range(module.experts.gate_up_proj.shape[0]):
        token, slot = torch.where(ids == expert)
        gate, up = module.experts.gate_up_proj[expert].chunk(2)
        result = feed(hidden[token], gate, up, module.experts.down_proj[expert])
        output.index_add_(0, token, result.float() * weights[token, slot, None])
    return output.bfloat16()


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory):
    """A DeepSeek-V3 checkpoint in FP8 blocks, and the module that transformers decodes it to."""
    source = tmp_path_factory.mktemp("fp8")
    family = hf.FAMILIES["deepseek_v3"]
    with torch.no_grad():
        hf.random_model(family, 4, hidden=256, width=128).save_pretrained(source)
        checkpoint = hf.quantize_fp8(source)
    return checkpoint.directory, hf.moe_module(checkpoint.model, family)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activations", ["bf16", "fp8_block128"])
def test_deepseek_fp8_blocks(activations, device, fp8_checkpoint):
    directory, module = fp8_checkpoint
    family = hf.FAMILIES["deepseek_v3"]
    hidden = random_hidden(256, 4)
    routing = hf.reference_routing(module, family, hidden)
    reference = hf.run_module(module, family, hidden.float(), routing)
    low = copy.deepcopy(module).bfloat16()
    low.gate.float()  # as in the BF16 model: the router's arithmetic is FP32
    if activations == "bf16":
        plain = hf.run_module(low, family, hidden, routing)
    else:
        plain = plain_fp8(low, hidden, routing)

    loaded = hopyard.load_layer(directory, hf.LAYER, activations)
    assert loaded.spec.weights == "fp8_block128"
    assert loaded.spec.shared.weights == "fp8_block128"
    output, replay = run_layer(loaded, hidden, routing, device)

    check_ids(family, loaded, routing, replay)
    bound = 2 * worst_row_error(plain, reference)
    assert 0 < bound < (0.05 if activations == "bf16" else 0.2)
    assert worst_row_error(output, reference) <= bound


def test_deepseek_fp8_default_activations_follow_the_weights(fp8_checkpoint):
    assert hopyard.load_layer(fp8_checkpoint[0], hf.LAYER).spec.activations == "fp8_block128"


@pytest.mark.parametrize("device", DEVICES)
def test_gpt_oss_mxfp4(device, tmp_path):
    family = hf.FAMILIES["gpt_oss"]
    hf.random_model(family, 5, hidden=128, width=96).save_pretrained(tmp_path)
    checkpoint = hf.quantize_mxfp4(tmp_path)
    module = hf.moe_module(checkpoint.model, family)
    hidden = random_hidden(128, 5)
    routing = hf.reference_routing(module, family, hidden)
    reference = hf.run_module(module, family, hidden.float(), routing)
    plain = hf.run_module(copy.deepcopy(module).bfloat16(), family, hidden, routing)

    loaded = hopyard.load_layer(checkpoint.directory, hf.LAYER)
    assert loaded.spec.weights == "mxfp4"
    output, replay = run_layer(loaded, hidden, routing, device)

    check_ids(family, loaded, routing, replay)
    bound = 2 * worst_row_error(plain, reference)
    assert 0 < bound < 0.05
    assert worst_row_error(output, reference) <= bound


def test_mxfp4_tensors_decode_alike_in_transformers(tmp_path):
    """transformers' own decoder and ours give the same values for our codes and scales."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = torch.randn(2, 96, 128).bfloat16()
    quantized = hopyard.quantize(values, "mxfp4")
    theirs = convert_moe_packed_tensors(
        quantized.codes.reshape(2, 96, 4, 16), quantized.scales, dtype=torch.float32
    )
    assert torch.equal(theirs.transpose(1, 2), hopyard.dequantize(quantized))
