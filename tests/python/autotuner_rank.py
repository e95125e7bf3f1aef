# SPDX-License-Identifier: Apache-2.0
"""One rank of test_autotuner_group.py: `python autotuner_rank.py CASES RANK RANKS FILE`.

Prints a line of JSON for each of the comma-separated cases.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import torch.distributed as dist

import compat_layers as cl
import hopyard
from autotuner_runners import CLOCK, Other, Runner, dynamic, tensors
from hopyard.compat.flashinfer import autotuner as at
from hopyard.compat.flashinfer import autotuner_measure
from hopyard.compat.flashinfer.autotuner_config import cache_key

OP = "test::op"
CONFIG = dynamic((4, 8, 16))
# Each rank measures something else: rank 0 finds tactic 1 the fastest, the others tactic 0.
TIMES = ({0: 3.0, 1: 1.0}, {0: 1.0, 1: 3.0}, {0: 0.5, 1: 9.0}, {0: 1.0, 1: 2.0})


def choose(runner, op=OP):
    return [
        at.AutoTuner.get().choose_one(op, [runner], CONFIG, tensors(size))[1] for size in (4, 8, 16)
    ]


def answer(rank, runner):
    """What a rank chose, and whether it measured."""
    with at.autotune():
        chosen = choose(runner)
        calls = len(runner.log)
        again = choose(runner)  # settled: nobody waits for anybody
    assert again == chosen
    assert len(runner.log) == calls
    return {"chosen": chosen, "measured": calls > 0, "after": choose(runner)}


def same(rank):
    return answer(rank, Runner(TIMES[rank]))


def warm(rank):
    """The last rank knows other choices from before."""
    runner = Runner(TIMES[rank])
    if rank == dist.get_world_size() - 1:
        for size in (4, 8):
            key = cache_key(OP, runner, ((size, 4),), CONFIG)
            at.AutoTuner.get().profiling_cache[key] = (0, None)
        at.AutoTuner.get().store.file.configs[
            cache_key(OP, runner, ((16, 4),), CONFIG).file_key
        ] = ("Runner", 0)
    return answer(rank, runner)


def failing(rank):
    """Every tactic fails on rank 0, and the fallback with them."""
    dead = RuntimeError("no kernel")
    if rank == 0:
        return answer(rank, Runner({0: dead}, fallback=dead))
    return answer(rank, Runner(TIMES[rank]))


def memory(rank):
    return answer(rank, Runner({0: MemoryError("none left")} if rank == 0 else TIMES[rank]))


def broken(rank):
    """Rank 0 stops with an error."""

    class Stopping(Runner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            if rank == 0 and not do_preparation:
                raise KeyboardInterrupt
            return super().forward(inputs, tactic, do_preparation)

    return answer(rank, Stopping())


def different(rank):
    runner = Runner() if rank == 0 else Other()
    return answer(rank, runner)


def absent(rank):
    """Rank 1 never makes the call."""
    if rank == 1:
        return {}
    return answer(rank, Runner())


def root_absent(rank):
    """Rank 0 never makes the call."""
    if rank == 0:
        return {}
    return answer(rank, Runner())


def ranking(rank):
    with at.autotune():
        runner = Runner(TIMES[rank])
        ranks = at.AutoTuner.get().rank_tactics(OP, [runner], CONFIG, tensors(8), k=2)
    return {"chosen": ranks, "measured": bool(runner.log)}


def operation(rank):
    """A MoE operation, which the library's tuner measures."""
    at.AutoTuner.get().how.max_seconds = 0.3
    case = cl.make("bf16", cl.Sizes(128, 128, 8, 2, 4))
    with at.autotune(tuning_buckets=(1, 4)):
        for _ in range(2):
            cl.call(case, logits=cl.logits_of(case))
    return {
        "record": json.dumps(at.AutoTuner.get().store.record("hopyard.moe"), sort_keys=True),
        "measured": hopyard.tuning_stats().measured > 0,
    }


CASES = {
    f.__name__: f
    for f in (
        *(same, warm, failing, memory, broken, different, absent, root_absent, ranking),
        operation,
    )
}


def run(case, rank):
    """The answer of a case, in a tuner of its own."""
    at.AutoTuner._instance = None
    at.set_autotune_process_group(dist.group.WORLD, timeout=3 if "absent" in case else 60)
    try:
        return CASES[case](rank)
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error)}


def main():
    cases, rank, ranks, file = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    autotuner_measure.time = CLOCK
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    for case in cases.split(","):
        sys.stdout.write(json.dumps(run(case, rank)) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # alive until the others have answered


if __name__ == "__main__":
    main()
