# SPDX-License-Identifier: Apache-2.0
"""Ranks of a gloo group choose as one: rank 0 measures, the others take its choices."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import hopyard.compat.flashinfer.autotuner_measure as measure
import hopyard.compat.flashinfer.autotuner_profiling as profiling

WORKER = Path(__file__).parent / "autotuner_rank.py"


def run(cases, ranks, folder):
    """For each case the answers of all ranks."""
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), ",".join(cases), str(rank), str(ranks), folder / "store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        lines = [[worker.stdout.readline() for _ in cases] for worker in workers]
        for worker in workers:
            worker.communicate(timeout=100)
    finally:
        for worker in workers:
            worker.kill()
    return {case: [json.loads(its[n]) for its in lines] for n, case in enumerate(cases)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The answers of two ranks, in one process each: starting torch takes longer than a case."""
    cases = ("same", "warm", "failing", "memory", "broken", "different", "ranking", "operation")
    return run(cases, 2, tmp_path_factory.mktemp("pair"))


def test_all_ranks_choose_what_rank_0_measured(pair, tmp_path):
    for answers in (pair["same"], run(["same"], 4, tmp_path)["same"]):
        for rank, got in enumerate(answers):
            assert got == {"chosen": [1] * 3, "measured": rank == 0, "after": [1] * 3}


def test_a_rank_with_a_warm_cache_neither_waits_nor_differs(pair):
    for got in pair["warm"]:
        assert got["chosen"] == got["after"] == [1] * 3


@pytest.mark.parametrize("case", ["failing", "memory"])
def test_what_fails_on_rank_0_is_the_fallback_everywhere(case, pair):
    for got in pair[case]:
        assert got["chosen"] == [-1] * 3


def test_an_error_of_rank_0_reaches_the_others(pair):
    first, second = pair["broken"]
    assert first["error"] == "KeyboardInterrupt"
    assert second["error"] == "RuntimeError"
    assert "rank 0 chose nothing: KeyboardInterrupt" in second["message"]


def test_ranks_with_different_calls_are_told(pair):
    for got in pair["different"]:
        assert got["error"] == "RuntimeError"
        assert "1 ranks tune another call than rank 0" in got["message"]
        assert "every rank of the group must make the same calls" in got["message"]


@pytest.mark.parametrize(("case", "waiting"), [("absent", 0), ("root_absent", 1)])
def test_a_missing_rank_is_a_timeout(case, waiting, tmp_path):
    got = run([case], 2, tmp_path)[case]
    assert got[1 - waiting] == {}
    assert got[waiting]["error"] == "TimeoutError"
    assert f"rank {waiting} of 2 waited for" in got[waiting]["message"]
    assert "Raise set_autotune_process_group(group, timeout=...)" in got[waiting]["message"]


def test_orders_of_tactics_are_shared(pair):
    for rank, got in enumerate(pair["ranking"]):
        assert got == {"chosen": [1, 0], "measured": rank == 0}


def test_ranks_have_byte_identical_tables_of_operations(pair):
    first, second = pair["operation"]
    assert first["record"] == second["record"]
    assert "hopyard tuning table" in first["record"]
    assert (first["measured"], second["measured"]) == (True, False)


@pytest.mark.parametrize("module", [measure, profiling])
def test_nothing_is_exchanged_while_measuring(module):
    tree = ast.parse(inspect.getsource(module))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("distributed" in n or "group" in n or "reduce" in n for n in names if n)
