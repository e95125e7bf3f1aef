# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's MoE operations under `autotune`: what is tuned, kept, forced and left alone."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses import FakeTensorMode

import autotuner_runners
import compat_layers as cl
import compat_reference as ref
import hopyard
import hopyard.compat.flashinfer as fi
import layers
from autotuner_runners import Runner, new_process, tensors
from compat_layers import one_torch_thread  # noqa: F401
from hopyard.compat.flashinfer import autotuner as at
from hopyard.compat.flashinfer import autotuner_moe as moe
from hopyard.compat.flashinfer import engine, tuning

tuner = autotuner_runners.tuner
SIZES = cl.Sizes(256, 128, 16, 4, 16)
MODES = ("nvfp4", "mxfp4_mxfp8", "mxfp4_bf16", "deepseek", "mxfp8", "per_tensor", "bf16", "mxint4")
FP4, FP8 = "flashinfer::trtllm_fp4_block_scale_moe", "flashinfer::trtllm_fp8_block_scale_moe"


DEVICES = pytest.mark.parametrize("device", cl.DEVICES)


@pytest.fixture(autouse=True)
def quick(tuner, request):
    """Little time for each layer, and nothing left of the test before."""
    parameters = getattr(request.node, "callspec", None)
    on_gpu = parameters is not None and parameters.params.get("device") == "cuda"
    tuner.how.max_seconds = 5.0 if on_gpu else 0.3  # the first calls load the kernels
    fi.clear_caches()
    hopyard.reset_tuning_stats()
    yield tuner
    fi.clear_caches()


def to_the_end(tuner):
    """All numbers of tokens are measured, on a busy machine too."""
    tuner.how.margin = layers.TUNED_WHOLE["margin"]
    tuner.how.max_seconds = layers.TUNED_WHOLE["max_seconds"]


def restart(monkeypatch):
    """As in a new process."""
    again = new_process(monkeypatch)
    again.how.max_seconds = 0.3
    fi.clear_caches()
    hopyard.reset_tuning_stats()
    return again


def packed_of(case):
    tokens, top_k = case.sizes.tokens, case.sizes.top_k
    place = case.arguments["hidden_states"].device
    ids = torch.arange(top_k, device=place).expand(tokens, top_k).int()
    return fi.pack_topk_ids(ids, torch.ones(tokens, top_k, device=place))


def alike(case, left, right):
    """All kernels of a CPU give the same bits; those of a GPU may sum in other orders."""
    if left.device.type == "cpu":
        cl.same(left, right)
    else:
        assert ref.worst_row(left, right) <= cl.TOLERANCE.get(case.mode, 0.05)


def keys(device="cpu"):
    """What is known, as (weights, path)."""
    table = moe._tables.of("cuda:0" if device == "cuda" else device) if moe.generation() else None
    layers = [] if table is None else table.layers
    return {
        (layer.key.weights, layer.key.path.ids, layer.key.path.unfinalised, layer.key.path.replay)
        for layer in layers
    }


def measured():
    return hopyard.tuning_stats().measured


@DEVICES
@pytest.mark.parametrize("mode", MODES)
def test_smoke(mode, device):
    """The call that tunes has one token, or 16; then the other."""
    cases = [cl.make(mode, replace(SIZES, tokens=tokens), device=device) for tokens in (1, 16)]
    for order, routed in ((cases, True), (cases[::-1], False)):
        routings = [
            {"routed": packed_of(case)} if routed else {"logits": cl.logits_of(case)}
            for case in order
        ]
        calls = list(zip(order, routings, strict=True))
        outside = [cl.call(case, **routing) for case, routing in calls]
        with fi.autotune(True, tuning_buckets=(1, 16)):
            before = measured()
            inside = [cl.call(case, **routing) for case, routing in calls[:1]]
            runs = measured()
            assert runs > before
            inside += [cl.call(case, **routing) for case, routing in calls[1:]]
            assert measured() == runs  # once
        for left, right in zip(inside, outside, strict=True):
            alike(cases[0], left, right)
        for (case, routing), right in zip(calls, outside, strict=True):
            alike(case, cl.call(case, **routing), right)
    assert {(ids, rows, replay) for _, ids, rows, replay in keys(device)} == {
        (True, False, False),
        (False, False, False),
    }


@DEVICES
def test_what_is_tuned_is_the_path_of_the_call(device):
    case = cl.make("nvfp4", SIZES, device=device)
    logits = cl.logits_of(case)
    replay = torch.empty(16, 4, dtype=torch.int16, device=device)
    with fi.autotune(True, tuning_buckets=(16,)):
        cl.call(case, logits=logits)
        cl.call(case, logits=logits, do_finalize=False)
        cl.call(case, routed=packed_of(case), do_finalize=False, routing_replay_out=replay)
    assert keys(device) == {
        ("nvfp4", False, False, False),
        ("nvfp4", False, True, False),
        ("nvfp4", True, True, True),
    }


@DEVICES
def test_outside_nothing_is_measured(quick, device):
    case = cl.make("bf16", SIZES, device=device)
    cl.call(case, logits=cl.logits_of(case))
    with fi.autotune(False):
        cl.call(case, logits=cl.logits_of(case))
    assert measured() == 0
    assert keys(device) == set()


@DEVICES
def test_one_file_for_runners_and_operations(quick, tmp_path, monkeypatch, caplog, device):
    path = tmp_path / "cache.json"
    to_the_end(quick)  # what is cut short is measured again
    case = cl.make("deepseek", SIZES, device=device)
    logits = cl.logits_of(case)
    with fi.autotune(True, cache=path, tuning_buckets=(1, 16)):
        outside = cl.call(case, logits=logits)
        quick.choose_one("test::op", [Runner()], at.TuningConfig(), tensors())
    document = json.loads(path.read_text())
    (table,) = document["_records"]["hopyard.moe"]["tables"]
    assert table["format"] == "hopyard tuning table"
    assert sum(not key.startswith("_") for key in document) == 1

    again = restart(monkeypatch)
    with caplog.at_level(logging.INFO), fi.autotune(True, cache=path, tuning_buckets=(1, 16)):
        alike(case, cl.call(case, logits=logits), outside)
        cl.call(case, logits=logits)
        runner = Runner()
        again.choose_one("test::op", [runner], at.TuningConfig(), tensors())
    assert runner.log == []
    assert measured() == 0
    stats = hopyard.tuning_stats()
    assert (stats.hits, stats.misses, stats.stale) == (1, 0, 0)
    hits = [r.message for r in caplog.records if "file hit" in r.message]
    assert hits[0] == f"[Autotuner]: file hit: {FP8}::MoERunner from the cache file"
    assert len(hits) == 2
    assert json.loads(path.read_text()) == document


def test_what_was_measured_now_is_no_file_hit(quick, tmp_path, caplog):
    path = tmp_path / "cache.json"
    with caplog.at_level(logging.INFO):
        for mode in ("bf16", "mxfp8"):
            case = cl.make(mode, SIZES)
            with fi.autotune(True, cache=path, tuning_buckets=(16,)):
                cl.call(case, logits=cl.logits_of(case))
    assert not any("file hit" in r.message for r in caplog.records)


def test_two_processes_merge_their_layers(quick, tmp_path, monkeypatch):
    path = tmp_path / "cache.json"
    cases = [cl.make(mode, SIZES) for mode in ("bf16", "mxfp8")]
    for case in cases:
        restart(monkeypatch)
        with fi.autotune(True, tuning_buckets=(16,)):
            cl.call(case, logits=cl.logits_of(case))
        at.AutoTuner.get().save_configs(path)
    (table,) = json.loads(path.read_text())["_records"]["hopyard.moe"]["tables"]
    assert [layer["key"]["weights"] for layer in table["layers"]] == ["bf16", "mxfp8"]


def problem_of(mode, case):
    """Arguments of trtllm_get_valid_moe_configs."""
    act, weights, method = {
        "nvfp4": ("E2m1", "E2m1", 0),
        "mxfp4_mxfp8": ("MxE4m3", "MxE2m1", 0),
        "mxfp4_bf16": ("Bfloat16", "MxE2m1", 0),
        "deepseek": ("E4m3", "E4m3", 1),
    }[mode]
    s = case.sizes
    return (
        *(fi.DtypeTrtllmGen[act], fi.DtypeTrtllmGen[weights], fi.Fp8QuantizationType(method)),
        *(s.top_k, s.hidden, s.inter, s.experts, int(fi.ActivationType.Swiglu)),
        *(True, fi.WeightLayout.MajorK, False, s.tokens),
    )


@DEVICES
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4_mxfp8", "mxfp4_bf16", "deepseek"])
def test_every_tactic_forced_by_a_file(quick, mode, tmp_path, monkeypatch, caplog, device):
    if device != tuning._device():
        pytest.skip("the tactics are those of the GPU")
    case = cl.make(mode, SIZES, device=device)
    packed = packed_of(case)
    path = tmp_path / "cache.json"
    with fi.autotune(True, cache=path, tuning_buckets=(16,)):
        usual = cl.call(case, routed=packed)
    document = json.loads(path.read_text())
    (table,) = document["_records"]["hopyard.moe"]["tables"]
    problem = problem_of(mode, case)
    configs = fi.trtllm_get_valid_moe_configs(*problem)
    assert len(configs) > 1
    for config in configs:
        kernel = fi.trtllm_moe_tactic_name(config, *problem)
        for entry in table["layers"][0]["ranges"]:
            entry["tactic"] = kernel
        path.write_text(json.dumps(document))
        restart(monkeypatch)
        caplog.clear()
        with caplog.at_level(logging.INFO), fi.autotune(False, cache=path):
            for _ in range(10):
                alike(case, cl.call(case, routed=packed), usual)
        assert any("file hit" in r.message and "fp" in r.message for r in caplog.records)
        stats = hopyard.tuning_stats()
        assert (stats.hits, stats.stale, stats.measured) == (1, 0, 0)
        (layer,) = engine._plans._items.values()
        chosen = [c.kernel for c in layer.explain().candidates if c.chosen]
        # A GPU's kernel is one GEMM's, and the library completes the tactic.
        assert chosen == [kernel] or (device == "cuda" and kernel in chosen)


def test_skipped_operations_are_neither_tuned_nor_tuned_before(quick, caplog):
    case = cl.make("nvfp4", SIZES)
    logits = cl.logits_of(case)
    for name in (FP4, "trtllm_fp4_block_scale_moe"):
        with fi.autotune(True, skip_ops=name, tuning_buckets=(16,)):
            cl.call(case, logits=logits)
    assert measured() == 0
    with fi.autotune(True, skip_ops=FP8, tuning_buckets=(16,)):
        cl.call(case, logits=logits)
    assert measured() > 0
    hits = hopyard.tuning_stats().hits
    fi.clear_caches()
    with fi.autotune(False, skip_ops=FP4):
        cl.call(case, logits=logits)
    assert hopyard.tuning_stats().hits == hits


def test_buckets(quick):
    operation = moe.Operation("trtllm_bf16_moe", 300)
    assert operation.tokens() == list(at.get_hybrid_num_tokens_buckets(300))
    with fi.autotune(False, tuning_buckets=(512, 1, 64)):
        assert operation.tokens() == [1, 64]
    with fi.autotune(False, tuning_buckets=(512,)):
        assert operation.tokens() == [300]
    assert moe.Operation("trtllm_bf16_moe", 0).tokens() == [1]


def test_capture_is_refused(quick, monkeypatch):
    case = cl.make("bf16", SIZES)
    logits = cl.logits_of(case)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with fi.autotune(True), pytest.raises(RuntimeError, match="active outer CUDA Graph capture"):
        cl.call(case, logits=logits)
    assert measured() == 0
    cl.call(case, logits=logits)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("mode", MODES)
def test_tensors_that_have_no_memory_are_refused_before_anything_is_measured(quick, mode, kind):
    fakes = FakeTensorMode()

    def hollow(tensor):
        return tensor.to("meta") if kind == "meta" else fakes.from_tensor(tensor)

    case = cl.make(mode, SIZES, bias="fp4" in mode)
    logits, packed = cl.logits_of(case), packed_of(case)
    given = {n: array for n, array in case.arguments.items() if isinstance(array, torch.Tensor)}
    given["output"] = torch.zeros(16, 256).bfloat16()
    given["routing_replay_out"] = torch.zeros(16, 4, dtype=torch.int16)
    assert {"hidden_states", "gemm1_weights", "gemm2_weights"} < set(given)
    refusals = RuntimeError, ValueError
    by_torch = AssertionError  # of torch, where an operation rearranges real tensors
    cl.call(case, logits=logits)  # describes the weights
    with fi.autotune(True, tuning_buckets=(16,)):
        for routing in ({"logits": logits}, {"routed": packed}):
            for name, array in given.items():
                with pytest.raises(refusals, match=f"{name} .*meta|{name} is a fake tensor"):
                    cl.call(case, **routing, **{name: hollow(array)})
            # Of real tensors, but every new one is fake.
            with (
                FakeTensorMode(),
                pytest.raises((*refusals, by_torch), match=r"[Ff]ake ?[Tt]ensor"),
            ):
                cl.call(case, **routing)
        with pytest.raises(refusals, match="topk_ids"):
            cl.call(case, routed=hollow(packed))
        assert measured() == 0
        cl.call(case, logits=logits)
        assert measured() > 0


def test_without_memory_the_usual_kernels_run(quick, monkeypatch, caplog):
    case = cl.make("bf16", SIZES)
    logits = cl.logits_of(case)
    outside = cl.call(case, logits=logits)

    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(moe, "measure_plan", full)
    with caplog.at_level(logging.WARNING), fi.autotune(True):
        cl.same(cl.call(case, logits=logits), outside)
    assert any("OOM detected, falling back" in r.message for r in caplog.records)
    assert keys() == set()


@DEVICES
def test_ctrl_c_keeps_what_was_measured(quick, monkeypatch, tmp_path, device):
    case = cl.make("bf16", SIZES, device=device)
    usual = moe.measure_plan

    def interrupted(plan, weights, options):
        calls = []

        def progress(now):
            calls.append(now)
            if now.done >= 1:
                raise KeyboardInterrupt
            return True

        return usual(plan, weights, {**options, "progress": progress, "max_seconds": 60.0})

    monkeypatch.setattr(moe, "measure_plan", interrupted)
    path = tmp_path / "cache.json"
    with pytest.raises(KeyboardInterrupt), fi.autotune(True, cache=path, tuning_buckets=(1, 2, 16)):
        cl.call(case, logits=cl.logits_of(case))
    (table,) = json.loads(path.read_text())["_records"]["hopyard.moe"]["tables"]
    assert table["layers"][0]["ranges"][0]["tokens"] == 1
    assert keys(device) == {("bf16", False, False, False)}


@pytest.mark.parametrize("same_process", [True, False])
def test_partial_measurements_are_made_again(quick, monkeypatch, tmp_path, same_process):
    case = cl.make("bf16", SIZES)
    logits = cl.logits_of(case)
    usual = moe.measure_plan
    path = tmp_path / "cache.json"

    def interrupted(plan, weights, options):
        def progress(now):
            if now.done >= 1:
                raise KeyboardInterrupt

        return usual(plan, weights, {**options, "progress": progress, "max_seconds": 60.0})

    monkeypatch.setattr(moe, "measure_plan", interrupted)
    with pytest.raises(KeyboardInterrupt), fi.autotune(True, cache=path, tuning_buckets=(1, 16)):
        cl.call(case, logits=logits)
    monkeypatch.setattr(moe, "measure_plan", usual)
    again = quick if same_process else restart(monkeypatch)
    to_the_end(again)
    with fi.autotune(True, cache=path, tuning_buckets=(1, 16)):
        cl.call(case, logits=logits)
        runs = measured()
        cl.call(case, logits=logits)
        assert measured() == runs
    (table,) = json.loads(path.read_text())["_records"]["hopyard.moe"]["tables"]
    assert table["layers"][0]["ranges"][-1]["last"] >= 16


@DEVICES
def test_tables_of_the_process_take_effect_at_the_next_call(quick, device):
    case = cl.make("bf16", SIZES, device=device)
    logits = cl.logits_of(case)

    def found():
        """Plans that the next call makes: with measurements, without."""
        hopyard.reset_tuning_stats()
        cl.call(case, logits=logits)
        stats = hopyard.tuning_stats()
        return stats.hits, stats.misses

    assert found() == (0, 1)
    (layer,) = engine._plans._items.values()
    table = hopyard.tune(layer, tokens=[1], max_seconds=0.1)
    assert found() == (0, 0)
    try:
        hopyard.use_tuning(table)
        assert found() == (1, 0)
        assert found() == (0, 0)
    finally:
        hopyard.forget_tuning()
    assert found() == (0, 1)


def test_blocked_tactics_do_not_run(quick, tmp_path):
    case = cl.make("bf16", SIZES)
    path = tmp_path / "block.json"
    path.write_text(json.dumps({"invalid_tactics": {"trtllm_bf16_moe::MoERunner": ["x", [1, 2]]}}))
    assert quick.blocklist.load(path)
    assert moe.Operation("trtllm_bf16_moe", 1).blocked() == ["x"]
    kernels = [c.kernel for c in hopyard.explain(hopyard.MoeSpec(256, 128, 16, 4)).candidates]
    slow = [kernel for kernel in kernels if "scalar" in kernel]
    blocked = {"flashinfer::trtllm_bf16_moe::MoERunner": slow}
    path.write_text(json.dumps({"invalid_tactics": blocked}))
    quick.blocklist.load(path)
    with fi.autotune(True, tuning_buckets=(16,)):
        cl.call(case, logits=cl.logits_of(case))
    (layer,) = moe._tables.of("cpu").layers
    assert [f.tactic for f in layer.faults if "block" in f.reason] == slow
    failed = quick.stats.failed_tactics["flashinfer::trtllm_bf16_moe::MoERunner"]
    assert set(slow) <= failed


def test_records_that_cannot_be_read_are_ignored(quick, tmp_path, caplog):
    path = tmp_path / "cache.json"
    record = {"tables": [{"format": "hopyard tuning table", "version": 999}]}
    path.write_text(json.dumps({"_records": {"hopyard.moe": record}}))
    case = cl.make("bf16", SIZES)
    with caplog.at_level(logging.WARNING), fi.autotune(False, cache=path):
        cl.call(case, logits=cl.logits_of(case))
    assert len([r for r in caplog.records if "MoE choices are not used" in r.message]) == 1


def test_a_table_of_the_library_is_no_cache(quick, tmp_path):
    path = tmp_path / "table.json"
    hopyard.TuningTable.empty().save(path)
    before = path.read_text()
    with (
        pytest.raises(ValueError, match=r"is a table of hopyard\.autotune"),
        fi.autotune(cache=path),
    ):
        pass
    assert path.read_text() == before


@DEVICES
def test_clearing_forgets_the_layers_too(quick, device):
    case = cl.make("bf16", SIZES, device=device)
    logits = cl.logits_of(case)
    with fi.autotune(True, tuning_buckets=(16,)):
        cl.call(case, logits=logits)
        runs = measured()
        quick.clear_cache()
        assert keys(device) == set()
        cl.call(case, logits=logits)
    assert measured() > runs


@DEVICES
def test_a_layer_may_outlive_the_caches(quick, device):
    case = cl.make("bf16", SIZES, device=device)
    logits = cl.move(cl.logits_of(case), device)
    usual = cl.call(case, logits=logits)
    (layer,) = engine._plans._items.values()
    fi.clear_caches()
    gc.collect()
    cl.same(layer(case.arguments["hidden_states"], logits=logits), usual)
    del layer  # its weights end here, and read what describes the caller's arrays
    gc.collect()
