# SPDX-License-Identifier: Apache-2.0
"""Tuning tables in Python: values, files, and what plans take of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import hopyard
import layers
import tuning_state
from hopyard.autotune import path_of

THREADS = 2
fresh = tuning_state.fresh


def key_fields(**changes):
    spec = layers.spec()
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_experts": spec.num_experts,
        "local_experts": spec.num_experts,
        "local": "all",
        "top_k": spec.top_k,
        "routing.score": "logit",
        "routing.weight": "softmax_selected",
        "routing.renormalise": "none",
        "routing.use_bias": False,
        "routing.num_groups": 1,
        "routing.top_groups": 1,
        "routing.scaling_factor": 1,
        "activation": "swiglu",
        "weights": "bf16",
        "activations": "bf16",
        "shared.count": 0,
        "shared.per_token_weight": False,
        "shared.weight": 1,
        "shared.weights": "bf16",
        "router_weight_on_input": False,
        "overlap_launches": False,
        "path.ids": False,
        "path.unfinalised": False,
        "path.replay": False,
        "weight_orders.gemm1": "k_major",
        "weight_orders.gemm2": "k_major",
        "weight_orders.shared_gemm1": "k_major",
        "weight_orders.shared_gemm2": "k_major",
        **changes,
    }


def range_of(last, tactic="cpu_scalar_bf16", us=10.5):
    return {
        "last": last,
        "tokens": last,
        "tactic": tactic,
        "us": us,
        "untuned": "cpu_other_bf16",
        "untuned_us": 11.25,
        "noise": 0.002,
    }


def table(us=10.5, machine=None, **changes):
    """A table for this machine with the small layer."""
    document = json.loads(hopyard.TuningTable.empty(num_threads=THREADS).to_json())
    document["machine"].update(machine or {})
    layer = {
        "key": key_fields(**changes),
        "routing": "uniform,zipf",
        "ranges": [range_of(16, us=us)],
        "faults": [{"tactic": "bad", "tokens": 8, "reason": "threw"}],
    }
    document["layers"].append(layer)
    return hopyard.TuningTable.from_json(json.dumps(document))


def explained(**options):
    answer = hopyard.explain(layers.spec(), max_tokens=16, num_threads=THREADS, **options)
    return answer.text


def made(**options):
    return layers.make(num_threads=THREADS, **options)[0]


def test_layers_are_values():
    value = table()
    assert len(value) == 1
    layer = value.layers[0]
    assert layer.key.hidden_size == layers.HIDDEN
    assert layer.key.routing == hopyard.RoutingRule()
    assert layer.key.shared == hopyard.SharedExperts()
    assert layer.key.path == hopyard.CallPath(ids=False, unfinalised=False, replay=False)
    wanted = hopyard.TunedRange(16, 16, "cpu_scalar_bf16", 10.5, "cpu_other_bf16", 11.25, 0.002)
    assert layer.ranges == (wanted,)
    assert layer.faults == (hopyard.TuningFault("bad", 8, "threw"),)
    assert layer.routing == "uniform,zipf"
    assert value.machine.units == THREADS
    assert value.machine.library == hopyard.__version__
    assert value == hopyard.TuningTable.from_json(value.to_json())
    assert value != table(us=2.0)
    assert len({value, table(), table(us=2.0)}) == 2
    with pytest.raises(AttributeError):
        layer.routing = "hot"


def test_the_fields_of_a_key_are_those_of_the_file():
    written = json.loads(table().to_json())["layers"][0]["key"]
    assert list(written) == list(key_fields())


def mn_major_layer():
    """The usual layer with gate and up in alternate columns, MN-major."""
    data = layers.arrays()
    rows = np.stack([data.gate, data.up], 2).reshape(data.gemm1.shape)
    gemm1 = hopyard.to_bf16(np.ascontiguousarray(rows.transpose(0, 2, 1)))
    weights = data.weights(
        layers.spec(),
        gemm1=hopyard.Matrix(gemm1, major="mn"),
        row_order="interleaved_gate_up",
    )
    layer = hopyard.MoeLayer(layers.spec(), weights, layers.TOKENS, num_threads=1)
    return layer, data


def test_mn_major_weights_are_a_layer_of_their_own():
    layer, data = mn_major_layer()
    orders = hopyard.WeightOrders(gemm1="mn_major_interleaved")
    assert layer.weights.orders == layer.options["weight_orders"] == orders
    usual = layers.make(num_threads=1)[0]
    assert usual.options["weight_orders"] == hopyard.WeightOrders()
    with hopyard.autotune(tokens=[1, 24], **layers.TUNED_WHOLE) as session:
        layer(data.bits, logits=data.logits)
        runs = hopyard.tuning_stats().measured
        assert runs > 0
        again = mn_major_layer()[0]
        again(data.bits, logits=data.logits)  # known by its own key
        assert hopyard.tuning_stats().measured == runs
        assert "tuned: " in again.explain().text
        usual(data.bits, logits=data.logits)
        assert hopyard.tuning_stats().measured > runs
    assert {x.key.weight_orders for x in session.table.layers} == {orders, hopyard.WeightOrders()}
    assert session.table.find(layers.spec(), weight_orders=orders).key.weight_orders == orders
    with pytest.raises(ValueError, match="gemm1 is 'k', wanted one of k_major, mn_major"):
        explained(weight_orders=hopyard.WeightOrders(gemm1="k"))


def test_merge_and_find():
    merged = table(us=1.0).merge(table(us=2.0)).merge(table(us=3.0, top_k=1))
    assert len(merged) == 2
    assert merged.find(layers.spec()).ranges[0].us == 2.0
    assert merged.find(layers.spec(top_k=1)).ranges[0].us == 3.0
    assert merged.find(layers.spec(top_k=4)) is None
    other = merged.find(layers.spec(routing=hopyard.RoutingRule.sigmoid()), given_ids=True)
    assert other.key.routing == hopyard.RoutingRule()
    with pytest.raises(ValueError, match="another machine"):
        table().merge(table(machine={"units": 64}))


def test_files(tmp_path):
    path = tmp_path / "table.json"
    table().save(path)
    table(us=3.0, top_k=1).save(str(path))
    assert hopyard.TuningTable.load(path) == table().merge(table(us=3.0, top_k=1))
    with pytest.raises(ValueError, match="holds measurements of"):
        table(machine={"device": "elsewhere"}).save(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a directory that this process may write to"):
        table().save(tmp_path / "file" / "table.json")
    with pytest.raises(ValueError, match="No such file"):
        hopyard.TuningTable.load(tmp_path / "none.json")
    (tmp_path / "later.json").write_text('{"format": "hopyard tuning table", "version": 3}')
    with pytest.raises(ValueError, match="version 3; this library knows 2"):
        hopyard.use_tuning(tmp_path / "later.json")


def test_plans_take_what_was_measured():
    assert "tuned" not in explained()
    wanted = "tuned: 10.5 us at 16 tokens, untuned cpu_other_bf16 11.2 us"
    assert wanted in explained(tuning=table())
    assert "tuned" not in explained(tuning=table(), untuned=True)
    assert "tuned" not in explained(tuning=None)
    with pytest.raises(ValueError, match="tuning"):
        explained(tuning="table.json")
    given = explained(tuning=table(), given_ids=True, unfinalised=True, records_replay=True)
    assert "measured with logits, finalised, no replay" in given
    ids = table(us=7.0, **{"path.ids": True, "path.unfinalised": True, "path.replay": True})
    given = explained(tuning=ids, given_ids=True, unfinalised=True, records_replay=True)
    assert "tuned: 7.0 us" in given
    assert "measured with" not in given


def test_tables_of_the_process(tmp_path):
    path = tmp_path / "table.json"
    table(us=5.0).save(path)
    hopyard.use_tuning(path)
    assert "tuned: 5.0 us" in explained()
    hopyard.use_tuning(table(us=6.0))
    assert "tuned: 6.0 us" in explained()
    assert "tuned: 7.0 us" in explained(tuning=table(us=7.0))
    assert "tuned: 6.0 us" in made().explain().text
    hopyard.forget_tuning()
    assert "tuned" not in explained()


def test_a_tuned_layer_computes_the_same():
    untuned, data = layers.make(num_threads=THREADS, untuned=True)
    tuned, _ = layers.make(num_threads=THREADS, tuning=table())
    assert "tuned: " in tuned.explain().text
    np.testing.assert_array_equal(
        tuned(data.bits, logits=data.logits), untuned(data.bits, logits=data.logits)
    )


def test_statistics():
    made()
    stats = hopyard.tuning_stats()
    assert (stats.hits, stats.misses, stats.stale, stats.measured) == (0, 1, 0, 0)
    assert len(stats.missed) == 1
    assert stats.missed[0].startswith("hidden_size=64 ")
    assert stats.ignored == ()
    hopyard.use_tuning(table(machine={"library": "0.0.1"}))
    made()
    made(tuning=table())
    stats = hopyard.tuning_stats()
    assert (stats.hits, stats.misses) == (1, 2)
    assert len(stats.ignored) == 1
    assert "Hopyard 0.0.1 is not used" in stats.ignored[0]
    hopyard.reset_tuning_stats()
    assert hopyard.tuning_stats() == hopyard.TuningStats(0, 0, 0, 0, (), ())


def test_token_buckets():
    assert hopyard.token_buckets(5) == [1, 2, 4, 5]
    assert hopyard.token_buckets(8192)[8:] == [
        *range(256, 2049, 256),
        *range(2560, 4097, 512),
        8192,
    ]
    with pytest.raises(ValueError, match="max_tokens=0"):
        hopyard.token_buckets(0)


def test_waiting_for_another_process(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(TimeoutError, match="the file does not exist"):
        hopyard.wait_for_tuning(path, layers.spec(), 0.0)
    text = table().to_json()
    program = (
        "import sys, time, hopyard\n"
        "time.sleep(0.2)\n"
        "hopyard.TuningTable.from_json(sys.stdin.read()).save(sys.argv[1])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, text=True
    ) as child:
        child.stdin.write(text)
        child.stdin.close()
        found = hopyard.wait_for_tuning(path, layers.spec(), 60.0)
        assert child.wait() == 0
    assert found == table().layers[0]
    with pytest.raises(TimeoutError, match="no measurements of this layer"):
        hopyard.wait_for_tuning(path, layers.spec(), 0.0, given_ids=True)


def test_waiting_leaves_other_threads_alone(tmp_path):
    ended = []

    def wait():
        with pytest.raises(TimeoutError):
            hopyard.wait_for_tuning(tmp_path / "none.json", layers.spec(), 0.5)
        ended.append(time.perf_counter())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert not ended, "this thread ran only after the other one had waited"
    thread.join()


def test_the_environment_names_a_file(tmp_path):
    table().save(tmp_path / "table.json")
    program = (
        "import hopyard, json\n"
        "text = hopyard.explain(hopyard.MoeSpec(64, 32, 8, 2), num_threads=2).text\n"
        "print(json.dumps([text, hopyard.tuning_stats().ignored]))"
    )

    def run(name):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "HOPYARD_TUNING_FILE": str(tmp_path / name)},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    text, ignored = run("table.json")
    assert "tuned: 10.5 us" in text
    assert ignored == []
    text, ignored = run("none.json")
    assert "tuned" not in text
    assert len(ignored) == 1
    assert ignored[0].startswith(f"HOPYARD_TUNING_FILE={tmp_path / 'none.json'}: ")


def test_keepers_of_plans_see_changes():
    from hopyard.tuning import generation

    seen = [generation(), generation()]
    assert seen[0] == seen[1]
    hopyard.use_tuning(table())
    seen.append(generation())
    hopyard.forget_tuning()
    seen.append(generation())
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("call", "ids"),
    [
        ({"logits": 1}, False),
        ({"logits": 1, "ids": 1}, False),  # a replay
        ({"ids": 1, "weights": 1}, True),
        ({"packed": 1}, True),
        ({"logits": 1, "ids": None, "packed": None, "replay_out": None}, False),
        ({"logits": None, "ids": 1, "weights": 1}, True),
    ],
)
def test_arguments_that_are_none_are_not_given(call, ids):
    assert path_of(call) == hopyard.CallPath(ids=ids, unfinalised=False, replay=False)
