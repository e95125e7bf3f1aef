# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's autotuner: buckets, profiles, keys and contexts."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import logging
import threading

import pytest

pytest.importorskip("torch")

import torch

import autotuner_runners
import hopyard.compat.flashinfer as fi
from autotuner_runners import Other, Runner, dynamic, identity, tensors
from hopyard.compat.flashinfer import autotuner as at
from hopyard.compat.flashinfer import autotuner_context as context
from hopyard.compat.flashinfer.autotuner_config import (
    cache_key,
    nearest_profile,
    overridden,
    profiles_of,
)
from hopyard.compat.flashinfer.autotuner_keys import Opaque, stable_text

OP = "test::op"
tuner, clock = autotuner_runners.tuner, autotuner_runners.clock
pytestmark = pytest.mark.usefixtures("clock")


# --- buckets


def test_hybrid_buckets():
    got = at.get_hybrid_num_tokens_buckets(8192)
    assert got[:9] == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert got[9:16] == (512, 768, 1024, 1280, 1536, 1792, 2048)
    assert got[16:] == (2560, 3072, 3584, 4096, 8192)
    assert at.get_hybrid_num_tokens_buckets(20000)[-3:] == (8192, 16384, 20000)
    assert at.get_hybrid_num_tokens_buckets(300) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    assert at.get_hybrid_num_tokens_buckets(1) == (1,)


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [
        *[(-3, 1), (0, 1), (1, 1), (3, 4), (256, 256), (257, 512), (513, 768), (2048, 2048)],
        *[(2049, 2560), (4096, 4096), (4097, 8192), (8192, 8192), (99999, 8192)],
    ],
)
def test_hybrid_mapping(tokens, bucket):
    assert at.map_to_hybrid_bucket(tokens) == bucket


@pytest.mark.parametrize("largest", [1, 7, 100, 300, 2047, 3000, 4100, 8192, 20000])
def test_hybrid_mapping_hits_a_generated_bucket_and_never_goes_down(largest):
    buckets = set(at.get_hybrid_num_tokens_buckets(largest))
    mapper = at.make_hybrid_bucket_mapper(largest)
    assert mapper is at.make_hybrid_bucket_mapper(largest)
    for tokens in range(1, largest + 1):
        assert mapper(tokens) in buckets
        assert mapper(tokens) >= tokens


def test_floor_and_ceil():
    buckets = (64, 8, 512, 8)
    floor = [at.round_to_nearest_bucket(x, buckets) for x in (1, 8, 63, 64, 511, 9999)]
    assert floor == [8, 8, 8, 64, 64, 512]
    ceil = [at.round_to_nearest_bucket(x, buckets, round_up=True) for x in (1, 9, 64, 65, 9999)]
    assert ceil == [8, 64, 64, 512, 512]
    with pytest.raises(ValueError, match="buckets is empty"):
        at.round_to_nearest_bucket(1, ())
    assert at.make_bucket_mapper((1, 2)) is at.make_bucket_mapper([2, 1, 1])
    assert at.make_bucket_mapper((1, 2)) is not at.make_bucket_mapper((1, 2), True)


def test_powers_of_two():
    assert [at.next_positive_power_of_2(x) for x in (-1, 0, 1, 3, 4, 5)] == [1, 1, 1, 4, 4, 8]
    assert [at.last_positive_power_of_2(x) for x in (-1, 0, 1, 3, 4, 5)] == [1, 1, 1, 2, 4, 4]
    assert at.get_last_power_of_2_num_tokens_buckets(100, 8) == (64, 32, 16, 8)


# --- configs and profiles


def test_classes_are_hashable_and_checked():
    spec = at.DynamicTensorSpec([0, 1], [0, 0], [1, 2], identity)
    assert hash(spec) == hash(at.DynamicTensorSpec((0, 1), (0, 0), (1, 2), identity))
    config = at.TuningConfig(dynamic_tensor_specs=[spec], tensor_initializers=[(0, identity)])
    assert len({config, dataclasses.replace(config), at.TuningConfig()}) == 2
    with pytest.raises(ValueError, match="input_idx has 2 entries and dim_idx 1"):
        at.DynamicTensorSpec((0, 1), (0,), (1,), identity)
    with pytest.raises(TypeError):
        at.TuningConfig((spec,))


def test_profiles_are_the_product_of_buckets_with_constraints():
    config = at.TuningConfig(
        dynamic_tensor_specs=(
            at.DynamicTensorSpec((0, 1), (0, 1), (16, 4), identity),
            at.DynamicTensorSpec((2,), (0,), lambda size: (size, 2 * size), identity),
        ),
        constraint_specs=(at.ConstraintSpec(3, 0, lambda shapes: shapes[0][0] + shapes[2][0]),),
    )
    inputs = [torch.zeros(9, 2), torch.zeros(3, 9), torch.zeros(5), torch.zeros(1), None, "mode"]
    profiles = profiles_of(config, inputs)
    shapes = [p.get_opt_shapes() for p in profiles]
    assert [(s[0], s[1], s[2], s[3]) for s in shapes] == [
        ((b, 2), (3, b), (t,), (b + t,)) for b, t in itertools.product((4, 16), (5, 10))
    ]
    assert shapes[0][4:] == ((0,), (0,))
    assert profiles[0].shapes[0][0] == at.DynamicDim(4, 4, 16)
    assert profiles[2].shapes[0][0] == at.DynamicDim(16, 16, float("inf"))
    assert profiles[0].shapes[0][1] == at.StaticDim(2)
    assert profiles[0].get_hash_key() == shapes[0]


@pytest.mark.parametrize(("size", "bucket"), [(1000, 512), (1024, 1024), (4000, 2048)])
def test_nearest_profile(size, bucket):
    config = at.TuningConfig(
        dynamic_tensor_specs=(
            at.DynamicTensorSpec((0, 1, 4), (0, 1, 0), (512, 1024), at.last_positive_power_of_2),
        ),
        constraint_specs=(at.ConstraintSpec(2, 1, lambda shapes: shapes[0][0] // 2),),
    )
    shapes = ((size, 8), (3, size), (10, 9, 6), (7,), (0,))
    expected = ((bucket, 8), (3, bucket), (10, -1, 6), (7,), (0,))
    assert nearest_profile(shapes, config) == expected
    assert nearest_profile(shapes, at.TuningConfig()) == shapes


def test_a_missing_linked_input_does_not_hide_the_size_of_the_others():
    config = dynamic(mapper=at.next_positive_power_of_2, inputs=(0, 1))
    assert nearest_profile(((0,), (5, 3)), config) == ((0,), (8, 3))
    profiles = profiles_of(config, [None, torch.zeros(5, 3)])
    assert [p.get_opt_shapes() for p in profiles] == [((0,), (b, 3)) for b in (4, 8, 16)]


def test_overrides_replace_buckets_and_rounding():
    own = dynamic(mapper=at.last_positive_power_of_2, use_cuda_graph=True)
    assert overridden(own, None, False) is own
    fixed = overridden(own, (10, 100), False)
    assert fixed is overridden(own, (10, 100), False)
    assert fixed.use_cuda_graph
    assert [nearest_profile(((x,),), fixed)[0][0] for x in (5, 50, 500)] == [10, 10, 100]
    up = overridden(own, (10, 100), True)
    assert [nearest_profile(((x,),), up)[0][0] for x in (5, 50, 500)] == [10, 100, 100]
    assert nearest_profile(((5,),), overridden(own, None, True)) == ((8,),)
    generated = dynamic(at.get_last_power_of_2_num_tokens_buckets, at.last_positive_power_of_2)
    assert nearest_profile(((5,),), overridden(generated, None, True)) == ((8,),)


# --- keys


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


VALUES = [None, False, True, 0, 1, -1, -2, 1.0, 0.5, "", "1", "a, b", b"1", (), (1,), (1, 2)]
VALUES += [((1,), 2), (1, (2,)), {}, {"a": 1}, {"a": 2}, {1}, {1, 2}, Colour.RED, Colour.BLUE]
VALUES += [torch.float16, torch.bfloat16, torch.device("cuda", 0), identity, int, itertools]
VALUES += [torch.zeros(2), torch.zeros(3), torch.zeros(2).half(), ("(1,)",), ("1", "2"), ("1, 2",)]


@pytest.mark.parametrize("field", ["label", "layout"])
def test_two_configurations_never_share_a_key(field):
    memory, file = set(), set()
    for value in VALUES:
        runner = Runner()
        setattr(runner, field, value)
        key = cache_key(OP, runner, ((4, 4),), at.TuningConfig())
        assert key.portable
        memory.add(key)
        file.add(key.file_key)
    assert len(memory) == len(file) == len(VALUES)


def test_key_composition(tuner):
    class Extra(Runner):
        def get_cache_key_extras(self, inputs):
            return (str(inputs[0].dtype),)

    runner = Extra(label="x")
    config = dynamic(mapper=at.next_positive_power_of_2)
    key = cache_key(OP, runner, ((5, 4),), config, tensors(5))
    assert key.custom_op == OP
    assert key.runner_class_name == "Extra"
    assert key.nearest_profile == ((8, 4),)
    assert key.extras == ("torch.float32",)
    assert key.runner_hash == hash(runner)
    parts = (OP, "Extra", ((8, 4),), ("torch.float32",), (("label", "'x'"),))
    assert key.file_key == str(parts)
    assert key == cache_key(OP, Extra(label="x"), ((7, 4),), config, tensors(7))
    others = [
        cache_key("test::other", runner, ((5, 4),), config, tensors(5)),
        cache_key(OP, Extra(label="y"), ((5, 4),), config, tensors(5)),
        cache_key(OP, runner, ((9, 4),), config, tensors(9)),
        cache_key(OP, runner, ((5, 4),), config, [torch.zeros(5, 4).half()]),
        cache_key(OP, Other(label="x"), ((5, 4),), config),
    ]
    assert len({key, *others}) == len({k.file_key for k in (key, *others)}) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.custom_op = "no"


def test_a_runner_without_fields_has_flashinfers_file_key():
    class Bare(at.TunableRunner):
        def get_valid_tactics(self, inputs, profile):
            return []

        def forward(self, inputs, tactic=-1, do_preparation=False):
            return None

    key = cache_key(OP, Bare(), ((4,),), at.TuningConfig())
    assert key.file_key == str((OP, "Bare", ((4,),), ()))
    assert hash(Bare()) == hash(Bare())


def test_an_opaque_field_keeps_a_runner_out_of_files(tuner, caplog, tmp_path):
    class Locked(Runner):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(Opaque, match="lambda or a closure"):
        stable_text(lambda: 0)
    nest = []
    nest.append(nest)
    with pytest.raises(Opaque, match="nested"):
        stable_text(nest)
    runner = Locked()
    path = tmp_path / "cache.json"
    with caplog.at_level(logging.WARNING), at.autotune(cache=path):
        for _ in range(2):
            assert tuner.choose_one(OP, [runner], at.TuningConfig(), tensors())[1] == 1
    assert tuner.choose_one(OP, [Locked()], at.TuningConfig(), tensors())[1] == -1
    assert "test::op" not in path.read_text()
    assert len([r for r in caplog.records if "Locked.lock has no text" in r.message]) == 1


# --- contexts


def test_buckets_must_not_be_empty(tuner):
    with pytest.raises(ValueError, match="tuning_buckets is empty"), at.autotune(tuning_buckets=()):
        pass
    assert not tuner.is_tuning_mode
    assert context.current() == context.Override()


def test_contexts_nest_inherit_and_restore(tuner):
    with at.autotune(tuning_buckets=[8, 1, 8], skip_ops="a"):
        assert context.current() == context.Override((1, 8), None, frozenset("a"))
        with at.autotune(round_up=True, skip_ops=["b", "c"]):
            assert context.current() == context.Override((1, 8), True, frozenset("abc"))
            with at.autotune(False, tuning_buckets=(2,), round_up=False):
                assert context.current() == context.Override((2,), False, frozenset("abc"))
                assert tuner.is_tuning_mode
        assert context.current() == context.Override((1, 8), None, frozenset("a"))
        with contextlib.suppress(KeyError), at.autotune(tuning_buckets=(5,)):
            raise KeyError
        assert context.current().buckets == (1, 8)
        assert tuner.is_tuning_mode
    assert context.current() == context.Override()
    assert not tuner.is_tuning_mode


def test_skipped_operations_are_left_alone(tuner):
    runner = Runner()
    with at.autotune(skip_ops="x"), at.autotune(skip_ops=[OP]):
        assert tuner.choose_one(OP, [runner], dynamic(), tensors()) == (runner, -1)
        assert tuner.choose_one("x", [runner], dynamic(), tensors()) == (runner, -1)
        assert runner.log == []
        assert tuner.choose_one("y", [runner], dynamic(), tensors())[1] == 1
    with at.autotune():
        assert tuner.choose_one(OP, [runner], dynamic(), tensors())[1] == 1
    with at.autotune(False, skip_ops=OP):
        assert tuner.choose_one(OP, [runner], dynamic(), tensors())[1] == -1


def test_overridden_buckets_and_rounding_are_used(tuner):
    runner = Runner()
    config = dynamic((4,), at.last_positive_power_of_2)
    with at.autotune(tuning_buckets=(10, 20), round_up=True):
        assert tuner.choose_one(OP, [runner], config, tensors(11))[1] == 1
        assert {seen[0].shape[0] for seen in runner.seen} == {10, 20}
    assert tuner.choose_one(OP, [runner], config, tensors(11))[1] == -1
    with at.autotune(False, tuning_buckets=(10, 20)):
        assert tuner.choose_one(OP, [runner], config, tensors(11))[1] == 1


def test_overrides_belong_to_a_thread_and_tuning_mode_to_the_process(tuner):
    seen = {}

    def other():
        seen["override"], seen["tuning"] = context.current(), tuner.is_tuning_mode
        with at.autotune(skip_ops="mine"):
            opened.set()
            closed.wait(10)

    opened, closed = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    with at.autotune(tuning_buckets=(1,), skip_ops="here"):
        thread.start()
        assert opened.wait(10)
    assert seen == {"override": context.Override(), "tuning": True}
    assert tuner.is_tuning_mode  # the other thread's context is open
    assert context.current() == context.Override()
    closed.set()
    thread.join()
    assert not tuner.is_tuning_mode


def test_only_the_outermost_context_says_that_tuning_begins(tuner, caplog):
    with caplog.at_level(logging.INFO), at.autotune(), at.autotune():
        pass
    said = [r.message for r in caplog.records]
    assert said == [
        "[Autotuner]: Autotuning process starts ...",
        "[Autotuner]: Autotuning process ends",
    ]


def test_is_in_profile_measurement(tuner):
    seen = []

    class Asking(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            seen.append((do_preparation, at.is_in_profile_measurement()))
            return super().forward(inputs, tactic, do_preparation)

    with at.autotune():
        tuner.choose_one(OP, [Asking()], at.TuningConfig(), tensors())
        assert not at.is_in_profile_measurement()
    assert seen[0] == (True, False)
    assert set(seen[1:]) == {(False, True)}


def test_one_tuner_for_all_threads(tuner):
    found = []
    threads = [threading.Thread(target=lambda: found.append(at.AutoTuner.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is tuner for one in found)
    runner = Runner()

    def tune():
        with at.autotune():
            tuner.choose_one(OP, [runner], dynamic(), tensors())

    threads = [threading.Thread(target=tune) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuner.stats.tuned_op_total_configs == {OP: 3}  # the others waited and found it


def test_clearing(tuner):
    with at.autotune():
        tuner.choose_one(OP, [Runner()], dynamic(), tensors())
    tuner.clear_cache()
    tuner.reset_statistics()
    assert tuner.profiling_cache == {}
    assert tuner.stats == at.AutoTunerStatistics()
    assert tuner.choose_one(OP, [Runner()], dynamic(), tensors())[1] == -1


def test_an_unknown_timer_is_reported_and_not_used(tuner, caplog, monkeypatch):
    monkeypatch.setenv("FLASHINFER_AUTOTUNE_TIMER", "globaltimer")
    with caplog.at_level(logging.WARNING), at.autotune():
        assert tuner.choose_one(OP, [Runner()], dynamic(), tensors())[1] == 1
    assert len([r for r in caplog.records if "FLASHINFER_AUTOTUNE_TIMER" in r.message]) == 1


def test_the_package_has_the_same_functions():
    assert fi.autotune is at.autotune
    assert fi.set_autotune_process_group is at.set_autotune_process_group
