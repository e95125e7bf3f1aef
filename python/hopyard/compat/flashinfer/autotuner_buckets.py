# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens to tune at, and which of them stands for a given number."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable

# Ends of the hybrid rule's sections: powers of two, steps of 256, steps of 512, powers of two.
_POWERS_END, _FINE_END, _COARSE_END = 256, 2048, 4096
_FINE_STEP, _COARSE_STEP = 256, 512


def next_positive_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x; 1 for x <= 1."""
    return 1 << max(x - 1, 0).bit_length()


def last_positive_power_of_2(x: int) -> int:
    """The largest power of two that is at most x; 1 for x <= 1."""
    return 1 << max(x.bit_length() - 1, 0) if x > 0 else 1


def get_last_power_of_2_num_tokens_buckets(max_num_tokens: int, min_num_tokens: int = 1) -> tuple:
    """Powers of two from the largest within `max_num_tokens` down to `min_num_tokens`."""
    bucket, result = last_positive_power_of_2(max_num_tokens), []
    while bucket >= max(min_num_tokens, 1):
        result.append(bucket)
        bucket //= 2
    return tuple(result)


def get_hybrid_num_tokens_buckets(max_num_tokens: int = 8192) -> tuple[int, ...]:
    """Powers of two up to 256, steps of 256 to 2048, of 512 to 4096, powers of two; and the max."""
    powers = [1 << i for i in range(_POWERS_END.bit_length())]
    fine = range(2 * _FINE_STEP, _FINE_END + 1, _FINE_STEP)
    coarse = range(_FINE_END + _COARSE_STEP, _COARSE_END + 1, _COARSE_STEP)
    large = [1 << i for i in range(_COARSE_END.bit_length(), max(max_num_tokens, 1).bit_length())]
    known = [b for b in (*powers, *fine, *coarse, *large) if b <= max_num_tokens]
    return tuple(sorted({*known, max(max_num_tokens, 1)}))


def map_to_hybrid_bucket(x: int, max_num_tokens: int = 8192) -> int:
    """The hybrid bucket that stands for x tokens: the next one up, at most the largest."""
    if x <= 0:
        return 1
    if x >= max_num_tokens:
        return max(max_num_tokens, 1)
    if x <= _POWERS_END or x > _COARSE_END:
        bucket = next_positive_power_of_2(x)
    else:
        step = _FINE_STEP if x <= _FINE_END else _COARSE_STEP
        bucket = -(-x // step) * step
    return min(bucket, max_num_tokens)


@functools.cache
def make_hybrid_bucket_mapper(max_num_tokens: int = 8192) -> Callable[[int], int]:
    """`map_to_hybrid_bucket` with its maximum; one object for each, so that hashes are stable."""
    return functools.partial(map_to_hybrid_bucket, max_num_tokens=max_num_tokens)


def round_to_nearest_bucket(x: int, buckets: Iterable[int], round_up: bool = False) -> int:
    """The largest bucket <= x, or with `round_up` the smallest >= x; clamped to the ends."""
    ordered = sorted(set(buckets))
    if not ordered:
        raise ValueError("buckets is empty, wanted at least one number of tokens")
    if round_up:
        return ordered[min(bisect.bisect_left(ordered, x), len(ordered) - 1)]
    return ordered[max(bisect.bisect_right(ordered, x) - 1, 0)]


@functools.lru_cache(maxsize=256)
def _mapper(buckets: tuple[int, ...], round_up: bool) -> Callable[[int], int]:
    return functools.partial(round_to_nearest_bucket, buckets=buckets, round_up=round_up)


def make_bucket_mapper(buckets: Iterable[int], round_up: bool = False) -> Callable[[int], int]:
    """`round_to_nearest_bucket` with its buckets; equal ones give one object."""
    return _mapper(tuple(sorted(set(buckets))), round_up)


@functools.lru_cache(maxsize=256)
def make_generated_mapper(generate: Callable[[int], Iterable[int]]) -> Callable[[int], int]:
    """The smallest bucket >= x of those that a generator gives for the next power of two."""

    def up(x: int) -> int:
        return round_to_nearest_bucket(x, generate(next_positive_power_of_2(x)), round_up=True)

    return up
