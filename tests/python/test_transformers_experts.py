# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with experts_implementation="hopyard" against their own experts."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools

import pytest

import hopyard

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import hf_models as hf  # noqa: E402
from devices import DEVICES  # noqa: E402
from elsewhere import capture_on, torch_elsewhere  # noqa: E402
from hf_forced import forced_routing  # noqa: E402
from hopyard.integrations import experts as integration  # noqa: E402
from hopyard.integrations import transformers as hooks  # noqa: E402
from hopyard.integrations.replay import rule_of  # noqa: E402

STEPS, PROMPT = 64, 8
FAMILIES = list(hf.FAMILIES)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def make(name, seed=2, device="cpu", **sizes):
    model = hf.random_model(hf.FAMILIES[name], seed, max_position_embeddings=128, **sizes)
    model.set_experts_implementation("hopyard")
    return model.to(device)


@pytest.fixture
def quantised():
    """Registers a format for one test."""

    def make_name(weight_format, **options):
        name = f"hopyard_{weight_format}"
        hooks.register(name, weight_format=weight_format, **options)
        return name

    return make_name


def tokens_for(model, batch=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32, (batch, length), generator=generator).to(model.device)


def logits_of(model, tokens):
    return model(tokens).logits.flatten(0, 1).double()


def row_errors(logits, reference):
    return (logits - reference).norm(dim=-1) / reference.norm(dim=-1)


def bincounts(ids, experts):
    return torch.stack(
        [torch.bincount(layer.ravel(), minlength=experts) for layer in ids.unbind(1)]
    )


@contextlib.contextmanager
def forward_of(model, backend):
    """The model's forward pass is compiled within, without graph breaks; not where it is ""."""
    if backend:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=True)
    yield
    model.__dict__.pop("forward", None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "compiled"),
    [*itertools.product(FAMILIES, ["", "aot_eager"]), ("qwen3_moe", "inductor")],
)
def test_greedy_generation_and_teacher_forced_logits(name, compiled, device):
    """Generated with Hopyard step by step, then all at once with it, with eager, and in FP32.

    A router rounds its input to BF16 like everything else, so that models with different rounding
    sometimes choose different experts. The routing recorded while generating is forced on all.
    """
    model = make(name, device=device)
    with hopyard.record_routing(model) as record, forward_of(model, compiled):
        sequence = model.generate(
            tokens_for(model, 1, PROMPT), max_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )
    assert sequence.shape[1] == PROMPT + STEPS
    seen, wanted = sequence[:, :-1], sequence[0, PROMPT:]
    ids = record.ids
    assert ids.shape[0] == seen.shape[1]
    with hopyard.replay_routing(model, ids), forward_of(model, compiled):
        ours = logits_of(model, seen)
    model.set_experts_implementation("eager")
    reference_model = copy.deepcopy(model).float()
    with forced_routing(model, ids.to(device)):
        eager = logits_of(model, seen)
    with forced_routing(reference_model, ids.to(device)):
        reference = logits_of(reference_model, seen)

    bound = 2 * float(row_errors(eager, reference).max())
    assert 0 < bound < 0.08
    assert float(row_errors(ours, reference).max()) <= bound
    largest = 2 * float((eager - reference).abs().max())
    assert float((ours - reference).abs().max()) <= largest

    best = eager[PROMPT - 1 :].topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > largest
    assert int(clear.sum()) >= STEPS // 4
    assert torch.equal(wanted[clear], best.indices[clear, 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_routing_replayed_gives_the_same_bits(name, device):
    model = make(name, device=device)
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        logits = logits_of(model, tokens)
    ids = record.ids
    assert ids.dtype == torch.int16
    experts = record.loads.shape[1]
    assert torch.equal(record.loads, bincounts(ids, experts))
    with hopyard.replay_routing(model, ids), hopyard.record_routing(model) as again:
        assert torch.equal(logits_of(model, tokens), logits)
    assert torch.equal(again.ids, ids)
    assert torch.equal(again.loads, record.loads)
    # Other experts: the weights are those of the router's own code for them.
    other = ((ids.long() + 1) % experts).to(torch.int16)
    with hopyard.replay_routing(model, other), hopyard.record_routing(model) as moved:
        ours = logits_of(model, tokens)
    assert torch.equal(moved.ids, other)
    model.set_experts_implementation("eager")
    with forced_routing(model, other.to(device)):
        eager = logits_of(model, tokens)
    assert float(row_errors(ours, eager).max()) < 0.04
    assert float(row_errors(ours, logits).max()) > 0.04


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_compiled_models(name, device):
    model = make(name, device=device)
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        logits = logits_of(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hopyard.record_routing(model) as again:
        output = logits_of(compiled, tokens)
    assert float(row_errors(output, logits).max()) < 0.02
    assert again.ids.shape == record.ids.shape
    assert torch.equal(again.loads, bincounts(again.ids, again.loads.shape[1]))
    # Written parameters are seen by compiled code, too.
    for parameter in moe_experts(model)[-1].parameters():
        parameter.mul_(2)
    changed = logits_of(compiled, tokens)
    assert float(row_errors(changed, logits_of(model, tokens)).max()) < 0.02
    assert float(row_errors(changed, logits).max()) > 0.04


def test_replay_of_compiled_models():
    model = make("qwen3_moe")
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        logits = logits_of(model, tokens)
    shifted = ((record.ids.long() + 3) % 16).to(torch.int16)
    with hopyard.replay_routing(model, shifted):
        wanted = logits_of(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hopyard.replay_routing(model, shifted):
        assert float(row_errors(logits_of(compiled, tokens), wanted).max()) < 0.02
    assert float(row_errors(logits_of(compiled, tokens), logits).max()) < 0.02  # no longer forced
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits_of(compiled, tokens)
    with (
        pytest.raises(RuntimeError, match="the model was compiled before; enter the context first"),
        hopyard.replay_routing(model, shifted),
    ):
        logits_of(compiled, tokens)


def test_opcheck():
    model = make("mixtral")
    model(tokens_for(model))
    key = id(moe_experts(model)[0])
    hidden, logits = torch.zeros(24, 64).bfloat16(), torch.zeros(24, 8)
    ids, weights = torch.zeros(24, 2, dtype=torch.int64), torch.zeros(24, 2)
    for name, args in (
        ("transformers_experts", (hidden, ids, weights, key, "hopyard")),
        ("transformers_replay", (logits, ids, weights, key)),
    ):
        results = torch.library.opcheck(getattr(torch.ops.hopyard, name).default, args)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_compiled_models_follow_the_implementation(name, quantised):
    """Compiled code of an implementation is used again when the model comes back to it."""
    model = make(name)
    tokens = tokens_for(model)
    other = quantised("mxfp8")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for implementation in ("hopyard", other, "hopyard"):
        model.set_experts_implementation(implementation)
        outputs.append(logits_of(compiled, tokens))
        assert float(row_errors(outputs[-1], logits_of(model, tokens)).max()) < 0.01
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_layers_compiled_one_by_one_keep_their_experts():
    model = make("mixtral")
    tokens = tokens_for(model)
    wanted = logits_of(model, tokens)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert float(row_errors(logits_of(model, tokens), wanted).max()) < 0.01


def test_from_pretrained(tmp_path):
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation="hopyard"
    )
    tokens = tokens_for(model)
    with hopyard.record_routing(loaded) as record:
        assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert record.ids.shape == (24, 2, 2)


def moe_experts(model):
    return [block.experts for block in hooks._blocks_of(model)]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_parameters_are_views_and_changes_are_seen(name):
    model = make(name)
    tokens = tokens_for(model)
    before = logits_of(model, tokens)
    state = hooks._state_of(hooks._blocks_of(model)[-1])
    weights = state._weights
    experts = moe_experts(model)[-1]
    experts.down_proj.mul_(2)  # as an optimiser does
    changed = logits_of(model, tokens)
    assert state._weights is weights  # the same views
    assert not torch.equal(changed, before)
    replaced = torch.nn.Parameter(experts.down_proj / 2)
    experts.down_proj = replaced
    assert torch.equal(logits_of(model, tokens), before)
    assert state._weights is not weights
    experts.down_proj.data = experts.down_proj.data * 2
    assert torch.equal(logits_of(model, tokens), changed)


def test_layers_that_are_alike_share_a_plan_and_models_are_not_kept():
    model = make("mixtral")
    logits_of(model, tokens_for(model))
    first, second = (hooks._state_of(block) for block in hooks._blocks_of(model))
    assert first._layer._plan is second._layer._plan
    assert first._layer._workspaces is second._layer._workspaces
    assert first._layer.weights is not second._layer.weights
    logits_of(model, tokens_for(model, 2, 50))  # beyond the capacity
    assert first._layer.max_tokens >= 100
    assert first._layer._plan is second._layer._plan
    keys = [id(experts) for experts in moe_experts(model)]
    assert all(key in hooks._experts for key in keys)
    del model, first, second
    gc.collect()
    assert not any(key in hooks._experts for key in keys)


def test_tables_take_effect_at_the_next_call():
    model = make("mixtral")
    tokens = tokens_for(model)
    usual = logits_of(model, tokens)
    first, second = (hooks._state_of(block) for block in hooks._blocks_of(model))
    untuned, weights = first._layer, first._weights
    table = hopyard.tune(untuned, tokens=[1], max_seconds=0.1)
    try:
        hopyard.use_tuning(table)
        hopyard.reset_tuning_stats()
        assert torch.equal(logits_of(model, tokens), usual)
        assert hopyard.tuning_stats().hits == 1  # one plan for both
        assert first._layer._plan is second._layer._plan is not untuned._plan
        assert first._weights is weights
    finally:
        hopyard.forget_tuning()
        hopyard.reset_tuning_stats()
    logits_of(model, tokens)
    stats = hopyard.tuning_stats()
    assert (stats.hits, stats.misses) == (0, 1)


FORMATS = {  # and the largest row error of the logits that each may add
    "mxfp4": 0.5,
    "nvfp4": 0.5,
    "mxfp8": 0.1,
    "fp8_per_channel": 0.1,
    "fp8_per_tensor": 0.1,
    "fp8_block128": 0.1,
    "mxint4": 0.5,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_format", list(FORMATS))
def test_weight_formats(weight_format, device, quantised):
    """The experts of gpt-oss (transposed, interleaved, with biases) and those decoded again."""
    model = make("gpt_oss", hidden=128, width=96, device=device)
    tokens = tokens_for(model)
    plain = logits_of(model, tokens)
    with hopyard.record_routing(model) as record:
        model(tokens)
    model.set_experts_implementation(quantised(weight_format))
    with hopyard.replay_routing(model, record.ids):
        ours = logits_of(model, tokens)
    name = {"fp8_per_channel": "fp8_per_row"}.get(weight_format, weight_format)
    for experts in moe_experts(model):
        for parameter in (experts.gate_up_proj, experts.down_proj):
            rows = parameter.transpose(1, 2).contiguous().cpu()
            decoded = hopyard.dequantize(hopyard.quantize(rows, name))
            parameter.copy_(decoded.transpose(1, 2))
    model.set_experts_implementation("hopyard")
    with hopyard.replay_routing(model, record.ids):
        wanted = logits_of(model, tokens)
    assert float(row_errors(ours, wanted).max()) < 0.03
    assert 1e-3 < float(row_errors(ours, plain).max()) < FORMATS[weight_format]


def test_quantised_parameters_follow_writes(quantised):
    model = make("qwen3_moe")
    model.set_experts_implementation(quantised("mxfp8", activations="mxfp8"))
    tokens = tokens_for(model)
    before = logits_of(model, tokens)
    experts = moe_experts(model)[-1]
    experts.down_proj.neg_()
    changed = logits_of(model, tokens)
    assert not torch.equal(changed, before)
    experts.down_proj.data.neg_()  # torch does not count this
    assert torch.equal(logits_of(model, tokens), changed)
    hooks.refresh(model)
    assert torch.equal(logits_of(model, tokens), before)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_gradients_that_would_be_lost_are_refused(name):
    """Whichever of them requires grad: each parameter of the experts, the router, their input."""
    model = make(name).requires_grad_(False)
    tokens = tokens_for(model)
    wanted = logits_of(model, tokens)
    experts = moe_experts(model)[0]
    block = model.model.layers[0]
    router = hooks._router_of(block.feed_forward if name == "llama4" else block.mlp)
    with hopyard.record_routing(model) as record:
        model(tokens)
    inputs = (experts.gate_up_proj, experts.down_proj, model.model.embed_tokens.weight)
    with torch.enable_grad():
        assert torch.equal(logits_of(model, tokens), wanted)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert float(row_errors(logits_of(compiled, tokens), wanted).max()) < 0.02
        for parameter in (*inputs, router.weight):
            parameter.requires_grad_(True)
            with pytest.raises(NotImplementedError, match="has no backward; run the model under"):
                model(tokens)
            parameter.requires_grad_(False)
        router.weight.requires_grad_(True)
        replaying = hopyard.replay_routing(model, record.ids)
        with pytest.raises(NotImplementedError, match="has no backward"), replaying:
            model(tokens)


def test_copies_of_parameters_without_a_version_are_refused(quantised):
    """Made under inference mode: a write would go unseen. BF16 is read where it is."""
    with torch.inference_mode():
        model = make("qwen3_moe")
        tokens = tokens_for(model)
        before = logits_of(model, tokens)
        moe_experts(model)[-1].down_proj.neg_()
        assert not torch.equal(logits_of(model, tokens), before)
        model.set_experts_implementation(quantised("mxfp8", activations="mxfp8"))
        with pytest.raises(ValueError, match="parameters of Qwen3MoeExperts were made under torch"):
            model(tokens)


def test_llama4_keeps_its_other_implementations():
    model = make("llama4")
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        ours = logits_of(model, tokens)
    model.set_experts_implementation("eager")
    with forced_routing(model, record.ids):  # a tie of two experts may go either way
        eager = logits_of(model, tokens)
    assert float(row_errors(ours, eager).max()) < 0.05
    assert not torch.equal(ours, eager)
    model.set_experts_implementation("hopyard")
    assert torch.equal(logits_of(model, tokens), ours)
    with pytest.raises(ValueError, match="grouped_mm"):
        model.set_experts_implementation("grouped_mm")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    assert fresh.config._experts_implementation == "hopyard"
    config = hf.FAMILIES["llama4"].make()
    assert type(model)(config).config._experts_implementation == "eager"


def test_bad_models_are_refused_by_name():
    model = make("mixtral")
    tokens = tokens_for(model)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="has no backward; run the"):
        model(tokens)
    with pytest.raises(ValueError, match=r"float32, wanted torch.bfloat16; load the model with"):
        copy.deepcopy(model).float()(tokens)
    for block in model.model.layers:
        block.mlp.experts.act_fn = torch.nn.Tanh()
    hooks._experts.clear()
    with pytest.raises(NotImplementedError, match="MixtralExperts has the activation Tanh, which"):
        model(tokens)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("has_gate", False, "MixtralExperts has no gate"),
        ("has_post_expert_norm", True, "MixtralExperts has a norm behind each expert"),
    ],
)
def test_modules_that_compute_something_else_are_refused(attribute, value, message):
    experts = make("mixtral").model.layers[0].mlp.experts
    setattr(experts, attribute, value)
    with pytest.raises(NotImplementedError, match=f"{message}, which Hopyard does not run; use"):
        integration.layout_of(experts)


def test_a_gate_of_its_own_is_refused():
    class OwnGate(type(make("mixtral").model.layers[0].mlp.experts)):
        def _apply_gate(self, gate_up):
            return gate_up

    experts = OwnGate(hf.FAMILIES["mixtral"].make())
    with pytest.raises(NotImplementedError, match="OwnGate has a gate function of its own"):
        integration.layout_of(experts)


def test_bad_recordings_and_replays():
    model = make("qwen3_moe")
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        pass
    with pytest.raises(RuntimeError, match=r"recorded \[0, 0\] tokens, wanted the same number"):
        _ = record.ids
    with hopyard.record_routing(model) as record:
        model(tokens)
    ids = record.ids
    with pytest.raises(ValueError, match=r"ids is torch.int64 of shape \[24, 2, 4\], wanted"):
        hopyard.replay_routing(model, ids.long()).__enter__()
    with pytest.raises(ValueError, match="ids has top_k=3, wanted the router's 4"):
        hopyard.replay_routing(model, ids[..., :3]).__enter__()
    with (
        pytest.raises(ValueError, match="the model runs 24 tokens, but ids has 23"),
        hopyard.replay_routing(model, ids[:-1]),
    ):
        model(tokens)
    with (
        pytest.raises(ValueError, match="the model ran 12 tokens, but ids has 24"),
        hopyard.replay_routing(model, ids),
    ):
        model(tokens[:1])
    assert float(row_errors(logits_of(model, tokens), logits_of(model, tokens)).max()) == 0
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"set_experts_implementation\('hopyard'\) first"):
        hopyard.record_routing(model)


def test_bad_names():
    for name in ("eager", "grouped_mm"):
        with pytest.raises(ValueError, match=f"name is '{name}', an implementation of transf"):
            hooks.register(name)
    with pytest.raises(AttributeError, match="no attribute 'record_rooting'"):
        _ = hopyard.record_rooting


def test_routers_that_are_not_known_are_refused():
    with pytest.raises(NotImplementedError, match="does not know how Linear weights experts; kno"):
        rule_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("captured", [0, 1])
def test_a_capture_is_refused(captured, monkeypatch):
    """A CUDA graph's replays run no Python, so that they would record and force nothing; but what
    is captured on another device has no say."""
    model = make("mixtral")
    tokens = tokens_for(model)
    with hopyard.record_routing(model) as record:
        model(tokens)
    key = id(moe_experts(model)[0])
    hidden, logits, ids, weights = (
        torch_elsewhere(f"cuda:{captured}", 24, width) for width in (64, 8, 2, 2)
    )
    replaying = hopyard.replay_routing(model, record.ids)
    capture_on(monkeypatch, captured)
    message = "hopyard.{} is active while a CUDA graph is captured"
    with (
        hopyard.record_routing(model),
        pytest.raises(RuntimeError, match=message.format("record_routing")),
    ):
        hooks._run_experts(hidden, ids, weights, key, "hopyard")
    with pytest.raises(RuntimeError, match=message.format("replay_routing")), replaying:
        hooks._run_replay(logits, ids, weights, key)
    with hopyard.record_routing(model) as again, hopyard.replay_routing(model, record.ids):
        model(tokens)  # on the CPU
    assert torch.equal(again.ids, record.ids)
