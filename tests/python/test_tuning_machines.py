# SPDX-License-Identifier: Apache-2.0
"""`hopyard.autotune` with layers on several machines. On a CPU other numbers of threads are one."""

from __future__ import annotations

import logging

import pytest

import hopyard
import layers
import tuning_state

TUNED = {"tokens": [1, 24], **layers.TUNED_WHOLE}
FIRST, SECOND = 1, 2  # threads
fresh = tuning_state.fresh


def make(threads):
    return layers.make(num_threads=threads)


def machine(threads):
    return hopyard.TuningTable.empty(num_threads=threads).machine


def measured():
    return hopyard.tuning_stats().measured


def call(threads):
    layer, data = make(threads)
    layer(data.bits, logits=data.logits)
    return layer


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "stays in this process" in r.getMessage()]


def test_each_machine_keeps_its_table(tmp_path, caplog):
    path = tmp_path / "t.json"
    with caplog.at_level(logging.WARNING), hopyard.autotune(path, **TUNED) as session:
        call(FIRST)
        first = session.table
        made = call(SECOND)
        assert session.table != first
        runs = measured()
        for threads in (FIRST, SECOND, FIRST):  # what is known is not measured again
            assert "tuned: " in call(threads).explain().text
        assert measured() == runs
        assert session.table == first
    assert session.tables == {machine(FIRST): first, machine(SECOND): made.options["tuning"]}
    assert hopyard.TuningTable.load(path) == first
    (warning,) = warnings(caplog)
    assert str(path) in warning
    assert "units=2" in warning
    for threads in (FIRST, SECOND):
        assert "tuned: " in make(threads)[0].explain().text


def test_the_file_is_written_whoever_comes_first(tmp_path, caplog):
    path = tmp_path / "t.json"
    hopyard.TuningTable.empty(num_threads=FIRST).save(path)
    with caplog.at_level(logging.WARNING), hopyard.autotune(path, **TUNED):
        call(SECOND)
        call(FIRST)
    table = hopyard.TuningTable.load(path)
    assert table.machine == machine(FIRST)
    assert len(table) == 1
    assert len(warnings(caplog)) == 1


def test_without_a_file_nobody_is_warned(caplog):
    with caplog.at_level(logging.WARNING), hopyard.autotune(**TUNED) as session:
        call(FIRST)
        call(SECOND)
    assert len(session.tables) == 2
    assert warnings(caplog) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_refuse_a_second_machine_before_they_measure(tmp_path, rank):
    path = tmp_path / "t.json"
    with hopyard.autotune(path, **TUNED):
        call(FIRST)
    runs, before = measured(), path.read_text()
    with hopyard.autotune(path, rank=rank, world_size=2, timeout=5, **TUNED):
        call(FIRST)
        with pytest.raises(ValueError, match=r"t\.json, which holds for .*units=1.*units=2"):
            call(SECOND)
        assert "tuned: " in call(FIRST).explain().text
    assert measured() == runs
    assert path.read_text() == before


def test_a_rank_refuses_a_file_that_comes_from_another_machine(tmp_path):
    path = tmp_path / "t.json"
    with hopyard.autotune(path, rank=1, world_size=2, timeout=5, **TUNED) as session:
        with hopyard.autotune(path, **TUNED):  # rank 0, elsewhere
            call(FIRST)
        with pytest.raises(ValueError, match="a file of its own"):
            call(SECOND)
    assert list(session.tables) == [machine(FIRST)]
