# SPDX-License-Identifier: Apache-2.0
"""`hopyard.tune` and `hopyard.autotune`: layers, files, ranks, interruptions."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import hopyard
import layers
import tuning_state
from devices import DEVICES

MODULE = importlib.import_module("hopyard.autotune")  # the name is the function's
QUICK = {"tokens": [1, 24], "max_seconds": 0.3}
GPU_QUICK = {"tokens": [1, 24], "max_seconds": 5.0}  # the first calls load the kernels
WHOLE = {"tokens": [1, 24], **layers.TUNED_WHOLE}
fresh = tuning_state.fresh


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make(device="cpu", **options):
    """The usual layer, its arrays, and a call's: torch's on a GPU, where weights are a copy."""
    if device == "cpu":
        return layers.make(num_threads=1, **options)
    from gpu_layers import to_gpu

    data = layers.arrays()
    weights = data.weights(layers.spec()).to(device)
    layer = hopyard.MoeLayer(layers.spec(), weights, layers.TOKENS, **options)
    return layer, SimpleNamespace(bits=to_gpu(data.bits), logits=to_gpu(data.logits))


def quick(device, on_cpu=QUICK):
    return on_cpu if device == "cpu" else GPU_QUICK


def same(left, right):
    """Two outputs of one call: all instruction sets give the same bits, the kernels of a GPU may
    sum in other orders."""
    if isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right)
    else:
        assert layers.worst_row(left.float().cpu(), right.float().cpu().numpy()) < 0.012


def routed(data):
    ids, weights = hopyard.route(data.logits, layers.spec().routing, layers.TOP_K)
    return {"ids": ids, "weights": weights}


def measured():
    return hopyard.tuning_stats().measured


def paths(table):
    return [(k.path.ids, k.path.unfinalised, k.path.replay) for k in (x.key for x in table.layers)]


def lasts(table):
    (layer,) = table.layers
    return [entry.last for entry in layer.ranges]


def start(last, path):
    """A file of the usual layer that was measured up to `last` tokens."""
    layer, data = make()
    options = {**layers.TUNED_WHOLE, "progress": lambda now: now.done < 1}
    with hopyard.autotune(path, [last, 24], **options):
        layer(data.bits, logits=data.logits)
    assert lasts(hopyard.TuningTable.load(path)) == [last]
    tuning_state.forget()


@pytest.fixture
def handler():
    """Python's own of Ctrl-C, which a background job does not start with."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, usual)


def interrupting():
    """For `measured`: a thread sends Ctrl-C when the first number of tokens is done."""
    go = threading.Event()

    def send():
        if go.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    return lambda *_: go.set()


# --- tune


def test_tune_measures_one_layer(device):
    layer, data = make(device)
    before = layer(data.bits, logits=data.logits)
    seen, times = [], []
    table = hopyard.tune(
        layer,
        tokens=[1, 24],
        routings=["uniform"],
        max_seconds=30 if device == "cpu" else 5,
        progress=lambda now: seen.append(now),
        measured=lambda *time: times.append(time),
    )
    assert isinstance(table, hopyard.TuningTable)
    (tuned,) = table.layers
    assert tuned.key.num_experts == layers.EXPERTS
    assert tuned.routing == "uniform"
    assert tuned.ranges[-1].last >= 24  # twice that, where another than the untuned choice won
    assert measured() >= len(times) >= 2  # `measured` hears of those that ran to the end
    assert seen[0].total == 2
    assert {1, 24} <= {now.tokens for now in seen}  # and between and beyond them
    assert seen[-1].seconds >= seen[0].seconds >= 0
    assert {tokens for _, tokens, _ in times} >= {1, 24}
    assert all(us > 0 for *_, us in times)
    layer.replan(tuning=table)
    same(layer(data.bits, logits=data.logits), before)
    assert hopyard.tuning_stats().hits == 1
    assert "tuned:" in str(layer.explain())


def test_tune_takes_the_path_of_the_layers_options(device):
    layer, _ = make(device, given_ids=True, records_replay=True)
    assert paths(hopyard.tune(layer, **quick(device))) == [(True, False, True)]


def test_progress_ends_a_run_and_errors_come_through(device):
    layer, _ = make(device)
    table = hopyard.tune(layer, tokens=[1, 2, 24], progress=lambda now: now.done < 1)
    assert [entry.last for entry in table.layers[0].ranges] == [1]

    def broken(now):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        hopyard.tune(layer, progress=broken)


def test_a_real_ctrl_c_gives_what_was_measured(handler, device):
    layer, data = make(device)
    with pytest.raises(KeyboardInterrupt) as caught:
        hopyard.tune(layer, tokens=[1, 2, 4, 8, 16, 24], measured=interrupting())
    assert signal.getsignal(signal.SIGINT) is handler
    assert 1 <= lasts(caught.value.table)[-1] < 24
    layer(data.bits, logits=data.logits)


def test_the_second_ctrl_c_is_the_usual_one(handler):
    layer, _ = make()
    handlers = []

    def progress(now):
        handlers.append(signal.getsignal(signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt) as caught:
        hopyard.tune(layer, tokens=[1, 24], progress=progress)
    assert len(handlers) == 2
    assert handlers[0] is not handler
    assert handlers[1] is handler
    assert caught.value.table.layers[0].ranges == ()


def test_handlers_that_raise_nothing_end_a_run(handler):
    layer, _ = make()
    calls = []
    signal.signal(signal.SIGINT, lambda *call: calls.append(call))

    def progress(now):
        if now.done >= 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert lasts(hopyard.tune(layer, tokens=[1, 24], progress=progress)) == [1]
    assert [number for number, _ in calls] == [signal.SIGINT]


def test_ctrl_c_beside_an_error_is_heard(handler):
    layer, _ = make()

    def measured(*_):
        os.kill(os.getpid(), signal.SIGINT)
        raise LookupError("mine")

    with pytest.raises(KeyboardInterrupt):
        hopyard.tune(layer, measured=measured)
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_and_ignored_signals_keep_their_handler(handler):
    layer, _ = make()
    handlers, tables = [], []
    watch = {**QUICK, "progress": lambda _: handlers.append(signal.getsignal(signal.SIGINT))}
    thread = threading.Thread(target=lambda: tables.append(hopyard.tune(layer, **watch)))
    thread.start()
    thread.join()
    assert set(handlers) == {handler}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handlers.clear()
    tables.append(hopyard.tune(layer, **watch))
    assert set(handlers) == {signal.SIG_IGN}
    assert [len(table) for table in tables] == [1, 1]


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"token": [1]}, TypeError, r"unknown options \['token'\]"),
        ({"tokens": [0]}, ValueError, "tokens"),
        ({"routings": ["skewed"]}, ValueError, "skewed"),
        ({"max_seconds": -1.0}, ValueError, "max_seconds"),
        ({"margin": -1.0}, ValueError, "margin"),
        ({"recorded": np.zeros((4, 3), np.int16)}, ValueError, "recorded"),
    ],
)
def test_options_are_checked(options, error, part):
    layer, _ = make()
    with pytest.raises(error, match=part):
        hopyard.tune(layer, **options)


def test_recorded_routing(device):
    layer, _ = make(device)
    ids, _ = layers.softmax_route(layers.arrays().logits)
    table = hopyard.tune(layer, recorded=ids.astype(np.int16), **quick(device))
    assert table.layers[0].routing == "recorded"


# --- replan


def test_replan_keeps_the_workspace_or_refuses():
    layer, data = make()
    shared = layer.with_weights(layer.weights)
    layer.replan(tactic="cpu_scalar_bf16")
    assert layer.options["tactic"] == "cpu_scalar_bf16"
    assert "tactic" not in shared.options
    assert [c.kernel for c in layer.explain().candidates if c.chosen] == ["cpu_scalar_bf16"]
    left, right = (one(data.bits, logits=data.logits) for one in (layer, shared))
    np.testing.assert_array_equal(left, right)
    with pytest.raises(ValueError, match="max_tokens would change the workspace"):
        layer.replan(max_tokens=4096)
    assert layer.max_tokens == layers.TOKENS
    with pytest.raises(NotImplementedError, match="is no kernel"):
        layer.replan(tactic="magic")


# --- autotune


def test_first_calls_inside_tune(tmp_path, device):
    path = tmp_path / "table.json"
    layer, data = make(device)
    outside = layer(data.bits, logits=data.logits)
    assert measured() == 0
    with hopyard.autotune(cache=path, **quick(device)) as session:
        same(layer(data.bits, logits=data.logits), outside)
        runs = measured()
        assert runs > 0
        layer(data.bits, logits=data.logits)
        assert measured() == runs
        assert path.exists()  # after every layer, not at the end
        layer(data.bits, **routed(data))
        assert measured() > runs
        assert sorted(paths(session.table)) == [(False, False, False), (True, False, False)]
    assert hopyard.TuningTable.load(path) == session.table
    layer(data.bits, logits=data.logits)
    assert "tuned:" in str(layer.explain())
    later, _ = make(device)
    assert "tuned:" in str(later.explain())


def test_refused_calls_measure_nothing():
    layer, data = make()
    with hopyard.autotune(**QUICK) as session:
        with pytest.raises(ValueError, match="hidden"):
            layer(data.hidden, logits=data.logits)  # float32
        with pytest.raises(TypeError, match="logit"):
            layer(data.bits, logit=data.logits)
    assert measured() == 0
    assert session.table is None


def test_a_second_process_measures_nothing(tmp_path, device):
    path = tmp_path / "table.json"
    layer, data = make(device)
    with hopyard.autotune(path, **quick(device, WHOLE)):
        layer(data.bits, logits=data.logits)
    text = path.read_text()
    tuning_state.forget()
    layer, data = make(device)
    with hopyard.autotune(path, **quick(device, WHOLE)):
        layer(data.bits, logits=data.logits)
    assert measured() == 0
    assert hopyard.tuning_stats().hits == 1
    assert path.read_text() == text


def test_partial_measurements_are_made_again(tmp_path):
    path = tmp_path / "t.json"
    start(1, path)
    layer, data = make()
    with hopyard.autotune(path, [1]):
        layer(data.bits, logits=data.logits)
    assert measured() == 0  # as far as is asked for
    with hopyard.autotune(path, **layers.TUNED_WHOLE):  # as far as the layer goes
        layer(data.bits, logits=data.logits)
    assert measured() > 0
    assert lasts(hopyard.TuningTable.load(path))[-1] >= 24


def test_larger_layers_are_measured_again():
    layer, data = make()
    small = hopyard.MoeLayer(layer.spec, layer.weights, 4, num_threads=1)
    few = {"hidden": data.bits[:4], "logits": data.logits[:4]}
    with hopyard.autotune(**layers.TUNED_WHOLE) as session:
        small(**few)
        assert 4 <= lasts(session.table)[-1] < 24
        runs = measured()
        layer(data.bits, logits=data.logits)
        assert lasts(session.table)[-1] >= 24
        assert measured() > runs
        runs = measured()
        hopyard.MoeLayer(layer.spec, layer.weights, 4, num_threads=1)(**few)
        assert measured() == runs


def test_layers_that_are_alike_are_tried_once_a_session(device):
    layer, data = make(device)
    again, _ = make(device)
    with hopyard.autotune(tokens=[1, 24], progress=lambda now: now.done < 1) as session:
        layer(data.bits, logits=data.logits)
        runs = measured()
        again(data.bits, logits=data.logits)
    assert runs == measured() > 0
    assert lasts(session.table) == [1]
    assert again.options["tuning"] == session.table


def test_a_run_without_ranges_is_not_kept(tmp_path):
    path = tmp_path / "t.json"
    layer, data = make()
    usual = layer(data.bits, logits=data.logits)
    with hopyard.autotune(path, [1, 24], progress=lambda _: False) as session:
        np.testing.assert_array_equal(layer(data.bits, logits=data.logits), usual)
    assert session.table is None
    assert not path.exists()
    with hopyard.autotune(path, **WHOLE):
        layer(data.bits, logits=data.logits)
    assert lasts(hopyard.TuningTable.load(path))[-1] >= 24


def test_named_and_untuned_kernels_are_left_alone():
    named, data = make(tactic="cpu_scalar_bf16")
    untuned, _ = make(untuned=True)
    with hopyard.autotune(**QUICK) as session:
        named(data.bits, logits=data.logits)
        untuned(data.bits, logits=data.logits)
    assert session.table is None
    assert measured() == 0


def test_contexts_nest(tmp_path, device):
    layer, data = make(device)
    with hopyard.autotune(**quick(device)) as outer:
        with hopyard.autotune(cache=tmp_path / "t.json", **quick(device)) as inner:
            layer(data.bits, logits=data.logits)
        assert len(inner.table) == 1
        assert outer.table is None
    assert not hopyard.layer.before_calls


def test_errors_inside_leave_no_session(tmp_path, device):
    path = tmp_path / "t.json"
    layer, data = make(device)

    def use():
        with hopyard.autotune(cache=path, **quick(device)):
            layer(data.bits, logits=data.logits)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert not hopyard.layer.before_calls
    assert len(hopyard.TuningTable.load(path)) == 1


def test_ctrl_c_keeps_what_was_measured(tmp_path, device):
    path = tmp_path / "t.json"
    layer, data = make(device)

    def progress(now):
        if now.done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hopyard.autotune(path, [1, 2, 24], progress=progress):
        layer(data.bits, logits=data.logits)
    assert [r.last for r in hopyard.TuningTable.load(path).layers[0].ranges] == [1]
    layer(data.bits, logits=data.logits)


def test_a_real_ctrl_c_is_saved_and_measured_again(tmp_path, handler):
    path = tmp_path / "t.json"
    layer, data = make()
    tokens = [1, 2, 4, 8, 16, 24]
    with hopyard.autotune(path, tokens, measured=interrupting(), **layers.TUNED_WHOLE):
        with pytest.raises(KeyboardInterrupt):
            layer(data.bits, logits=data.logits)
        assert 1 <= lasts(hopyard.TuningTable.load(path))[-1] < 24
        layer(data.bits, logits=data.logits)
    assert lasts(hopyard.TuningTable.load(path))[-1] >= 24


def test_ctrl_c_leaves_what_reaches_further(tmp_path):
    path = tmp_path / "t.json"
    start(16, path)
    layer, data = make()

    def progress(now):
        if now.done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hopyard.autotune(path, [1, 24], progress=progress):
        layer(data.bits, logits=data.logits)
    assert measured() > 0
    assert lasts(hopyard.TuningTable.load(path)) == [1, 16]  # the new one, and what lies beyond


@pytest.mark.parametrize("refused", [False, True])
def test_files_that_cannot_be_written_warn_once(tmp_path, caplog, refused):
    path = tmp_path / "t.json" if refused else tmp_path / "missing" / "t.json"
    layer, data = make()
    usual = layer(data.bits, logits=data.logits)
    with caplog.at_level(logging.WARNING), hopyard.autotune(cache=path, **QUICK) as session:
        if refused:
            path.write_text("{}")
        np.testing.assert_array_equal(layer(data.bits, logits=data.logits), usual)
        layer(data.bits, **routed(data))
    assert len(session.table) == 2
    (warning,) = (r.getMessage() for r in caplog.records if "not saved" in r.message)
    assert "t.json" in warning  # the error's text
    assert refused == path.exists()
    assert "tuned:" in str(make()[0].explain())
    assert not refused or path.read_text() == "{}"


def test_another_thread_may_leave_during_a_call(monkeypatch):
    class Leaving(list):
        def __bool__(self):
            self.clear()
            return True

    layer, data = make()
    usual = layer(data.bits, logits=data.logits)
    monkeypatch.setattr(hopyard.layer, "before_calls", Leaving([pytest.fail]))
    np.testing.assert_array_equal(layer(data.bits, logits=data.logits), usual)


def test_files_of_other_machines_are_left_alone(tmp_path, caplog):
    path = tmp_path / "t.json"
    layer, data = make()
    with hopyard.autotune(cache=path, **QUICK):
        layer(data.bits, logits=data.logits)
    document = json.loads(path.read_text())
    document["machine"]["device"] = "another CPU"
    path.write_text(json.dumps(document))
    before = path.read_text()
    hopyard.forget_tuning()
    layer, data = make()
    with caplog.at_level(logging.WARNING), hopyard.autotune(cache=path, **QUICK) as session:
        layer(data.bits, logits=data.logits)
    assert path.read_text() == before
    assert session.table.machine != hopyard.TuningTable.load(path).machine
    assert len([r for r in caplog.records if "another CPU" in r.message]) == 1


def test_files_that_are_no_tables_are_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json"), hopyard.autotune(cache=path):
        pass
    assert path.read_text() == "{}"


# --- ranks


def test_other_ranks_wait_for_rank_0_and_never_measure(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    ranks = [layers.arrays(), layers.arrays()]
    made = []
    for rank, data in enumerate(ranks):  # expert parallel: ranks differ in where theirs begin
        spec = layers.spec(num_experts=16, local=hopyard.ExpertMap("range", 8 * rank, 8))
        made.append(hopyard.MoeLayer(spec, data.weights(spec), layers.TOKENS, num_threads=1))
    logits = np.random.default_rng(0).standard_normal((layers.TOKENS, 16)).astype(np.float32)
    waiting = threading.Event()
    usual = MODULE.wait_for_tuning

    def wait(*args, **kwargs):
        waiting.set()
        return usual(*args, **kwargs)

    monkeypatch.setattr(MODULE, "wait_for_tuning", wait)
    second = MODULE.Session(path, (1, 2), 60.0, {})
    thread = threading.Thread(target=second.prepare, args=(made[1], {"logits": logits}))
    thread.start()
    assert waiting.wait(30)
    with hopyard.autotune(cache=path, rank=0, world_size=2, **QUICK) as first:
        made[0](ranks[0].bits, logits=logits)
    runs = measured()
    thread.join(30)
    assert not thread.is_alive()
    assert second.table == first.table
    assert measured() == runs
    assert made[1].options["tuning"] == first.table


@pytest.mark.parametrize("reached", [24, 2])  # whole, or all that rank 0 measures
def test_other_ranks_wait_for_more_than_a_partial_file(tmp_path, monkeypatch, reached):
    path = tmp_path / "t.json"
    start(1, path)
    layer, data = make()
    other, _ = make()
    looks = threading.Semaphore(0)
    usual = MODULE.wait_for_tuning

    def wait(*args, **kwargs):
        found = usual(*args, **kwargs)
        looks.release()
        return found

    monkeypatch.setattr(MODULE, "wait_for_tuning", wait)
    second = MODULE.Session(path, (1, 2), 300.0, {"tokens": [1, 2, 24]})
    thread = threading.Thread(target=second.prepare, args=(other, {"logits": data.logits}))
    thread.start()
    for _ in range(2):  # it has seen the file, and looked again
        assert looks.acquire(timeout=30)
    options = {**layers.TUNED_WHOLE, "progress": lambda now: reached == 24 or now.done < 2}
    with hopyard.autotune(path, [1, 2, 24], world_size=2, **options) as first:
        layer(data.bits, logits=data.logits)
    thread.join(30)
    assert not thread.is_alive()
    assert (lasts(first.table)[-1] >= 24) == (reached == 24)
    assert second.table == first.table
    runs = measured()
    second.prepare(make()[0], {"logits": data.logits})  # one that is alike waits for nothing
    assert measured() == runs


def test_a_partial_file_is_a_timeout_without_rank_0(tmp_path):
    path = tmp_path / "t.json"
    start(1, path)
    layer, data = make()
    tuning = hopyard.autotune(path, [1, 24], rank=1, world_size=2, timeout=0.2)
    with tuning, pytest.raises(TimeoutError, match=r"t\.json has it up to 1 tokens, wanted 24"):
        layer(data.bits, logits=data.logits)


def test_a_missing_rank_0_is_a_timeout(tmp_path):
    layer, data = make()
    path = tmp_path / "t.json"
    tuning = hopyard.autotune(cache=path, rank=1, world_size=2, timeout=0.6)
    with tuning, pytest.raises(TimeoutError, match=r"rank 1 of 2 waited 0\.6 s for rank 0"):
        layer(data.bits, logits=data.logits)
    assert measured() == 0


def test_ranks_need_a_file():
    for options, part in (
        ({"world_size": 2}, "cache is None with several ranks"),
        ({"world_size": 2, "rank": 2, "cache": "x.json"}, r"rank is 2, wanted 0 \.\. 1"),
    ):
        with pytest.raises(ValueError, match=part), hopyard.autotune(**options):
            pass
