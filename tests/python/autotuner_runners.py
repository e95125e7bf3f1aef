# SPDX-License-Identifier: Apache-2.0
"""A tuner of its own for each test, and runners whose time is told by a clock that they turn."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")

import torch

from hopyard.compat.flashinfer import autotuner_measure
from hopyard.compat.flashinfer.autotuner import (
    AutoTuner,
    DynamicTensorSpec,
    TunableRunner,
    TuningConfig,
)
from hopyard.compat.flashinfer.autotuner_log import forget_warnings


class Clock:
    """Time that passes when a runner says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch):
    """The tuner reads CLOCK."""
    monkeypatch.setattr(autotuner_measure, "time", CLOCK)
    return CLOCK


@pytest.fixture
def tuner(monkeypatch):
    """A fresh tuner, as of a new process."""
    forget_warnings()
    monkeypatch.setattr(AutoTuner, "_instance", None)
    return AutoTuner.get()


def new_process(monkeypatch):
    """Another fresh tuner."""
    monkeypatch.setattr(AutoTuner, "_instance", None)
    forget_warnings()
    return AutoTuner.get()


class Runner(TunableRunner):
    """Tactics whose calls take the milliseconds in `times`; an exception there is raised."""

    def __init__(self, times=None, fallback=5.0, label="a", noise=0.0):
        self.label = label
        self.times_cache = {0: 3.0, 1: 1.0, 2: 2.0} if times is None else times
        self.fallback_cache = fallback
        self.noise_cache = noise
        self.log_cache = []
        self.seen_cache = []
        self.random_cache = random.Random(7)

    @property
    def log(self):
        """Tactics in the order of their calls."""
        return self.log_cache

    @property
    def seen(self):
        """Inputs of the calls."""
        return self.seen_cache

    def get_valid_tactics(self, inputs, profile):
        return list(self.times_cache)

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        self.log_cache.append("prepare" if do_preparation else tactic)
        self.seen_cache.append(inputs)
        if do_preparation:
            return inputs[0]
        cost = self.fallback_cache if tactic == -1 else self.times_cache[tactic]
        if isinstance(cost, BaseException):
            raise cost
        if callable(cost):
            cost = cost()
        CLOCK.now += cost * 1e-3 * (1 + self.noise_cache * self.random_cache.uniform(-1, 1))
        return inputs[0]


class Other(Runner):
    """Another class of the same."""


def identity(size):
    """A bucket of its own for every size."""
    return size


def dynamic(buckets=(4, 8, 16), mapper=None, inputs=(0,), **options):
    """A config with one dynamic dimension 0."""
    spec = DynamicTensorSpec(inputs, (0,) * len(inputs), buckets, mapper or identity)
    return TuningConfig(dynamic_tensor_specs=(spec,), **options)


def tensors(tokens=8):
    return [torch.zeros(tokens, 4)]
