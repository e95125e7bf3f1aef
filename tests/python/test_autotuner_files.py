# SPDX-License-Identifier: Apache-2.0
"""The tuner's file and its blocklist: round trips, merging, other machines, broken files."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

import autotuner_runners
from autotuner_runners import Other, Runner, dynamic, new_process, tensors
from hopyard.compat.flashinfer import autotuner as at
from hopyard.compat.flashinfer import autotuner_file as files
from hopyard.compat.flashinfer.autotuner_config import cache_key

OP = "test::op"
tuner, clock = autotuner_runners.tuner, autotuner_runners.clock
pytestmark = pytest.mark.usefixtures("clock")
HERE = {"hopyard_version": "9", "cuda_version": "13", "gpu": "one"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of a machine that is called HERE."""
    monkeypatch.setattr(files, "collect_metadata", lambda: dict(HERE))
    return tmp_path / "folder" / "cache.json"


def tune(path, *ops, runner=None, **context):
    with at.autotune(cache=path, **context):
        for op in ops:
            at.AutoTuner.get().choose_one(op, [runner or Runner()], at.TuningConfig(), tensors())


def choice(op=OP, runner=None, **context):
    with at.autotune(False, **context):
        runner = runner or Runner()
        return at.AutoTuner.get().choose_one(op, [runner], at.TuningConfig(), tensors())[1]


def write(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def key_of(runner, op=OP):
    return cache_key(op, runner, ((8, 4),), at.TuningConfig()).file_key


def entries(path):
    return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}


# --- round trips


def test_a_second_process_measures_nothing(tuner, path, monkeypatch, caplog):
    tune(path, OP)
    document = json.loads(path.read_text())
    assert entries(path) == {key_of(Runner()): ["Runner", 1]}
    assert document["_metadata"] == HERE
    assert document["_generation"] == files.generation_of(document)
    new_process(monkeypatch)
    runner = Runner()
    with caplog.at_level(logging.INFO):
        tune(path, OP, OP, runner=runner)
    assert runner.log == []
    hits = [r.message for r in caplog.records if "file hit" in r.message]
    assert hits == ["[Autotuner]: file hit: test::op::Runner from the cache file"]
    assert choice(runner=Other()) == -1
    assert choice(runner=Runner(label="b")) == -1


def test_tuples_and_names_survive(tuner, path, monkeypatch):
    for number, tactic in enumerate([(256, (2, 1)), "kernel_a", (True, None)]):
        runner = Runner({tactic: 1.0}, label=number)
        tune(path, OP, runner=runner)
        new_process(monkeypatch)
        assert choice(runner=runner, cache=path) == tactic


def test_every_tactic_can_be_forced_by_a_file(tuner, path, caplog):
    runner = Runner()
    for tactic in (0, 1, 2):
        write(path, {"_metadata": HERE, key_of(runner): ["Runner", tactic]})
        tuner.clear_cache()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert choice(runner=runner, cache=path) == tactic
        assert any("file hit" in r.message for r in caplog.records)


def test_nothing_is_written_without_news(tuner, path):
    with at.autotune(cache=path):
        pass
    with at.autotune(False, cache=path):
        tuner.choose_one(OP, [Runner()], at.TuningConfig(), tensors())
    assert not path.exists()
    tune(path, OP)
    before = path.stat().st_mtime_ns
    tune(path, OP)
    assert path.stat().st_mtime_ns == before


def test_two_configurations_of_equal_shapes_do_not_overwrite_each_other(tuner, path, monkeypatch):
    for label, best in (("swiglu", 0), ("geglu", 1)):
        times = {0: 1.0, 1: 1.0}
        times[1 - best] = 3.0
        tune(path, OP, runner=Runner(times, label=label))
    new_process(monkeypatch)
    assert choice(runner=Runner(label="swiglu"), cache=path) == 0
    assert choice(runner=Runner(label="geglu"), cache=path) == 1


# --- merging


def test_saves_merge_and_own_choices_win(tuner, path, monkeypatch):
    tune(path, "op::a", "op::b")
    new_process(monkeypatch)
    other = Runner({0: 1.0, 1: 9.0})
    with at.autotune():  # without the file: measured anew
        at.AutoTuner.get().choose_one("op::b", [other], at.TuningConfig(), tensors())
        at.AutoTuner.get().choose_one("op::c", [other], at.TuningConfig(), tensors())
    assert at.AutoTuner.get().save_configs(path)
    found = {key.split("'")[1]: value[1] for key, value in entries(path).items()}
    assert found == {"op::a": 1, "op::b": 0, "op::c": 0}


def test_loaded_choices_are_kept_in_another_file(tuner, path, monkeypatch):
    tune(path, "op::a")
    new_process(monkeypatch).load_configs(path)
    second = path.with_name("second.json")
    at.AutoTuner.get().save_configs(second)
    assert entries(second) == entries(path)


def test_original_metadata_is_kept(tuner, path):
    write(path, {"_metadata": {**HERE, "gpu": "*", "note": "mine"}})
    tune(path, OP)
    assert json.loads(path.read_text())["_metadata"] == {**HERE, "gpu": "*", "note": "mine"}


def test_a_context_forgets_the_file_before(tuner, path, monkeypatch):
    tune(path, OP)
    new_process(monkeypatch)
    assert choice(cache=path) == 1
    assert choice() == 1  # the file stays in use after the context
    assert choice(cache=path.with_name("none.json")) == -1


def test_own_then_file_then_bundled_then_fallback(tuner, path, monkeypatch):
    runner = Runner()
    bundled = path.with_name("bundled.json")
    write(bundled, {key_of(runner): ["Runner", 2]})
    write(path, {key_of(runner): ["Runner", 0]})
    assert choice() == -1
    monkeypatch.setenv("FLASHINFER_AUTOTUNER_LOAD_FROM_FILE", str(bundled))
    assert choice() == 2
    assert choice(cache=path) == 0
    with at.autotune():  # a file's choice is known: nothing is measured
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 0
    assert runner.log == []
    tuner.clear_cache()
    with at.autotune():  # the bundled one is not asked while tuning
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 1
    tuner.load_configs(path)
    assert choice() == 1


def test_a_missing_bundled_file_is_a_warning(tuner, path, monkeypatch, caplog):
    monkeypatch.setenv("FLASHINFER_AUTOTUNER_LOAD_FROM_FILE", "1")
    with caplog.at_level(logging.WARNING):
        assert choice() == choice() == -1
    assert len([r for r in caplog.records if "LOAD_FROM_FILE=1 is not used" in r.message]) == 1


def test_a_file_names_the_class_of_the_runner(tuner, path):
    write(path, {key_of(Runner()): ["Other", 1]})
    assert choice(cache=path) == -1


# --- other machines


@pytest.mark.parametrize(
    ("changes", "hard", "soft"),
    [
        ({}, [], []),
        ({"gpu": "*"}, [], []),
        ({"gpu": "two"}, ["gpu"], []),
        ({"gpu": None}, [], ["gpu"]),
        ({"gpu": "unknown", "cuda_version": "None"}, [], ["gpu", "cuda_version"]),
        ({"gpu": "unknown", "cuda_version": "14"}, ["cuda_version"], ["gpu"]),
        ({"hopyard_version": "10"}, ["hopyard_version"], []),
    ],
)
def test_metadata_mismatches(changes, hard, soft):
    got = files.mismatches({**HERE, **changes}, HERE)
    assert (sorted(got[0]), sorted(got[1])) == (sorted(hard), sorted(soft))
    missing = {k: v for k, v in HERE.items() if k != "gpu"}
    assert list(files.mismatches(missing, HERE)[1]) == ["gpu"]


@pytest.mark.parametrize(("saved", "severity"), [("two", "hard"), ("unknown", "soft")])
def test_files_of_other_machines(tuner, path, caplog, saved, severity):
    write(path, {"_metadata": {**HERE, "gpu": saved}, key_of(Runner()): ["Runner", 2]})
    before = path.read_text()
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert tuner.load_configs(path) is False
        assert choice() == -1
        tune(path, OP)
    told = [r for r in caplog.records if f"{severity} metadata mismatch" in r.message]
    assert [r.levelno for r in told] == [logging.WARNING] + [logging.DEBUG] * (len(told) - 1)
    if severity == "hard":
        assert path.read_text() == before
        assert tuner.store.dirty
        assert any("the file is not written" in r.message for r in told)
    else:
        assert json.loads(path.read_text())["_metadata"] == HERE
        assert entries(path) == {key_of(Runner()): ["Runner", 1]}


def test_wildcards_and_missing_metadata_are_silent(tuner, path, caplog):
    with caplog.at_level(logging.DEBUG):
        for metadata in (dict.fromkeys(HERE, "*"), None):
            document = {} if metadata is None else {"_metadata": metadata}
            write(path, {**document, key_of(Runner()): ["Runner", 2]})
            assert tuner.load_configs(path) is True
    assert [r for r in caplog.records if "mismatch" in r.message] == []


def test_metadata_of_this_machine():
    got = files.collect_metadata()
    assert sorted(got) == ["cuda_version", "gpu", "hopyard_version"]
    assert got["gpu"] not in (None, "unknown")
    code = (
        "import json, sys\n"
        "import hopyard.compat.flashinfer.autotuner_file as f\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(f.collect_metadata()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(other.stdout) == got  # whether torch was imported changes nothing


# --- broken files


def test_errors_of_loading(tuner, path):
    with pytest.raises(FileNotFoundError):
        tuner.load_configs(path)
    path.parent.mkdir()
    for text in ("", "{", '{"a": ', "\x00\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(json.JSONDecodeError, match="is no tuning file"):
            tuner.load_configs(path)
        with pytest.raises(json.JSONDecodeError), at.autotune(cache=path):
            pass
        assert path.read_text(encoding="latin-1") == text
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, wanted a JSON object"):
        tuner.load_configs(path)
    assert not tuner.is_tuning_mode


def test_malformed_entries_are_skipped(tuner, path, caplog):
    good = key_of(Runner())
    bad = {"a": 1, "b": ["Runner"], "c": [1, 2], "d": {"x": 1}, "e": None}
    write(path, {**bad, good: ["Runner", [4, [5]]], "_records": [1]})
    with caplog.at_level(logging.WARNING):
        assert tuner.load_configs(path)
    assert tuner.store.file.configs == {good: ("Runner", (4, (5,)))}
    assert len([r for r in caplog.records if "is no [runner, tactic]" in r.message]) == 5


def test_plans_by_their_place_are_skipped(tuner, path, caplog):
    write(path, {"a": ["CudnnRunner", 3], "b": ["CudnnRunner", -1], "c": ["CudnnRunner", [3]]})
    with caplog.at_level(logging.WARNING):
        tuner.load_configs(path)
    assert sorted(tuner.store.file.configs) == ["b", "c"]
    assert any("by its place" in r.message for r in caplog.records)


def test_a_failed_write_leaves_the_old_file(tuner, path, monkeypatch):
    tune(path, "op::a")
    before = path.read_text()

    def broken(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(files.Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        tune(path, "op::b")
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name or p.suffix == ""] == []
    monkeypatch.undo()


def test_an_error_inside_the_context_still_saves(tuner, path):
    def use():
        with at.autotune(cache=path):
            tuner.choose_one(OP, [Runner()], at.TuningConfig(), tensors())
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert len(entries(path)) == 1


# --- concurrent writers


def write_many(path, worker, count):
    for number in range(count):
        own = {f"('op::{worker}', {number})": ("Runner", number)}
        files.save(path, files.Changes(own, {}, {}, {}, None))


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "cache.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(path, w, 15)) for w in range(4)]
    for worker in workers:
        worker.start()
    reads = 0
    while any(worker.is_alive() for worker in workers):
        if path.exists():
            document = json.loads(path.read_text())  # whole at every moment
            assert document["_generation"] == files.generation_of(document)
            reads += 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(entries(path)) == 60
    assert reads > 0


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "cache.json"
    files.save(path, files.Changes({"first": ("Runner", 1)}, {}, {}, {}, None))
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import hopyard.compat.flashinfer.autotuner_file as f\n"
        "f.Path.replace = lambda *_: os._exit(9)\n"
        "f.save(Path(sys.argv[1]), f.Changes({'second': ('R', 2)}, {}, {}, {}, None))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == 9
    assert entries(path) == {"first": ["Runner", 1]}
    files.save(path, files.Changes({"third": ("Runner", 3)}, {}, {}, {}, None))  # no lock is left
    assert sorted(entries(path)) == ["first", "third"]


def test_files_have_usual_permissions(tmp_path):
    path = tmp_path / "cache.json"
    before = os.umask(0o022)
    try:
        files.save(path, files.Changes({}, {}, {}, {}, None))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


# --- records


def test_records(tuner, path, monkeypatch):
    tuner.publish_namespaced_records("product", {"a": [1, (2,)]})
    assert tuner.get_namespaced_records("product") == {"a": [1, [2]]}
    assert tuner.get_namespaced_records("other") == {}
    tune(path)
    assert json.loads(path.read_text())["_records"] == {"product": {"a": [1, [2]]}}
    again = new_process(monkeypatch)
    again.load_configs(path)
    got = again.get_namespaced_records("product")
    assert got == {"a": [1, [2]]}
    got["a"] = "changed"
    assert again.get_namespaced_records("product") == {"a": [1, [2]]}
    tune(path, OP)  # choices alone leave records as they are
    assert json.loads(path.read_text())["_records"] == {"product": {"a": [1, [2]]}}


@pytest.mark.parametrize("name", ["", "_records"])
def test_names_of_records(tuner, name):
    for call in (
        lambda: tuner.publish_namespaced_records(name, {}),
        lambda: tuner.get_namespaced_records(name),
    ):
        with pytest.raises(ValueError, match="namespace is"):
            call()


def test_kinds_of_records(tuner):
    for records in ([], "text", None):
        with pytest.raises(TypeError, match="wanted a dict"):
            tuner.publish_namespaced_records("product", records)
    with pytest.raises(TypeError):
        tuner.publish_namespaced_records("product", {"a": object()})


def test_records_have_one_writer(tuner, path, monkeypatch):
    tune(path, OP)
    first = new_process(monkeypatch)
    first.load_configs(path)
    first.publish_namespaced_records("product", {"by": "first"})
    second = new_process(monkeypatch)
    second.load_configs(path)
    second.publish_namespaced_records("product", {"by": "second"})
    second.save_configs(path)
    second.publish_namespaced_records("product", {"by": "second, again"})
    second.save_configs(path)
    with pytest.raises(RuntimeError, match="has been changed since it was loaded"):
        first.save_configs(path)
    assert json.loads(path.read_text())["_records"] == {"product": {"by": "second, again"}}
    first.load_configs(path)
    first.publish_namespaced_records("product", {"by": "first"})
    first.save_configs(path)
    assert json.loads(path.read_text())["_records"] == {"product": {"by": "first"}}


# --- blocklist


def blocklist(path, tactics, **metadata):
    write(path, {"_metadata": metadata, "invalid_tactics": tactics})
    return path


def test_blocked_tactics_are_never_measured(tuner, path):
    runner = Runner({0: 3.0, (1, (2,)): 1.0, 2: 2.0})
    assert tuner.blocklist.load(blocklist(path, {"test::op::Runner": [[1, [2]], 7]}))
    assert tuner.blocklist.is_loaded
    assert tuner.blocklist.summary() == {"test::op::Runner": 2}
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic((8,)), tensors())[1] == 2
        assert (1, (2,)) not in runner.log
        other = tuner.choose_one("test::b", [runner], dynamic((8,)), tensors())[1]
        assert other == (1, (2,))
    tuner.blocklist.load(blocklist(path, {"test::b::Runner": [[1, [2]]]}))
    assert len(tuner.blocklist.summary()) == 2
    assert tuner.choose_one("test::b", [runner], dynamic((8,)), tensors())[1] == other  # known


def test_all_tactics_blocked_is_the_fallback(tuner, path):
    runner = Runner()
    tuner.blocklist.load(blocklist(path, {"test::op::Runner": [0, 1, 2]}, gpu="*"))
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic((8,)), tensors())[1] == -1
    assert runner.log == []


def test_blocklists_of_other_machines_and_broken_ones(tuner, path, caplog):
    with caplog.at_level(logging.WARNING):
        assert not tuner.blocklist.load(blocklist(path, {"a::B": [1]}, gpu="two"))
        assert not tuner.blocklist.load(blocklist(path, {"a::B": [1]}, hopyard_version="8"))
        write(path, {"invalid_tactics": [1]})
        assert not tuner.blocklist.load(path)
        assert not tuner.blocklist.is_loaded
        assert tuner.blocklist.load(blocklist(path, {"a::B": 1, "c::D": [{"x": 1}, 2]}, gpu="one"))
    assert tuner.blocklist.summary() == {"c::D": 1}
    told = [r.message for r in caplog.records]
    parts = ["holds for gpu='two'", "holds for hopyard_version='8'", "malformed"]
    parts += ["a::B is no list", "names no tactic"]
    for part, message in zip(parts, told, strict=True):
        assert part in message
    with pytest.raises(FileNotFoundError):
        tuner.blocklist.load(path.with_name("none.json"))
    path.write_text("no json")
    with pytest.raises(json.JSONDecodeError):
        tuner.blocklist.load(path)


@pytest.mark.parametrize(
    "text", [None, "no json", "[]", '{"invalid_tactics": {"test::op::Runner": [1]}}']
)
def test_the_environments_blocklist(path, monkeypatch, caplog, text):
    path.parent.mkdir()
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("FLASHINFER_TACTICS_BLOCKLIST", str(path))
    with caplog.at_level(logging.WARNING):
        tuner = new_process(monkeypatch)
    good = text is not None and "invalid" in text
    assert tuner.blocklist.is_loaded is good
    assert (len(caplog.records) == 0) is good


def test_saved_blocklists(tuner, path):
    runner = Runner({0: 3.0, (1, 2): RuntimeError("no")})
    with at.autotune():
        tuner.choose_one(OP, [runner], dynamic((8,)), tensors())
    at.TacticsBlocklist.save(path, tuner.stats.failed_tactics)
    document = json.loads(path.read_text())
    assert document["invalid_tactics"] == {"test::op::Runner": [[1, 2]]}
    assert document["_metadata"]["gpu"] == "one"
    assert document["_metadata"]["generator_version"] == "1.0"
    assert "T" in document["_metadata"]["generated_at"]
    again = at.TacticsBlocklist()
    assert again.load(path)
    assert again.filter(OP, runner, [0, [1, 2], (1, 2)]) == [0]
