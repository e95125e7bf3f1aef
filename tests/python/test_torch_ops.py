# SPDX-License-Identifier: Apache-2.0
"""torch.ops.hopyard: the same bits as a layer's call, in eager mode, compiled, and in a graph."""

from __future__ import annotations

import gc
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hopyard
import layers

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounter  # noqa: E402
from torch._subclasses import FakeTensor, FakeTensorMode  # noqa: E402

import hopyard.compat.flashinfer as fi  # noqa: E402
from devices import DEVICES, needs_gpu, why_no_gpu  # noqa: E402
from hopyard import torch_ops  # noqa: E402

OPS = torch.ops.hopyard
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"


class Case:
    """The usual layer with torch tensors, its handle and a call's arguments."""

    def __init__(self, device="cpu", seed=0):
        self.data = layers.arrays(seed)

        def weight(values):
            return torch.from_numpy(values).bfloat16().to(device)

        experts = hopyard.ExpertWeights(gemm1=weight(self.data.gemm1), gemm2=weight(self.data.down))
        self.layer = hopyard.MoeLayer(
            layers.spec(), hopyard.Weights(layers.spec(), experts), layers.TOKENS
        )
        self.handle = torch_ops.handle(self.layer)
        self.hidden = weight(self.data.hidden)
        self.logits = torch.from_numpy(self.data.logits).to(device)

    def replay(self):
        shape = (layers.TOKENS, layers.TOP_K)
        return torch.full(shape, -9, dtype=torch.int16, device=self.hidden.device)

    def load(self):
        return torch.zeros(layers.EXPERTS, dtype=torch.int32, device=self.hidden.device)


@pytest.fixture(params=DEVICES)
def case(request):
    with torch.no_grad():
        yield Case(request.param)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_same_bits_as_the_layer(case):
    replay, load = case.replay(), case.load()
    output = torch_ops.moe(
        case.hidden, case.handle, logits=case.logits, replay_out=replay, load_out=load
    )
    wanted_replay, wanted_load = case.replay(), case.load()
    wanted = case.layer(
        case.hidden, logits=case.logits, replay_out=wanted_replay, load_out=wanted_load
    )
    assert torch.equal(output, wanted)
    assert torch.equal(replay, wanted_replay)
    assert torch.equal(load, wanted_load)
    assert torch.equal(load.cpu().long(), torch.bincount(replay.cpu().long().ravel(), minlength=8))
    again = OPS.moe(case.hidden, case.handle, logits=case.logits, ids=replay)
    assert torch.equal(again, wanted)


def test_the_function_chooses_the_operator(case):
    wanted = case.layer(case.hidden, logits=case.logits)
    assert torch.equal(torch_ops.moe(case.hidden, case.handle, logits=case.logits), wanted)
    out = torch.zeros_like(case.hidden)
    assert torch_ops.moe(case.hidden, case.handle, logits=case.logits, out=out) is out
    assert torch.equal(out, wanted)
    count = torch.tensor([3], dtype=torch.int32, device=case.hidden.device)
    replay = case.replay()
    output = torch_ops.moe(
        case.hidden, case.handle, logits=case.logits, replay_out=replay, num_tokens=count
    )
    assert torch.equal(output[:3], wanted[:3])
    assert not output[3:].any()
    assert (replay[3:] == -9).all()


def test_out_is_written_and_added_to(case):
    wanted = case.layer(case.hidden, logits=case.logits)
    narrow = torch.zeros(layers.TOKENS, 40, dtype=torch.bfloat16, device=case.hidden.device)
    assert OPS.moe_out(case.hidden, case.handle, narrow, logits=case.logits) is None
    assert torch.equal(narrow, wanted[:, :40])
    start = torch.full_like(wanted, 3.0)
    OPS.moe_out(case.hidden, case.handle, start, accumulate=True, logits=case.logits)
    torch.testing.assert_close(start, wanted + 3, rtol=2**-7, atol=2**-7)


def test_rows_without_their_sums(case):
    """finalize=False, in eager mode and compiled: there is no output but the rows."""
    slots = layers.TOKENS * layers.TOP_K
    device = case.hidden.device

    def run(hidden, handle, logits, rows, places):
        return torch_ops.moe(
            hidden, handle, logits=logits, rows_out=rows, slot_to_row_out=places, finalize=False
        )

    def outputs():
        rows = torch.zeros(slots, layers.HIDDEN, dtype=torch.bfloat16, device=device)
        return rows, torch.zeros(layers.TOKENS, layers.TOP_K, dtype=torch.int32, device=device)

    wanted, places = outputs()
    case.layer(
        case.hidden, logits=case.logits, rows_out=wanted, slot_to_row_out=places, finalize=False
    )
    assert wanted.any()
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        rows, own_places = outputs()
        assert torch.equal(call(case.hidden, case.handle, case.logits, rows, own_places), wanted)
        assert torch.equal(rows, wanted)
        assert torch.equal(own_places, places)
    out = torch.zeros_like(case.hidden)
    usual = torch_ops.moe(case.hidden, case.handle, logits=case.logits, out=out, finalize=True)
    assert torch.equal(usual, case.layer(case.hidden, logits=case.logits))
    for target in (OPS.moe_out, lambda *args, **more: torch_ops.moe(*args[:2], **more)):
        with pytest.raises(ValueError, match="finalize is False without rows_out, wanted a tensor"):
            target(case.hidden, case.handle, None, logits=case.logits, finalize=False)
    with pytest.raises(ValueError, match="out is None, wanted a tensor to write; only finalize=F"):
        OPS.moe_out(case.hidden, case.handle, None, logits=case.logits)
    with pytest.raises(ValueError, match="finalize is False, wanted neither out nor accumulate"):
        OPS.moe_out(
            case.hidden, case.handle, out, logits=case.logits, rows_out=wanted, finalize=False
        )


def test_num_tokens_is_a_tensor(case):
    count = torch.tensor(5, dtype=torch.int32, device=case.hidden.device)
    output = OPS.moe(case.hidden, case.handle, logits=case.logits, num_tokens=count)
    assert torch.equal(output[:5], case.layer(case.hidden, logits=case.logits)[:5])
    assert not output[5:].any()


@pytest.mark.parametrize("bf16", [False, True])
def test_route(bf16, case):
    rule = hopyard.RoutingRule.deepseek_v3(num_groups=4, top_groups=2, scaling_factor=2.5)
    bias = torch.linspace(-0.2, 0.2, layers.EXPERTS, device=case.hidden.device)
    replay = case.replay()
    text = torch_ops.rule_text(rule)
    ids, weights = OPS.route(case.logits, text, 2, bias=bias, replay_out=replay, bf16_weights=bf16)
    wanted_ids, wanted = hopyard.route(
        case.logits, rule, 2, bias=bias, weights_dtype="bfloat16" if bf16 else "float32"
    )
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(weights, wanted)
    assert weights.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(replay.int(), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_route_out(dtype, backend, case):
    """Results that the caller gives, in eager mode and compiled."""
    text = torch_ops.rule_text(case.layer.spec.routing)
    device = case.hidden.device
    ids = torch.full((layers.TOKENS, 2), 77, dtype=torch.int32, device=device)
    weights, replay = torch.full(ids.shape, 77, dtype=dtype, device=device), case.replay()
    count = torch.tensor([20], dtype=torch.int32, device=device)

    def run(logits, ids, weights, replay, count):
        OPS.route_out(logits, text, 2, ids, weights, replay_out=replay, num_tokens=count)
        return ids + 1

    compiled = run if backend is None else torch.compile(run, fullgraph=True, backend=backend)
    after = compiled(case.logits, ids, weights, replay, count)
    bf16 = dtype == torch.bfloat16
    wanted_ids, wanted = OPS.route(case.logits, text, 2, bf16_weights=bf16)
    assert torch.equal(ids[:20], wanted_ids[:20])
    assert torch.equal(weights[:20], wanted[:20])
    assert torch.equal(replay[:20].int(), wanted_ids[:20])
    assert torch.equal(after, ids + 1)
    assert (ids[20:] == 77).all()
    assert (weights[20:] == 77).all()


def operator_calls(case):
    """Arguments of every operator, as opcheck takes them."""
    text = torch_ops.rule_text(case.layer.spec.routing)
    outputs = {"replay_out": case.replay(), "load_out": case.load()}
    options = {"logits": case.logits, **outputs}
    result = torch.zeros_like(case.hidden)
    return {
        "moe": ((case.hidden, case.handle), {"logits": case.logits}),
        "moe_out": ((case.hidden, case.handle, result), options),
        "moe_out_rows": (
            (case.hidden, case.handle, None),
            {
                **options,
                "finalize": False,
                "rows_out": result.repeat(layers.TOP_K, 1),
                "slot_to_row_out": case.replay().int(),
            },
        ),
        "route": ((case.logits, text, layers.TOP_K), outputs),
        "route_out": (
            (case.logits, text, layers.TOP_K, case.replay().int(), case.replay().float()),
            outputs,
        ),
    }


@pytest.mark.parametrize("name", ["moe", "moe_out", "moe_out_rows", "route", "route_out"])
def test_opcheck(name, case):
    args, options = operator_calls(case)[name]
    results = torch.library.opcheck(getattr(OPS, name.removesuffix("_rows")).default, args, options)
    assert set(results.values()) == {"SUCCESS"}


def block(hidden, first, second, logits, replay):
    """Two layers with something of torch between them; writes `replay`."""
    inner = torch_ops.moe(hidden * 0.5, first, logits=logits, replay_out=replay)
    inner = torch.tanh(inner + hidden)
    output = torch.empty_like(inner)
    OPS.moe_out(inner, second, output, logits=logits)
    return output


def test_compiled_is_eager_bit_by_bit(case):
    other = Case(case.hidden.device, seed=5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (layers.TOKENS, 7):
        results = []
        for run in (block, compiled):
            replay = case.replay()
            hidden, logits = case.hidden[:tokens], case.logits[:tokens]
            results.append((run(hidden, case.handle, other.handle, logits, replay), replay))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert (results[0][1][tokens:] == -9).all()


def test_inductor_gives_the_same_bits(case):
    """The operators alone: Inductor's own arithmetic between them is not what is tested."""

    def run(hidden, handle, logits, out):
        OPS.moe_out(hidden, handle, out, logits=logits)
        return OPS.moe(out, handle, logits=logits)

    compiled = torch.compile(run, fullgraph=True, backend="inductor")
    outs = [torch.zeros_like(case.hidden) for _ in range(2)]
    wanted = run(case.hidden, case.handle, case.logits, outs[0])
    assert torch.equal(compiled(case.hidden, case.handle, case.logits, outs[1]), wanted)
    assert torch.equal(*outs)


def test_one_graph_serves_all_layers():
    with torch.no_grad():
        cases = [Case(seed=seed) for seed in range(5)]
        counter = CompileCounter()
        compiled = torch.compile(
            lambda hidden, handle, logits: OPS.moe(hidden, handle, logits=logits),
            fullgraph=True,
            backend=counter,
        )
        for each in cases:
            output = compiled(each.hidden, each.handle, each.logits)
            assert torch.equal(output, each.layer(each.hidden, logits=each.logits))
        assert counter.frame_count == 2  # of a constant handle, then of any


@needs_gpu
def test_a_cuda_graph_replays_the_eager_bits():
    with torch.no_grad():
        case = Case("cuda")
        hidden, logits, replay = case.hidden.clone(), case.logits.clone(), case.replay()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # not the default stream, as before a capture
            torch_ops.moe(hidden, case.handle, logits=logits, replay_out=replay)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = torch_ops.moe(hidden, case.handle, logits=logits, replay_out=replay)
        for seed in (11, 12):
            torch.manual_seed(seed)
            hidden.normal_()
            logits.normal_()
            replay.fill_(-9)
            graph.replay()
            wanted_replay = case.replay()
            wanted = case.layer(hidden, logits=logits, replay_out=wanted_replay)
            assert torch.equal(output, wanted)
            assert torch.equal(replay, wanted_replay)


def test_meta_and_fake_tensors_reach_no_kernel(monkeypatch):
    case = Case()

    def kernel(*args, **kwargs):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(hopyard.MoeLayer, "__call__", kernel)
    monkeypatch.setattr("hopyard.routing.route", kernel)
    with pytest.raises(AssertionError, match="a kernel was called"):
        OPS.moe(case.hidden, case.handle, logits=case.logits)

    def check(hidden, logits, replay, kind):
        output = torch_ops.moe(hidden, case.handle, logits=logits, replay_out=replay)
        assert OPS.moe_out(hidden, case.handle, output, logits=logits) is None
        text = torch_ops.rule_text(case.layer.spec.routing)
        ids, weights = OPS.route(logits, text, 2, replay_out=replay)
        assert OPS.route_out(logits, text, 2, ids, weights, replay_out=replay) is None
        assert output.shape == case.hidden.shape
        assert output.dtype == torch.bfloat16
        assert ids.shape == weights.shape == replay.shape
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
        for result in (output, ids, weights):
            assert kind(result)
        # Shapes follow from the arguments, not from what the handle names.
        assert OPS.moe(hidden, 10**9, logits=logits).shape == hidden.shape

    given = (case.hidden, case.logits, case.replay())
    check(*(tensor.to("meta") for tensor in given), lambda result: result.is_meta)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in given]
    with mode:
        check(*fakes, lambda result: isinstance(result, FakeTensor))


@needs_gpu
def test_a_compiler_puts_the_operator_into_its_own_cuda_graph():
    """Inductor's: a warm-up, a capture and replays; nothing keeps the operator out of them."""
    from torch._dynamo.utils import counters

    with torch.no_grad():
        case = Case("cuda")
        counters.clear()
        compiled = torch.compile(
            lambda hidden, logits: OPS.moe(hidden * 1, case.handle, logits=logits) * 1,
            fullgraph=True,
            mode="reduce-overhead",
        )
        for seed in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            torch.manual_seed(seed)
            hidden, logits = torch.randn_like(case.hidden), torch.randn_like(case.logits)
            output = compiled(hidden, logits).clone()
            assert torch.equal(output, case.layer(hidden, logits=logits))
        assert counters["inductor"]["cudagraph_skips"] == 0


def refuse_without_memory(case):
    """A layer's own call and `route` refuse meta and fake tensors, each argument by its name."""
    mode = FakeTensorMode()
    count = torch.tensor(3, dtype=torch.int32, device=case.hidden.device)
    options = {"logits": case.logits, "num_tokens": count, "replay_out": case.replay()}
    for kind, without in (("meta", lambda x: x.to("meta")), ("fake", mode.from_tensor)):
        message = "{} is a " + kind + " tensor, which has no memory; wanted one with values"
        with pytest.raises(ValueError, match=message.format("hidden")):
            case.layer(without(case.hidden), logits=case.logits)
        for name, value in options.items():
            with pytest.raises(ValueError, match=message.format(name)):
                case.layer(case.hidden, **options | {name: without(value)})
        rule = case.layer.spec.routing
        with pytest.raises(ValueError, match=message.format("num_tokens")):
            hopyard.route(case.logits, rule, 2, num_tokens=without(count))
    with mode, pytest.raises(ValueError, match="output is a fake tensor"):
        case.layer(case.hidden, logits=case.logits)


@pytest.mark.parametrize("tuning", [hopyard.autotune, fi.autotune])
def test_tuning_meets_no_tensor_without_memory(tuning, case):
    """What crashed FlashInfer: tuning on, and tensors without memory on the way to the call."""
    own = tuning is hopyard.autotune
    wanted = case.layer(case.hidden, logits=case.logits)

    def run(hidden, handle, logits):
        return OPS.moe(hidden * 1, handle, logits=logits)

    def measured():
        return hopyard.tuning_stats().measured

    before = measured()
    with tuning(tokens=[1, 16], max_seconds=5) if own else tuning(True, tuning_buckets=(1, 16)):
        for tokens in (1, 16):
            given = (case.hidden[:tokens], case.logits[:tokens])
            assert run(given[0].to("meta"), case.handle, given[1].to("meta")).is_meta
            mode = FakeTensorMode()
            with mode:
                hidden, logits = (mode.from_tensor(tensor) for tensor in given)
                assert isinstance(run(hidden, case.handle, logits), FakeTensor)
        refuse_without_memory(case)
        assert measured() == before
        results = torch.library.opcheck(OPS.moe.default, *operator_calls(case)["moe"])
        assert set(results.values()) == {"SUCCESS"}
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for tokens in (1, 16, layers.TOKENS):
            output = compiled(case.hidden[:tokens], case.handle, case.logits[:tokens])
            if case.hidden.device.type == "cpu":  # whose kernels give the same bits
                assert torch.equal(output, wanted[:tokens])
            error = (output.float() - wanted[:tokens].float()).norm(dim=1)
            assert (error <= 0.02 * wanted[:tokens].float().norm(dim=1)).all()
    assert (measured() > before) == own  # FlashInfer's tunes its own functions only


def test_a_layer_refuses_tensors_without_memory():
    """Called directly, without the operator."""
    refuse_without_memory(Case())


def test_gradients_are_refused():
    case = Case()
    hidden, logits = case.hidden.clone().requires_grad_(), case.logits.clone().requires_grad_()
    text = torch_ops.rule_text(case.layer.spec.routing)
    message = "has no backward, but {} requires grad; call it under torch.no_grad"
    with pytest.raises(NotImplementedError, match="moe " + message.format("hidden")):
        OPS.moe(hidden, case.handle, logits=case.logits)
    with pytest.raises(NotImplementedError, match="moe_out " + message.format("logits")):
        OPS.moe_out(case.hidden, case.handle, torch.zeros_like(case.hidden), logits=logits)
    with pytest.raises(NotImplementedError, match="route " + message.format("logits")):
        OPS.route(logits, text, 2)
    ids, weights = OPS.route(case.logits, text, 2)
    with pytest.raises(NotImplementedError, match="route_out " + message.format("weights")):
        OPS.route_out(case.logits, text, 2, ids, weights.requires_grad_())

    def run(x):
        return OPS.moe(x * 2, case.handle, logits=case.logits)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="has no backward"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(hidden)
    with torch.no_grad():
        assert not OPS.moe(hidden, case.handle, logits=logits).requires_grad


def test_weights_that_require_gradients_are_refused():
    """By the layer itself, and so by the operators in eager mode."""
    case = Case()
    values = torch.from_numpy(case.data.gemm1).bfloat16()
    parameter = torch.nn.Parameter(values)
    down = torch.from_numpy(case.data.down).bfloat16()

    def layer_of(gemm1):
        experts = hopyard.ExpertWeights(gemm1=gemm1, gemm2=down)
        weights = hopyard.Weights(layers.spec(), experts)
        return hopyard.MoeLayer(layers.spec(), weights, layers.TOKENS)

    wanted = case.layer(case.hidden, logits=case.logits)
    frozen, trained = layer_of(parameter.detach()), layer_of(parameter)
    assert torch.equal(frozen(case.hidden, logits=case.logits), wanted)
    message = r"weights.routed.gemm1.values requires grad, but Hopyard has no backward.*no_grad\(\)"
    handle = torch_ops.handle(trained)
    with pytest.raises(ValueError, match=message):
        trained(case.hidden, logits=case.logits)
    with pytest.raises(ValueError, match=message):
        frozen.with_weights(trained.weights)(case.hidden, logits=case.logits)
    with pytest.raises(ValueError, match=message):
        OPS.moe(case.hidden, handle, logits=case.logits)
    with torch.no_grad():
        assert torch.equal(trained(case.hidden, logits=case.logits), wanted)
        assert torch.equal(OPS.moe(case.hidden, handle, logits=case.logits), wanted)


def test_a_gpu_is_one_of_torch_and_of_the_library(monkeypatch):
    """With a library for CPUs, the cases on a GPU are skipped on a machine that has one."""
    pick_device = runpy.run_path(str(EXAMPLES / "hopper.py"))["pick_device"]
    answer = SimpleNamespace(supported=True, reason="no backend")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(hopyard, "explain", lambda *_, **__: answer)
    assert (why_no_gpu(), pick_device(layers.spec())) == ("", "cuda")
    answer.supported = False
    assert why_no_gpu() == "the extension was built without HOPYARD_CUDA=ON"
    assert pick_device(layers.spec()) == "cpu"
    answer.supported = True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert why_no_gpu() == "the GPU is not of compute capability 9.0"
    assert pick_device(layers.spec()) == "cpu"


def test_handles():
    case = Case()
    assert torch_ops.handle(case.layer) == case.handle
    assert Case().handle != case.handle
    gone = case.handle
    hidden, logits = case.hidden, case.logits
    del case
    gc.collect()
    with pytest.raises(ValueError, match=f"layer={gone} names no live layer, wanted .*handle"):
        OPS.moe(hidden, gone, logits=logits)


def test_bad_arguments_are_named():
    case = Case()
    with pytest.raises(ValueError, match=r"hidden has shape \[24, 32\], wanted \[T, 64\].*moe_out"):
        OPS.moe(case.hidden[:, :32].contiguous(), case.handle, logits=case.logits)
    with pytest.raises(ValueError, match="accumulate is set without out"):
        torch_ops.moe(case.hidden, case.handle, logits=case.logits, accumulate=True)
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"hidden has dtype torch.uint8 .* give out"):
        torch_ops.moe(codes, case.handle, logits=case.logits[:4], replay_out=case.replay())
    with pytest.raises(ValueError, match="logits has shape"):
        OPS.moe(case.hidden, case.handle, logits=case.logits[:, :4].contiguous())
    rule = torch_ops.rule_text(case.layer.spec.routing)
    ids, weights = OPS.route(case.logits, rule, 2)
    for _ in range(2):  # texts of rules are remembered, those of none are not
        with pytest.raises(ValueError, match=r"rule is 'top2', wanted the text of .*rule_text"):
            OPS.route(case.logits, "top2", 2)
        with pytest.raises(ValueError, match=r"rule is '\[1\]', wanted the text of .*rule_text"):
            OPS.route_out(case.logits, "[1]", 2, ids, weights)
        with pytest.raises(ValueError, match="score is 'magic', wanted one of logit, softmax"):
            OPS.route(case.logits, '{"score": "magic"}', 2)
    with pytest.raises(ValueError, match="expert_ids is i64; wanted i32"):
        OPS.route_out(case.logits, rule, 2, ids.long(), weights)
    with pytest.raises(ValueError, match=r"weights has shape \[24, 1\]; wanted \[24, 2\]"):
        OPS.route_out(case.logits, rule, 2, ids, weights[:, :1].contiguous())


def test_only_torch_ops_imports_torch():
    program = "import sys, hopyard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
