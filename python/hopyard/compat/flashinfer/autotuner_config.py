# SPDX-License-Identifier: Apache-2.0
"""What a user of the tuner describes: runners, dynamic dimensions, how to measure."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hopyard.arrays import is_torch
from hopyard.compat.flashinfer.autotuner_buckets import make_bucket_mapper, make_generated_mapper
from hopyard.compat.flashinfer.autotuner_keys import ProfilingCacheKey, runner_key

Shape = tuple[int, ...]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)


@dataclass(frozen=True)
class DynamicTensorSpec:
    """A size that changes between calls, and every dimension that has it.

    Attributes:
        input_idx: places of the inputs.
        dim_idx: their dimensions, as many.
        gen_tuning_buckets: sizes to measure at, or a function of the size of a call.
        map_to_tuning_buckets: the bucket that stands for a size.
    """

    input_idx: tuple[int, ...]
    dim_idx: tuple[int, ...]
    gen_tuning_buckets: tuple[int, ...] | Callable[[int], Iterable[int]]
    map_to_tuning_buckets: Callable[[int], int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_idx", _as_tuple(self.input_idx))
        object.__setattr__(self, "dim_idx", _as_tuple(self.dim_idx))
        if not callable(self.gen_tuning_buckets):
            object.__setattr__(self, "gen_tuning_buckets", tuple(self.gen_tuning_buckets))
        if len(self.input_idx) != len(self.dim_idx) or not self.input_idx:
            raise ValueError(
                f"input_idx has {len(self.input_idx)} entries and dim_idx {len(self.dim_idx)}, "
                "wanted as many, at least one"
            )

    def buckets(self, size: int) -> tuple[int, ...]:
        """Sizes to measure at, ascending."""
        given = self.gen_tuning_buckets
        return tuple(sorted(set(given(size) if callable(given) else given)))


@dataclass(frozen=True)
class ConstraintSpec:
    """A dimension whose size follows from the others.

    Attributes:
        input_idx: place of the input.
        dim_idx: its dimension.
        infer_shape: its size, of the shapes of all inputs.
    """

    input_idx: int
    dim_idx: int
    infer_shape: Callable[[Sequence[Shape]], int]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How an operation is measured; hashable.

    Attributes:
        dynamic_tensor_specs: dimensions that change between calls.
        constraint_specs: dimensions that follow from others.
        tensor_initializers: (place of an input, function of shape, dtype and device) for inputs
            that are made anew; `autotuner_initializer_rand_scaled` makes the others.
        use_cold_l2_cache: each call reads other memory than the one before.
        use_cuda_graph: calls are replayed from a graph.
        value_aware_input_indices: inputs in the arena whose values decide how long a call takes.
        profile_arena_input_indices: inputs that a cold measurement copies; all without.
        inputs_pre_hook: changes the made inputs once before they are measured.
    """

    dynamic_tensor_specs: tuple[DynamicTensorSpec, ...] = ()
    constraint_specs: tuple[ConstraintSpec, ...] = ()
    tensor_initializers: tuple[tuple[int, Callable[..., Any]], ...] = ()
    use_cold_l2_cache: bool = False
    use_cuda_graph: bool = False
    value_aware_input_indices: tuple[int, ...] = ()
    profile_arena_input_indices: tuple[int, ...] = ()
    inputs_pre_hook: Callable[[list[Any]], list[Any]] | None = None

    def __post_init__(self) -> None:
        for name in (
            "dynamic_tensor_specs",
            "constraint_specs",
            "value_aware_input_indices",
            "profile_arena_input_indices",
        ):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        pairs = tuple((int(index), make) for index, make in self.tensor_initializers)
        object.__setattr__(self, "tensor_initializers", pairs)


@dataclass(frozen=True)
class StaticDim:
    """A dimension that every call shares."""

    val: int

    @property
    def opt(self) -> int:
        """The size to measure at."""
        return self.val


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that changes: sizes min .. max - 1, measured at `opt`."""

    min: int
    opt: int
    max: float


Dim = StaticDim | DynamicDim


@dataclass
class OptimizationProfile:
    """One combination of sizes to measure at.

    Attributes:
        shapes: dimensions of each input; (0,) for what is no tensor.
        tensor_initializers: by place of the input; None makes `rand_scaled`.
    """

    shapes: list[list[Dim]]
    tensor_initializers: list[Callable[..., Any] | None] = field(default_factory=list)

    def get_opt_shapes(self) -> tuple[Shape, ...]:
        """Shapes to measure at."""
        return tuple(tuple(dim.opt for dim in dims) for dims in self.shapes)

    def get_hash_key(self) -> tuple[Shape, ...]:
        """The same: what tells profiles of an operation apart."""
        return self.get_opt_shapes()


class TunableRunner(ABC):
    """Something that can be run in several ways, its tactics; -1 is one that always works."""

    @abstractmethod
    def get_valid_tactics(self, inputs: list[Any], profile: OptimizationProfile) -> list[Any]:
        """The tactics that can run these inputs."""

    @abstractmethod
    def forward(
        self, inputs: list[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        """Run a tactic; with `do_preparation` what is needed once before any is measured."""

    def get_cache_key_extras(self, inputs: list[Any]) -> tuple[Any, ...]:
        """What else of the inputs decides which tactic is fast; equal for real and made inputs."""
        return ()

    def __call__(self, inputs: list[Any], **kwargs: Any) -> Any:
        """Call `forward`."""
        return self.forward(inputs, **kwargs)

    def __hash__(self) -> int:
        return hash(runner_key(self).fields)


def shapes_of(inputs: Iterable[Any]) -> tuple[Shape, ...]:
    """Shapes of the inputs; (0,) for what is no tensor."""
    return tuple(tuple(x.shape) if is_torch(x) else (0,) for x in inputs)


def _present(spec: DynamicTensorSpec, shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """(input, dimension) of a spec where the input is there: linked ones may be None."""
    linked = zip(spec.input_idx, spec.dim_idx, strict=True)
    return [(index, dim) for index, dim in linked if shapes[index] != (0,)]


def _bucket_dims(spec: DynamicTensorSpec, size: int) -> list[DynamicDim]:
    buckets = spec.buckets(size)
    ends = [*buckets[1:], math.inf]
    return [DynamicDim(b, b, end) for b, end in zip(buckets, ends, strict=True)]


def profiles_of(config: TuningConfig, inputs: Sequence[Any]) -> list[OptimizationProfile]:
    """Every combination of the buckets of the dynamic dimensions."""
    shapes = shapes_of(inputs)
    makers: list[Callable[..., Any] | None] = [None] * len(shapes)
    for index, maker in config.tensor_initializers:
        makers[index] = maker
    linked, axes = [], []
    for spec in config.dynamic_tensor_specs:
        places = _present(spec, shapes)
        if places:
            index, dim = places[0]
            linked.append(places)
            axes.append(_bucket_dims(spec, shapes[index][dim]))
    result = []
    for sizes in itertools.product(*axes):
        dims: list[list[Dim]] = [[StaticDim(size) for size in shape] for shape in shapes]
        for places, bucket in zip(linked, sizes, strict=True):
            for index, dim in places:
                dims[index][dim] = bucket
        profile = OptimizationProfile(dims, makers)
        for constraint in config.constraint_specs:
            size = int(constraint.infer_shape(profile.get_opt_shapes()))
            dims[constraint.input_idx][constraint.dim_idx] = DynamicDim(size, size, size + 1)
        result.append(profile)
    return result


def nearest_profile(shapes: Sequence[Sequence[int]], config: TuningConfig) -> tuple[Shape, ...]:
    """Shapes with every dynamic dimension as its bucket and every inferred one as -1."""
    result = [list(shape) for shape in shapes]
    given = [tuple(shape) for shape in shapes]
    for spec in config.dynamic_tensor_specs:
        places = _present(spec, given)
        for index, dim in places:
            first = given[places[0][0]][places[0][1]]
            result[index][dim] = spec.map_to_tuning_buckets(first)
    for constraint in config.constraint_specs:
        result[constraint.input_idx][constraint.dim_idx] = -1
    return tuple(tuple(shape) for shape in result)


def cache_key(
    custom_op: str,
    runner: TunableRunner,
    shapes: Sequence[Sequence[int]],
    config: TuningConfig,
    inputs: Sequence[Any] = (),
) -> ProfilingCacheKey:
    """What a choice for these shapes is filed under."""
    described = runner_key(runner)
    extras = getattr(runner, "get_cache_key_extras", None)  # the runner may be no TunableRunner
    return ProfilingCacheKey(
        custom_op=custom_op,
        runner_class_name=type(runner).__name__,
        runner_hash=hash(runner),
        nearest_profile=nearest_profile(shapes, config),
        extras=tuple(extras(list(inputs))) if extras is not None and inputs else (),
        fields=described.fields,
        portable=described.portable,
    )


@functools.lru_cache(maxsize=256)
def overridden(config: TuningConfig, buckets: tuple[int, ...] | None, up: bool) -> TuningConfig:
    """A config with other buckets or another rounding; equal arguments give one object."""
    if buckets is None and not up:
        return config

    def change(spec: DynamicTensorSpec) -> DynamicTensorSpec:
        given = spec.gen_tuning_buckets if buckets is None else buckets
        mapper = make_generated_mapper(given) if callable(given) else make_bucket_mapper(given, up)
        return replace(spec, gen_tuning_buckets=given, map_to_tuning_buckets=mapper)

    specs = tuple(change(spec) for spec in config.dynamic_tensor_specs)
    return replace(config, dynamic_tensor_specs=specs)
