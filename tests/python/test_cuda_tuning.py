# SPDX-License-Identifier: Apache-2.0
"""Tuning on a GPU: streams, captures, graphs, memory, and processes that find a table."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import subprocess
import sys

import pytest

import hopyard

torch = pytest.importorskip("torch")
from devices import why_no_gpu  # noqa: E402

if why_no_gpu():
    pytest.skip(why_no_gpu(), allow_module_level=True)

import autotuner_runners  # noqa: E402
import compat_layers as cl  # noqa: E402
import gpu_layers as gpu  # noqa: E402
import hopyard.compat.flashinfer as fi  # noqa: E402
import tuning_state  # noqa: E402
from autotuner_runners import dynamic  # noqa: E402
from hopyard import torch_ops  # noqa: E402
from hopyard.compat.flashinfer import autotuner as at  # noqa: E402

TOKENS = gpu.TOKENS
KINDS = [("bf16", "bf16"), ("fp8_block128", "fp8_block128"), ("mxfp4", "bf16")]
QUICK = {"tokens": [1, TOKENS], "max_seconds": 5.0}
OP = "test::op"
tuner = autotuner_runners.tuner
fresh = tuning_state.fresh
twins = functools.cache(gpu.twins)


@pytest.fixture(autouse=True)
def without_caches(fresh):
    fi.clear_caches()
    with torch.no_grad():
        yield
    fi.clear_caches()


def arrays(weights="bf16", activations="bf16", tokens=TOKENS):
    hidden, logits = twins(weights, activations).hidden(tokens)
    return {"hidden": gpu.to_gpu(hidden), "logits": gpu.to_gpu(logits)}


def layer_of(weights="bf16", activations="bf16", *, copied=False):
    """A new layer, of torch's tensors or of the library's copies."""
    one = twins(weights, activations)
    return hopyard.MoeLayer(one.spec, one.cpu.to("cuda") if copied else one.gpu, TOKENS)


def measured():
    return hopyard.tuning_stats().measured


# --- the library's tuner


@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_a_tuned_layer(weights, activations, tmp_path):
    path = tmp_path / "table.json"
    layer = layer_of(weights, activations)
    table = hopyard.tune(layer, **QUICK)
    (tuned,) = table.layers
    assert tuned.ranges[-1].last >= TOKENS
    assert table.machine.device == torch.cuda.get_device_name()
    assert all(entry.us > 0 and "cpu" not in entry.tactic for entry in tuned.ranges)
    # Time may end before all that lies between the two is measured.
    assert [fault for fault in tuned.faults if "not measured" not in fault.reason] == []
    table.save(path)
    hopyard.use_tuning(path)
    hopyard.reset_tuning_stats()
    later = layer_of(weights, activations)
    stats = hopyard.tuning_stats()
    assert (stats.hits, stats.misses, stats.stale, stats.measured) == (1, 0, 0, 0)
    assert "tuned:" in str(later.explain())
    for tokens in (1, TOKENS):
        output = later(**arrays(weights, activations, tokens))
        twins(weights, activations).judge(gpu.bits(output), tokens)


SECOND = """
import json, sys
from dataclasses import asdict
import hopyard, torch
import gpu_layers as gpu

twins = gpu.twins()
hidden, logits = (gpu.to_gpu(array) for array in twins.hidden())
layer = hopyard.MoeLayer(twins.spec, twins.gpu, gpu.TOKENS)
layer(hidden, logits=logits)
with hopyard.autotune(sys.argv[1], [1, gpu.TOKENS]):
    layer(hidden, logits=logits)
torch.cuda.synchronize()
print(json.dumps(asdict(hopyard.tuning_stats())))
"""


def test_a_second_process_launches_nothing_to_measure(tmp_path):
    path = tmp_path / "table.json"
    with hopyard.autotune(path, **QUICK):
        layer_of()(**arrays())
    assert measured() > 0
    environment = {"HOPYARD_TUNING_FILE": str(path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SECOND, path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["hits"] >= 1
    assert stats == {**stats, "misses": 0, "stale": 0, "measured": 0, "ignored": []}


@pytest.mark.parametrize("compiled", [False, True])
def test_operators_are_tuned_at_their_first_call(compiled):
    layer, given = layer_of(), arrays()
    handle = torch_ops.handle(layer)

    def run(hidden, handle, logits):
        return torch_ops.moe(hidden * 1, handle, logits=logits)

    torch._dynamo.reset()
    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    call(given["hidden"], handle, given["logits"])
    assert measured() == 0
    with hopyard.autotune(**QUICK) as session:
        output = call(given["hidden"], handle, given["logits"])
        runs = measured()
        assert runs > 0
        call(given["hidden"], handle, given["logits"])
        assert measured() == runs
    (tuned,) = session.table.layers
    assert tuned.key.path == hopyard.CallPath(ids=False, unfinalised=False, replay=False)
    twins().judge(gpu.bits(output))
    twins().judge(gpu.bits(call(given["hidden"], handle, given["logits"])))


@pytest.mark.parametrize("how", ["torch", "copied", "stream"])
def test_tuning_within_a_capture_is_refused_and_the_capture_goes_on(how):
    layer, given = layer_of(copied=how == "copied"), arrays()
    wanted = layer(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.cuda.current_stream()
        other = torch.cuda.Stream() if how == "stream" else captured
        call = {**given, "stream": captured.cuda_stream} if how == "stream" else given
        refused = pytest.raises(ValueError, match="the stream is being captured")
        with hopyard.autotune(**QUICK) as session, torch.cuda.stream(other), refused:
            layer(**call)
        if how != "stream":
            with pytest.raises(ValueError, match="the stream is being captured"):
                hopyard.tune(layer, **QUICK)
        result = layer(**given)
    assert session.table is None
    assert measured() == 0
    result.fill_(7)
    graph.replay()
    assert torch.equal(result, wanted)
    with hopyard.autotune(**QUICK):
        layer(**given)
    assert measured() > 0


@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_a_tuned_layer_is_captured_and_takes_any_number_of_tokens(weights, activations):
    layer, given = layer_of(weights, activations), arrays(weights, activations)
    live = torch.full((1,), TOKENS, dtype=torch.int32, device="cuda")
    call = {**given, "num_tokens": live}
    graph = torch.cuda.CUDAGraph()
    with hopyard.autotune(tokens=[1, 8, TOKENS], max_seconds=5.0):
        layer(**call)
        runs = measured()
        assert runs > 0
        with torch.cuda.graph(graph):  # what is known may be captured inside, too
            result = layer(**call)
        assert measured() == runs
    for count in (TOKENS, 1, 0, 17):
        live.fill_(count)
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, layer(**call)), count
    live.fill_(TOKENS)
    graph.replay()
    twins(weights, activations).judge(gpu.bits(result))


def test_tuning_on_a_side_stream_leaves_streams_and_memory_alone():
    layer, given = layer_of(), arrays()
    wanted = layer(**given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    free = []
    with torch.cuda.stream(stream):
        for _ in range(2):  # the first one loads the kernels
            assert len(hopyard.tune(layer, **QUICK)) == 1
            assert torch.cuda.current_stream() == stream
            assert torch.equal(layer(**given), wanted)  # it goes on with its kernels
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
    # What the driver keeps of graphs; the inputs and what empties the cache take 100 MB and more.
    assert free[0] - free[1] < 32 << 20


# --- FlashInfer's tuner with runners of the user's own


class Busy(at.TunableRunner):
    """Tactics that keep the GPU busy for so many thousands of cycles, and return their input."""

    def __init__(self, times=None, fallback=800, label="a"):
        self.label = label
        self.times_cache = {0: 500, 1: 150, 2: 300} if times is None else times
        self.fallback_cache = fallback
        self.calls_cache = []
        self.inputs_cache = set()

    def get_valid_tactics(self, inputs, profile):
        return list(self.times_cache)

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        self.calls_cache.append(tactic)
        self.inputs_cache.add(inputs[0].data_ptr())
        cost = self.fallback_cache if tactic == -1 else self.times_cache[tactic]
        result = inputs[0] * 2
        if callable(cost):
            result, cost = cost(result), 600
        with torch.cuda.device(inputs[0].device):
            torch.cuda._sleep(1000 * cost)
        return result


def fail(error):
    def call(_):
        raise error("CUDA error: out of memory")

    return call


def tensors(tokens=8, device="cuda"):
    return [torch.ones(tokens, 4, device=device)]


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_the_fastest_tactic_is_chosen(tuner, graph, cold, side):
    config = dynamic((4, 8), use_cuda_graph=graph, use_cold_l2_cache=cold)
    runner = Busy()
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        with at.autotune():
            assert tuner.choose_one(OP, [runner], config, tensors()) == (runner, 1)
            calls = len(runner.calls_cache)
            tuner.choose_one(OP, [runner], config, tensors())
            assert len(runner.calls_cache) == calls
        assert torch.cuda.current_stream() == stream
        assert not at.is_in_profile_measurement()
        chosen, tactic = tuner.choose_one(OP, [Busy()], config, tensors())
        assert (chosen(tensors(), tactic=tactic) == 2).all()
    assert tuner.stats.tuned_op_successful_configs == {OP: 2}
    assert tuner.stats.failed_tactics == {}
    if cold:  # all copies of a profile's inputs, also in a graph
        assert len(runner.inputs_cache) > tuner.how.repeat
    else:
        assert len(runner.inputs_cache) == 2


@pytest.mark.parametrize("graph", [False, True])
def test_tactics_that_fail_leave_the_others_alone(tuner, graph):
    runner = Busy(
        {
            4: lambda result: torch.full_like(result, result.sum().item()),  # waits
            0: fail(RuntimeError),
            2: lambda result: result * float("nan"),
            3: lambda result: result.view(7, 7),
            1: 150,
        }
    )
    config = dynamic((8,), use_cuda_graph=graph)
    usual = torch.cuda.current_stream()
    with at.autotune():
        assert tuner.choose_one(OP, [runner], config, tensors())[1] == 1
    assert torch.cuda.current_stream() == usual
    assert not torch.cuda.is_current_stream_capturing()
    # What waits for the GPU cannot be captured; what is not a number is the runner's own affair.
    assert tuner.stats.failed_tactics == {f"{OP}::Busy": {0, 3, 4} if graph else {0, 3}}
    assert (runner(tensors(), tactic=1) == 2).all()
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        output = runner(tensors(), tactic=1)
    again.replay()
    assert (output == 2).all()


@pytest.mark.parametrize("graph", [False, True])
def test_without_memory_the_fallback_runs_and_memory_is_given_back(tuner, graph, caplog):
    runner = Busy({0: 150, 1: lambda _: torch.empty(1 << 45, device="cuda")})
    config = dynamic((8,), use_cuda_graph=graph, use_cold_l2_cache=True)
    given = tensors()
    gc.collect()
    before = torch.cuda.memory_allocated()
    with caplog.at_level(logging.WARNING), at.autotune():
        assert tuner.choose_one(OP, [runner], config, given) == (runner, -1)
    assert any("OOM detected, falling back" in r.message for r in caplog.records)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("graph", [False, True])
def test_measuring_keeps_no_memory(tuner, graph):
    waits = {2: lambda result: result + result.sum().item()}  # cannot be captured
    runner = Busy({0: 150, 1: fail(RuntimeError), **waits})
    config = dynamic((1 << 16,), use_cuda_graph=graph, use_cold_l2_cache=True)
    given = tensors(1 << 16)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with at.autotune():
        assert tuner.choose_one(OP, [runner], config, given)[1] == 0
    assert torch.cuda.memory_allocated() == before


def test_a_capture_is_refused_and_goes_on(tuner):
    runner, given = Busy(), tensors()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with at.autotune(), pytest.raises(RuntimeError, match="active outer CUDA Graph capture"):
            tuner.choose_one(OP, [runner], dynamic((8,)), given)
        output = given[0] * 3
    assert runner.calls_cache == []
    graph.replay()
    assert (output == 3).all()
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic((8,)), given)[1] == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_inputs_on_another_gpu_than_the_current_one(tuner, graph):
    tuner.choose_one("test::first", [Busy()], at.TuningConfig(use_cuda_graph=graph), tensors())
    runner, given = Busy(), tensors(device="cuda:1")
    config = dynamic((8,), use_cuda_graph=graph)
    capture = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(capture, stream=torch.cuda.Stream(1)):
        given[0].mul_(1)
        refused = pytest.raises(RuntimeError, match="active outer CUDA Graph capture")
        with torch.cuda.device(0), at.autotune(), refused:
            tuner.choose_one(OP, [runner], config, given)
    with at.autotune():
        assert tuner.choose_one(OP, [runner], config, given)[1] == 1
    assert torch.cuda.current_device() == 0


# --- FlashInfer's operations


@pytest.mark.parametrize("mode", ["bf16", "deepseek", "mxfp4_bf16"])
def test_operations_within_a_capture(tuner, mode):
    """Refused where they would be measured; what was chosen is captured."""
    case = cl.make(mode, cl.Sizes(256, 128, 16, 4, 16), device="cuda")
    call = {"logits": cl.logits_of(case).cuda()}
    eager = cl.call(case, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with (
            fi.autotune(True, tuning_buckets=(16,)),
            pytest.raises(RuntimeError, match="active outer CUDA Graph capture"),
        ):
            cl.call(case, **call)
        output = cl.call(case, **call)
    graph.replay()
    cl.same(output, eager)
    assert measured() == 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), fi.autotune(True, tuning_buckets=(1, 16)):
        cl.call(case, **call)
    assert measured() > 0
    torch.cuda.synchronize()
    tuned = cl.call(case, **call)
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        output = cl.call(case, **call)
    again.replay()
    cl.same(output, tuned)
