# SPDX-License-Identifier: Apache-2.0
"""hopyard tune and what it does to files; hopyard bench --tuned-vs-untuned."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import xml.etree.ElementTree as ET

import pytest

from command import HOPYARD, hopyard, refusal, result

TARGET = ("qwen3-30b-a3b", "--experts", 8)
WHOLE = ("--margin", 0.99, "--seconds", 300)  # as layers.TUNED_WHOLE
QUICK = ("--tokens", "1,3", *WHOLE, "--weights", "mxfp4")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    files = {"output": folder / "a.json", "plot": folder / "a.svg"}
    answer = result("tune", *TARGET, *QUICK, "--output", files["output"], "--plot", files["plot"])
    return answer, files


def layer_of(table):
    (layer,) = table["layers"]
    return layer


def test_every_kernel_of_this_machine_is_measured(tuned):
    answer, _ = tuned
    explained = result("explain", *TARGET, "--weights", "mxfp4", "--tokens", 3)
    runnable = {c["kernel"] for c in explained["candidates"] if "needs" not in c["reason"]}
    measured = {time["tactic"] for time in answer["times"]}
    faulty = {fault["tactic"] for fault in layer_of(answer["table"])["faults"]}
    assert measured
    assert measured <= runnable
    # A scalar kernel may be dropped early; it is never forgotten without a word.
    assert explained["candidates"][0]["kernel"] in measured | faulty
    assert all(time["us"] > 0 and time["tokens"] in (1, 3) for time in answer["times"])


def test_ranges_end_at_the_last_number_of_tokens_and_name_kernels(tuned):
    answer, _ = tuned
    ranges = layer_of(answer["table"])["ranges"]
    assert ranges[-1]["last"] >= 3
    assert all(r["tactic"].startswith("cpu_") and r["us"] > 0 for r in ranges)


def test_the_file_is_the_table(tuned):
    answer, files = tuned
    assert json.loads(files["output"].read_text()) == answer["table"]
    assert result("tune", "show", files["output"]) == answer["table"]
    text = hopyard("tune", "show", files["output"]).stdout
    assert "weights=mxfp4" in text
    assert "untuned us" in text
    assert "weights=mxfp4" not in hopyard("tune", "show", files["output"], "--layer", "?").stdout


def test_the_plot_has_a_line_for_every_tactic(tuned):
    answer, files = tuned
    root = ET.fromstring(files["plot"].read_text())
    paths = root.findall("{http://www.w3.org/2000/svg}path")
    tactics = {time["tactic"] for time in answer["times"]}
    assert len(paths) == len(tactics) + 2  # the winners and the untuned choice
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert tactics <= texts


def test_the_plot_leaves_out_an_untuned_choice_that_may_not_run(tuned, tmp_path):
    kept = layer_of(tuned[0]["table"])["ranges"][0]["untuned"]
    plot = tmp_path / "plot.svg"
    quick = ("--weights", "mxfp4", "--tokens", 1, "--seconds", 0.5)
    answer = result("tune", *TARGET, *quick, "--block", kept, "--plot", plot)
    assert {entry["untuned_us"] for entry in layer_of(answer["table"])["ranges"]} == {0}
    lines = [path.get("d") for path in ET.fromstring(plot.read_text()).iter() if path.get("d")]
    assert lines
    assert not any(word in line for line in lines for word in ("inf", "nan"))


def test_a_second_layer_joins_the_file(tuned, tmp_path):
    _, files = tuned
    both = tmp_path / "both.json"
    both.write_bytes(files["output"].read_bytes())
    hopyard("tune", *TARGET, "--weights", "bf16", "--tokens", 1, *WHOLE, "--output", both)
    assert len(json.loads(both.read_text())["layers"]) == 2
    difference = result("tune", "diff", files["output"], both)
    assert difference["same_machine"]
    assert len(difference["added"]) == 1
    assert "weights=bf16" in difference["added"][0]
    assert difference["removed"] == []

    pruned = tmp_path / "pruned.json"
    answer = result("tune", "prune", both, pruned, "--layer", "weights=bf16")
    assert len(answer["removed"]) == 1
    assert result("tune", "show", pruned) == result("tune", "show", files["output"])

    merged = tmp_path / "merged.json"
    assert result("tune", "merge", merged, pruned, both)["layers"] == 2
    assert result("tune", "show", merged) == result("tune", "show", both)


def test_diff_names_other_winners(tuned, tmp_path):
    _, files = tuned
    table = json.loads(files["output"].read_text())
    changed = layer_of(table)["ranges"][0]
    changed["tactic"] = (
        "cpu_scalar_mxfp4" if "scalar" not in changed["tactic"] else "cpu_avx2_mxfp4"
    )
    other = tmp_path / "other.json"
    other.write_text(json.dumps(table))
    difference = result("tune", "diff", files["output"], other)
    assert difference["changed"][0]["ranges"][0]["to"] == changed["tactic"]
    assert changed["tactic"] in hopyard("tune", "diff", files["output"], other).stdout


def test_what_was_not_measured_is_shown_as_such(tuned, tmp_path):
    table = json.loads(tuned[1]["output"].read_text())
    kept = layer_of(table)["ranges"][0]["untuned"]
    below = {"last": 7, "tokens": 7, "tactic": kept, "us": 0, "untuned": kept}
    below |= {"untuned_us": 0, "noise": 0}
    wins = {**below, "last": 16, "tokens": 8, "tactic": "cpu_scalar_mxfp4", "us": 10.5}
    files = {}
    for name, ranges in {"whole": [below, wins], "part": [below]}.items():
        layer_of(table)["ranges"] = ranges
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(table))
    lines = hopyard("tune", "show", files["whole"]).stdout.splitlines()
    assert [line.split() for line in lines if ".." in line] == [
        ["1..7", "-", "-", "-", "-", kept, "the", "same"],
        ["8..16", "8", "10.50", "-", "-", "cpu_scalar_mxfp4", kept],
    ]
    # Beyond its last range a table leaves the choice to the plan.
    text = hopyard("tune", "diff", files["whole"], files["part"]).stdout
    assert f"8 tokens: cpu_scalar_mxfp4 (10.5 us) -> {kept} (-)" in text
    assert result("tune", "diff", files["part"], files["whole"])["changed"] == []


def test_a_table_is_used_by_what_runs_afterwards(tuned, monkeypatch):
    _, files = tuned
    monkeypatch.setenv("HOPYARD_TUNING_FILE", str(files["output"]))
    explained = result("explain", *TARGET, "--weights", "mxfp4", "--tokens", 3)
    chosen = [c for c in explained["candidates"] if c["chosen"]]
    assert chosen
    assert any("tuned" in c["reason"] for c in chosen)


def test_recorded_experts_route_the_calls(tmp_path):
    replay = tmp_path / "run.safetensors"
    hopyard("run", *TARGET, "--weights", "mxfp4", "--tokens", 9, "--output", replay)
    answer = result("tune", *TARGET, *QUICK, "--recorded", replay)
    assert layer_of(answer["table"])["routing"] == "recorded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tune has no target; wanted a preset"),
        ((*TARGET, "--routing", "skewed"), "routings"),
        ((*TARGET, "--seconds", -1), "max_seconds"),
        ((*TARGET, "--margin", -1), "margin"),
        ((*TARGET, "--tokens", 0), "--tokens"),
        (("show", "missing.json"), "missing.json"),
        (("diff", "missing.json", "missing.json"), "missing.json"),
        ((*TARGET, *QUICK, "--plot", "/missing/plot.svg"), "--plot names /missing/plot.svg"),
        ((*TARGET, *QUICK, "--output", "/missing/table.json"), "/missing/table.json"),
    ],
)
def test_refusals(arguments, message):
    assert message in refusal("tune", *arguments)


def test_prune_says_when_nothing_matches(tuned, tmp_path):
    _, files = tuned
    message = refusal("tune", "prune", files["output"], tmp_path / "x.json", "--layer", "nothing")
    assert "has 'nothing' in its key; see: hopyard tune show" in message


def test_interrupting_keeps_what_was_measured(tmp_path):
    output = tmp_path / "table.json"
    arguments = [*map(str, TARGET), "--weights", "bf16", "--max-tokens", "4096", "--seconds", "300"]
    process = subprocess.Popen(
        [HOPYARD, "tune", *arguments, "--json", "--progress", "lines", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(re.search("[1-9][0-9]* of [0-9]+ batches", line) for line in process.stderr)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    answer = json.loads(stdout)
    assert answer["interrupted"]
    ranges = layer_of(answer["table"])["ranges"]
    assert ranges
    assert ranges[-1]["last"] < 4096
    assert json.loads(output.read_text()) == answer["table"]


def test_bench_prints_tuned_and_untuned():
    done = hopyard(
        *("bench", *TARGET, "--weights", "mxfp4", "--tokens", 2, "--seconds", 0.2),
        *("--tuned-vs-untuned", "--progress", "off"),
    )
    line = json.loads(done.stdout)
    assert line["tuned_over_untuned"] == pytest.approx(line["median_us"] / line["untuned_us"])
    for name in ("tflops", "tbps", "untuned_tflops", "untuned_tbps"):
        assert line[name] > 0
