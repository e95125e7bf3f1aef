# SPDX-License-Identifier: Apache-2.0
"""`hopyard.tune` and `hopyard.autotune`: layers, files, ranks, interruptions."""

from __future__ import annotations

import importlib
import json
import logging
import threading

import numpy as np
import pytest

import hopyard
import layers

MODULE = importlib.import_module("hopyard.autotune")  # the name is the function's
QUICK = {"tokens": [1, 24], "max_seconds": 0.3}


@pytest.fixture(autouse=True)
def fresh():
    hopyard.forget_tuning()
    hopyard.reset_tuning_stats()
    yield
    hopyard.forget_tuning()


def make(**options):
    return layers.make(num_threads=1, **options)


def routed(data):
    ids, weights = layers.softmax_route(data.logits)
    return {"ids": ids.astype(np.int32), "weights": weights.astype(np.float32)}


def measured():
    return hopyard.tuning_stats().measured


def paths(table):
    return [(k.path.ids, k.path.unfinalised, k.path.replay) for k in (x.key for x in table.layers)]


# --- tune


def test_tune_measures_one_layer():
    layer, data = make()
    before = layer(data.bits, logits=data.logits)
    seen, times = [], []
    table = hopyard.tune(
        layer,
        tokens=[1, 24],
        routings=["uniform"],
        max_seconds=30,
        progress=lambda now: seen.append(now),
        measured=lambda *time: times.append(time),
    )
    assert isinstance(table, hopyard.TuningTable)
    (tuned,) = table.layers
    assert tuned.key.num_experts == layers.EXPERTS
    assert tuned.routing == "uniform"
    assert tuned.ranges[-1].last == 24
    assert measured() >= len(times) >= 2  # `measured` hears of those that ran to the end
    assert seen[0].total == 2
    assert seen[-1].tokens in (1, 24)
    assert seen[-1].seconds >= seen[0].seconds >= 0
    assert {tokens for _, tokens, _ in times} == {1, 24}
    assert all(us > 0 for *_, us in times)
    layer.replan(tuning=table)
    np.testing.assert_array_equal(layer(data.bits, logits=data.logits), before)
    assert hopyard.tuning_stats().hits == 1
    assert "tuned:" in str(layer.explain())


def test_tune_takes_the_path_of_the_layers_options():
    layer, _ = make(given_ids=True, records_replay=True)
    assert paths(hopyard.tune(layer, **QUICK)) == [(True, False, True)]


def test_progress_ends_a_run_and_errors_come_through():
    layer, _ = make()
    table = hopyard.tune(layer, tokens=[1, 2, 24], progress=lambda now: now.done < 1)
    assert [entry.last for entry in table.layers[0].ranges] == [1]

    def broken(now):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        hopyard.tune(layer, progress=broken)


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


def test_recorded_routing():
    layer, data = make()
    ids, _ = layers.softmax_route(data.logits)
    table = hopyard.tune(layer, recorded=ids.astype(np.int16), **QUICK)
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


def test_first_calls_inside_tune(tmp_path):
    path = tmp_path / "table.json"
    layer, data = make()
    outside = layer(data.bits, logits=data.logits)
    assert measured() == 0
    with hopyard.autotune(cache=path, **QUICK) as session:
        np.testing.assert_array_equal(layer(data.bits, logits=data.logits), outside)
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
    later, _ = make()
    assert "tuned:" in str(later.explain())


def test_a_second_process_measures_nothing(tmp_path):
    path = tmp_path / "table.json"
    layer, data = make()
    with hopyard.autotune(cache=path, **QUICK):
        layer(data.bits, logits=data.logits)
    text = path.read_text()
    hopyard.forget_tuning()
    hopyard.reset_tuning_stats()
    layer, data = make()
    with hopyard.autotune(cache=path, **QUICK):
        layer(data.bits, logits=data.logits)
    assert measured() == 0
    assert hopyard.tuning_stats().hits == 1
    assert path.read_text() == text


def test_named_and_untuned_kernels_are_left_alone():
    named, data = make(tactic="cpu_scalar_bf16")
    untuned, _ = make(untuned=True)
    with hopyard.autotune(**QUICK) as session:
        named(data.bits, logits=data.logits)
        untuned(data.bits, logits=data.logits)
    assert session.table is None
    assert measured() == 0


def test_contexts_nest(tmp_path):
    layer, data = make()
    with hopyard.autotune(**QUICK) as outer:
        with hopyard.autotune(cache=tmp_path / "t.json", **QUICK) as inner:
            layer(data.bits, logits=data.logits)
        assert len(inner.table) == 1
        assert outer.table is None
    assert not hopyard.layer.before_calls


def test_errors_inside_leave_no_session(tmp_path):
    path = tmp_path / "t.json"
    layer, data = make()

    def use():
        with hopyard.autotune(cache=path, **QUICK):
            layer(data.bits, logits=data.logits)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert not hopyard.layer.before_calls
    assert len(hopyard.TuningTable.load(path)) == 1


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    path = tmp_path / "t.json"
    layer, data = make()

    def progress(now):
        if now.done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hopyard.autotune(path, [1, 2, 24], progress=progress):
        layer(data.bits, logits=data.logits)
    assert [r.last for r in hopyard.TuningTable.load(path).layers[0].ranges] == [1]
    layer(data.bits, logits=data.logits)


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
