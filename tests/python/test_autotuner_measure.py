# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's autotuner measures and chooses; time is a clock that the runners turn."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref

import pytest

pytest.importorskip("torch")

import torch

import autotuner_runners
from autotuner_runners import CLOCK, Other, Runner, dynamic, identity, tensors
from hopyard.compat.flashinfer import autotuner as at
from hopyard.compat.flashinfer import autotuner_profiling
from hopyard.compat.flashinfer.autotuner_config import cache_key, profiles_of
from hopyard.compat.flashinfer.autotuner_inputs import MadeTensors, make_inputs

OP = "test::op"
tuner, clock = autotuner_runners.tuner, autotuner_runners.clock
pytestmark = pytest.mark.usefixtures("clock")


# --- choices


def test_outside_tuning_the_fallback_runs_and_nothing_is_measured(tuner):
    runner = Runner()
    assert tuner.choose_one(OP, [runner], dynamic(), tensors()) == (runner, -1)
    assert runner.log == []
    assert tuner.stats.cache_misses == 1
    with at.autotune(False):
        assert not tuner.is_tuning_mode
        assert tuner.choose_one(OP, [runner], dynamic(), tensors()) == (runner, -1)


def test_tuning_chooses_the_fastest_once_per_profile(tuner):
    runner = Runner()
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic(), tensors()) == (runner, 1)
        calls = len(runner.log)
        assert runner.log[0] == "prepare"
        assert {tuple(seen[0].shape) for seen in runner.seen} == {(4, 4), (8, 4), (16, 4)}
        for tokens in (4, 8, 16):
            assert tuner.choose_one(OP, [runner], dynamic(), tensors(tokens))[1] == 1
        assert len(runner.log) == calls
    assert tuner.choose_one(OP, [Runner()], dynamic(), tensors())[1] == 1
    assert tuner.choose_one(OP, [Runner(label="b")], dynamic(), tensors())[1] == -1
    assert tuner.stats.tuned_op_total_configs == {OP: 3}
    assert tuner.stats.tuned_op_successful_configs == {OP: 3}
    assert "3 of 3 profiles tuned" in str(tuner.stats)


def test_candidates_are_measured_in_turns(tuner):
    runner = Runner({0: 3.0, 1: 3.1}, fallback=3.05)
    with at.autotune():
        tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())
    timed = [key for key, _ in itertools.groupby(runner.log[1:])]
    assert timed[3:12] == [-1, 0, 1] * 3


@pytest.mark.parametrize(("gain", "winner"), [(0.5, -1), (0.9, -1), (1.2, 0), (30, 0)])
def test_a_winner_is_faster_than_the_fallback_by_the_margin(tuner, gain, winner):
    runner = Runner({0: 5.0 * (1 - gain / 100)}, fallback=5.0)
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == winner
        calls = len(runner.log)
        tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())
        assert len(runner.log) == calls  # that the fallback won is a choice, too


def test_noise_never_makes_a_winner(tuner):
    wins = 0
    for seed in range(60):
        runner = Runner({t: 5.0 for t in range(8)}, fallback=5.0, label=seed, noise=0.08)
        runner.random_cache.seed(seed)
        with at.autotune():
            wins += tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] != -1
    # Eight equal tactics of 8 % noise: taking the smallest number would change nearly every time.
    assert wins <= 8


def test_a_slow_phase_of_the_machine_decides_nothing(tuner):
    calls = itertools.count()

    def slowing():  # the machine gets slower all the time
        return 5.0 * (1 + 0.002 * next(calls))

    runner = Runner({0: slowing, 1: slowing}, fallback=slowing)
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == -1


def test_the_first_of_equal_tactics_wins(tuner):
    runner = Runner({7: 1.0, 3: 1.0}, fallback=2.0)
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 7


def test_hopeless_tactics_are_measured_less(tuner):
    runner = Runner({0: 1.0, 1: 2.0, 2: 500.0})
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 0
    assert runner.log.count(2) == 2  # far too late: its warm-up ends at the second call
    assert runner.log.count(1) < runner.log.count(0)
    assert tuner.stats.failed_tactics == {}


def test_a_failing_tactic_is_skipped_and_counted(tuner, caplog):
    runner = Runner({0: 3.0, (1, 2): RuntimeError("illegal"), 2: 2.0})
    with caplog.at_level(logging.INFO), at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic((8,)), tensors())[1] == 2
    assert tuner.stats.failed_tactics == {"test::op::Runner": {(1, 2)}}
    assert len(tuner.stats.failed_profiling_count[OP]) == 1
    assert any("Skipped 1 unsupported tactic(s) for test::op" in r.message for r in caplog.records)
    assert "failed [(1, 2)]" in str(tuner.stats)


def test_a_tactic_that_fails_later_is_skipped_too(tuner):
    calls = itertools.count()

    def later():
        if next(calls) > 8:
            raise RuntimeError("sticky")
        return 0.5

    runner = Runner({0: later, 1: 1.0})
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 1


def test_without_a_working_tactic_the_fallback_runs(tuner):
    dead = RuntimeError("no")
    runner = Runner({0: dead, 1: dead}, fallback=dead)
    with at.autotune():
        assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == -1
    assert tuner.profiling_cache == {}
    assert tuner.stats.tuned_op_successful_configs == {}
    works = Runner({0: 4.0}, fallback=dead)
    with at.autotune():
        assert tuner.choose_one("test::b", [works], at.TuningConfig(), tensors())[1] == 0
    empty = Runner({})
    with at.autotune():
        assert tuner.choose_one("test::c", [empty], at.TuningConfig(), tensors())[1] == -1
    assert empty.log == []


def test_tactics_that_cannot_be_listed_are_none(tuner):
    class Unlisted(Runner):
        def get_valid_tactics(self, inputs, profile):
            raise RuntimeError("no kernels")

    runners = [Unlisted(), Other({4: 1.0})]
    with at.autotune():
        assert tuner.choose_one(OP, runners, at.TuningConfig(), tensors()) == (runners[1], 4)


def test_a_runner_without_preparation(tuner):
    class Plain(at.TunableRunner):
        def get_valid_tactics(self, inputs, profile):
            return [0]

        def forward(self, inputs, tactic=-1):
            CLOCK.now += 1e-3 if tactic == 0 else 2e-3

    with at.autotune():
        assert tuner.choose_one(OP, [Plain()], at.TuningConfig(), tensors())[1] == 0


def test_keyword_arguments_reach_forward(tuner):
    got = []

    class Keyed(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            got.append(kwargs)
            return super().forward(inputs, tactic, do_preparation)

    with at.autotune():
        tuner.choose_one(OP, [Keyed()], at.TuningConfig(), tensors(), scale=2)
    assert got
    assert all(kwargs == {"scale": 2} for kwargs in got)


def test_arguments_of_choose_one(tuner):
    with at.autotune():
        with pytest.raises(AssertionError, match="runners of test::op is empty"):
            tuner.choose_one(OP, [], at.TuningConfig(), tensors())
        with pytest.raises(AssertionError, match="is a str, wanted a TunableRunner"):
            tuner.choose_one(OP, ["no"], at.TuningConfig(), tensors())
    with at.autotune(skip_ops=OP), pytest.raises(ValueError, match="wanted at least one"):
        tuner.choose_one(OP, [], at.TuningConfig(), tensors())


def test_search_finds_runners_by_key_not_by_place(tuner):
    winner, other = Runner(), Other({9: 9.0})
    config = at.TuningConfig()
    tactic = (7, ((1, 2),))
    assert tuner.search_cache(OP, [winner], ((8, 4),), config) == (False, 0, -1, None)
    tuner.profiling_cache[cache_key(OP, winner, ((8, 4),), config)] = (tactic, None)
    assert tuner.search_cache(OP, [other, winner], ((8, 4),), config) == (True, 1, tactic, None)
    assert tuner.choose_one(OP, [other, winner], config, tensors()) == (winner, tactic)


def test_an_uncovered_shape_is_reported_once(tuner, caplog):
    config = dynamic((8,), identity)
    with at.autotune():
        tuner.choose_one(OP, [Runner()], config, tensors(8))
    with caplog.at_level(logging.WARNING):
        for tokens in (9, 9, 10):
            assert tuner.choose_one(OP, [Runner()], config, tensors(tokens))[1] == -1
        tuner.choose_one("test::never_tuned", [Runner()], config, tensors(9))
    told = [r.message for r in caplog.records if "has tuned choices, but none for" in r.message]
    assert len(told) == 2


# --- ranking


def test_rank_tactics(tuner):
    runner = Runner({0: 3.0, 1: 1.0, 2: 2.0, 3: RuntimeError("no"), 4: 9.0})
    config = dynamic((4, 8, 16), at.next_positive_power_of_2)
    with at.autotune():
        ranks = tuner.rank_tactics(OP, [runner], config, tensors(7), k=10)
        assert ranks == [1, 2, 0, 4]
        assert {tuple(seen[0].shape) for seen in runner.seen} == {(8, 4)}  # the nearest alone
        assert tuner.rank_tactics(OP, [runner], config, tensors(8), k=2) == [1, 2]
        assert tuner.rank_tactics(OP, [runner], config, tensors(7)) == [1]
    assert tuner.rank_tactics(OP, [runner], config, tensors(7), k=3) == [1, 2, 0]
    assert tuner.rank_tactics("test::x", [runner], config, tensors(7), k=3) == [-1]
    with pytest.raises(ValueError, match="k is 0"):
        tuner.rank_tactics(OP, [runner], config, tensors(), k=0)
    for runners in ([], [runner, runner]):
        with pytest.raises(ValueError, match="wanted one"):
            tuner.rank_tactics(OP, runners, config, tensors(), k=2)
    with at.autotune(skip_ops=OP):
        assert tuner.rank_tactics(OP, [runner], config, tensors(), k=2) == [-1]


# --- inputs


def test_none_static_and_dynamic_inputs(tuner):
    maker = at.autotuner_initializer_ones
    config = dynamic((4,), inputs=(0, 2, 3), tensor_initializers=((2, maker),))
    static = torch.full((2, 3), 7.0)
    ids = torch.zeros(9, 2, dtype=torch.int32)
    inputs = [torch.zeros(9, 4), static, ids, None, "mode", None]
    (profile,) = profiles_of(config, inputs)
    made = make_inputs(profile, inputs, MadeTensors())
    assert made[0].shape == (4, 4)
    assert made[0].abs().max() <= 5
    assert made[1] is static
    assert made[2].dtype == torch.int32
    assert (made[2] == 1).all()
    assert made[3:] == [None, "mode", None]
    runner = Runner()
    with at.autotune():
        tuner.choose_one(OP, [runner], config, inputs)
    assert all(seen[3] is None and seen[5] is None for seen in runner.seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32"])
@pytest.mark.parametrize("name", ["empty", "zeros", "ones", "randn", "rand", "rand_scaled"])
def test_initializers(name, dtype):
    maker = getattr(at, f"autotuner_initializer_{name}")
    made = maker((64, 4), getattr(torch, dtype), torch.device("cpu"))
    assert made.shape == (64, 4)
    assert made.dtype == getattr(torch, dtype)
    values = made.float()
    if name in ("zeros", "ones"):
        assert (values == (name == "ones")).all()
    if name == "rand_scaled":
        assert values.min() < -2
        assert values.max() > 2


def test_inputs_hook_and_cold_copies(tuner):
    def hook(inputs):
        inputs[0].fill_(3)
        return inputs

    config = dynamic((4,), use_cold_l2_cache=True, inputs_pre_hook=hook)
    runner = Runner()
    with at.autotune():
        tuner.choose_one(OP, [runner], config, tensors())
    assert all((seen[0] == 3).all() for seen in runner.seen)
    assert len({seen[0].data_ptr() for seen in runner.seen}) == tuner.how.repeat + 1


def test_arena():
    inputs = [torch.arange(100.0), None, torch.ones(3, dtype=torch.int32)]
    arena = at.ValueProfileArena(inputs, (0, 2), 3)
    seen = [arena.inputs(i) for i in range(6)]
    assert len({lane[0].data_ptr() for lane in seen}) == 6
    for lane in seen:
        assert torch.equal(lane[0], inputs[0])
        assert torch.equal(lane[2], inputs[2])
        assert lane[1] is None
        assert lane[2].data_ptr() % 256 == lane[0].data_ptr() % 256
    arena.fill([inputs[0] + 1, None, inputs[2]])
    assert torch.equal(arena.inputs(4)[0], inputs[0] + 1)
    assert torch.equal(inputs[0], torch.arange(100.0))


@pytest.mark.parametrize(
    ("inputs", "indices", "lanes", "error", "part"),
    [
        ([torch.ones(2)], (0,), 0, ValueError, "lanes is 0"),
        ([torch.ones(2)], (0, 0), 1, ValueError, "has a place twice"),
        ([torch.ones(4, 4).t()[:2]], (0,), 1, ValueError, "has gaps"),
        ([torch.ones(0)], (0,), 1, ValueError, "no bytes"),
        ([torch.ones(2)], (1,), 1, IndexError, "input 1 is not there"),
        ([None], (0,), 1, TypeError, "input 0 is a NoneType"),
    ],
)
def test_arena_refuses(inputs, indices, lanes, error, part):
    with pytest.raises(error, match=part):
        at.ValueProfileArena(inputs, indices, lanes)


def test_arena_refuses_other_shapes_and_inputs_outside(tuner):
    arena = at.ValueProfileArena([torch.ones(2)], (0,), 1)
    with pytest.raises(ValueError, match="the arena was made for"):
        arena.fill([torch.ones(3)])
    config = at.TuningConfig(use_cold_l2_cache=True, value_aware_input_indices=(0,))
    with pytest.raises(ValueError, match="not in profile_arena_input_indices"), at.autotune():
        tuner.choose_one(OP, [Runner()], config, tensors())


def test_made_tensors_are_few_and_forgotten_in_order(tuner):
    made = MadeTensors(2)
    first = made.get("a", lambda: torch.ones(1))
    made.get("b", lambda: torch.ones(2))
    assert made.get("a", lambda: None) is first
    made.get("c", lambda: torch.ones(3))
    assert len(made) == 2
    assert made.get("a", lambda: None) is first
    assert made.get("b", lambda: "anew") == "anew"
    with at.autotune():
        tuner.choose_one(OP, [Runner()], dynamic(tuple(range(1, 200))), tensors())
        assert len(tuner._profiler.made) == 64
    assert len(tuner._profiler.made) == 0


@pytest.mark.parametrize("place", [0, 1])
def test_meta_tensors_reach_no_runner(tuner, place):
    inputs = [torch.zeros(8, 4), torch.zeros(8, 4)]
    inputs[place] = inputs[place].to("meta")
    runner = Runner()
    with at.autotune(), pytest.raises(RuntimeError, match=f"input {place} is a meta tensor"):
        tuner.choose_one(OP, [runner], dynamic(), inputs)
    assert runner.log == []
    assert tuner.choose_one(OP, [runner], dynamic(), inputs)[1] == -1


# --- what goes wrong around measuring


def test_capture_is_refused_before_anything_is_made(tuner, monkeypatch):
    with at.autotune():
        tuner.choose_one(OP, [Runner()], dynamic((8,)), tensors())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    runner = Runner()
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic((8,)), tensors())[1] == 1  # known
        with pytest.raises(RuntimeError, match="active outer CUDA Graph capture"):
            tuner.choose_one(OP, [runner], dynamic((8, 16)), tensors())
    assert runner.log == []
    assert tuner.choose_one("test::x", [runner], dynamic(), tensors())[1] == -1


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_out_of_memory_falls_back_and_keeps_the_rest(tuner, caplog, error):
    runner = Runner()
    usual = at.autotuner_initializer_ones

    def maker(shape, dtype, device):
        if shape[0] == 16:
            raise error
        return usual(shape, dtype, device)

    config = dynamic((4, 8, 16), tensor_initializers=((0, maker),))
    with caplog.at_level(logging.WARNING), at.autotune():
        assert tuner.choose_one(OP, [runner], config, tensors(8)) == (runner, -1)
        assert any("OOM detected, falling back" in r.message for r in caplog.records)
    assert tuner.choose_one(OP, [runner], config, tensors(8))[1] == 1
    assert len(tuner.profiling_cache) == 2


def test_failures_keep_no_inputs(tuner, monkeypatch):
    """What failed holds no frame, and memory is given back when the error is gone."""
    refs, left = [], []

    class Failing(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            if tactic in (0, 1):
                refs.append(weakref.ref(inputs[0]))
                raise self.times_cache[tactic]("no")
            return inputs[0]

    def give_back(*_):
        left.extend(ref() for ref in refs)

    monkeypatch.setattr(autotuner_profiling, "recover", give_back)
    runner = Failing({0: RuntimeError, 1: torch.OutOfMemoryError})
    gc.disable()
    with at.autotune():
        tuner.choose_one(OP, [runner], dynamic((4,)), tensors())
    gc.enable()
    assert len(refs) == 2
    assert len(left) == 2
    assert all(tensor is None for tensor in left)


def test_interruption_keeps_what_was_measured(tuner, tmp_path):
    path = tmp_path / "cache.json"

    class Interrupted(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            if inputs[0].shape[0] == 16 and self.log.count(1) > self.stop_cache:
                raise KeyboardInterrupt
            return super().forward(inputs, tactic, do_preparation)

    for stop, known in ((1, [4, 8]), (10**6, [4, 8, 16])):
        runner = Interrupted(label=stop)
        runner.stop_cache = stop
        ended = pytest.raises(KeyboardInterrupt) if stop == 1 else contextlib.nullcontext()
        with ended, at.autotune(cache=path):
            tuner.choose_one(OP, [runner], dynamic(), tensors())
        got = [
            b for b in (4, 8, 16) if tuner.choose_one(OP, [runner], dynamic(), tensors(b))[1] == 1
        ]
        assert got == known
        assert not tuner.is_tuning_mode
    assert path.read_text().count('"Runner"') == 0
    assert path.read_text().count('"Interrupted"') == 5


def test_an_interrupted_race_with_enough_turns_decides(tuner):
    turns = itertools.count()

    class Stopping(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            # preparation, 3 warm-ups and 3 turns of 2 calls, twice; then somebody presses Ctrl-C
            if next(turns) > 2 * (3 + 3 * 2):
                raise KeyboardInterrupt
            return super().forward(inputs, tactic, do_preparation)

    runner = Stopping({0: 1.0})
    with pytest.raises(KeyboardInterrupt), at.autotune():
        tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())
    assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 0
