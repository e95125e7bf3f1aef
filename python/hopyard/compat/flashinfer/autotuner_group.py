# SPDX-License-Identifier: Apache-2.0
"""One choice for all ranks: rank 0 measures, the others take what it chose.

FlashInfer reduces the time of every tactic over the ranks, inside the measurement: a rank with one
tactic more, a warm file or an error waits for ever, or makes the others wait. Here nothing is
exchanged until rank 0 has chosen, and then once for each call whose choices no exchange has settled
yet. That is the same on all ranks, whatever their caches hold.
"""

from __future__ import annotations

import datetime
import pickle
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_SECONDS = 600.0


@dataclass(frozen=True)
class Winner:
    """A choice: the place of its runner, its tactic, and where asked for the runner's tactics in
    order."""

    runner: int
    tactic: Any
    ranking: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Choices:
    """What rank 0 says about a call.

    Attributes:
        call: what was tuned, profile by profile: must be the same on every rank.
        winners: for each profile, None where there is none; or a record.
        error: why there is nothing.
    """

    call: tuple[tuple[Any, ...], ...]
    winners: tuple[Any, ...] = ()
    error: str = ""

    @property
    def ranking(self) -> bool:
        """Whether tactics are wanted in order; the last word of each profile."""
        return bool(self.call and self.call[0][-1])

    def of(self, winners: tuple[Any, ...]) -> Choices:
        """The same call with its winners."""
        return replace(self, winners=winners)

    def failed(self, error: BaseException) -> Choices:
        """The same call without any."""
        return replace(self, error=f"{type(error).__name__}: {error}")


@dataclass
class Group:
    """A process group of torch.distributed.

    Attributes:
        group: it.
        seconds: that a rank waits for another one.
        settled: profiles that the ranks have agreed on.
    """

    group: Any
    seconds: float = _SECONDS
    settled: set[Any] = field(default_factory=set)

    @property
    def _distributed(self) -> Any:
        import torch.distributed

        return torch.distributed

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return int(self._distributed.get_rank(self.group))

    def _device(self) -> Any:
        torch = sys.modules["torch"]
        if self._distributed.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _finish(self, work: Any, what: str) -> None:
        try:
            work.wait(datetime.timedelta(seconds=self.seconds))
            if self._device().type == "cuda":
                sys.modules["torch"].cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise TimeoutError(
                f"autotune: rank {self.rank} of {self._distributed.get_world_size(self.group)} "
                f"waited for {what} in vain ({self.seconds:g} s at most): every rank of the group "
                "must make the same calls under autotune. Raise "
                f"set_autotune_process_group(group, timeout=...) if one is only slow: {error}"
            ) from error

    def _broadcast(self, tensor: Any) -> Any:
        distributed = self._distributed
        root = 0 if self.group is None else distributed.get_global_rank(self.group, 0)
        work = distributed.broadcast(tensor, root, group=self.group, async_op=True)
        self._finish(work, "the choices of rank 0")
        return tensor

    def share(self, mine: Choices) -> Choices:
        """Rank 0's choices, on every rank.

        Raises:
            TimeoutError: a rank is missing.
            RuntimeError: rank 0 failed, or the ranks tune different calls.
        """
        torch = sys.modules["torch"]
        device = self._device()
        payload = pickle.dumps(mine) if self.rank == 0 else b""
        size = self._broadcast(torch.tensor([len(payload)], dtype=torch.int64, device=device))
        text = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
        if self.rank == 0:
            text.copy_(torch.from_numpy(np.frombuffer(payload, np.uint8).copy()))
        answer: Choices = pickle.loads(bytes(self._broadcast(text).cpu().numpy()))
        self._agree(answer.call == mine.call, answer, mine)
        if answer.error and self.rank != 0:
            raise RuntimeError(f"autotune: rank 0 chose nothing: {answer.error}")
        return answer

    def _agree(self, same: bool, answer: Choices, mine: Choices) -> None:
        """Every rank has the answer, which also tells rank 0 of one that is missing."""
        torch = sys.modules["torch"]
        distributed = self._distributed
        count = torch.tensor([int(not same)], dtype=torch.int64, device=self._device())
        work = distributed.all_reduce(count, group=self.group, async_op=True)
        self._finish(work, "the other ranks to take the choices of rank 0")
        if int(count.item()):
            raise RuntimeError(
                f"autotune: {int(count.item())} ranks tune another call than rank 0: it has "
                f"{answer.call}, this one, rank {self.rank}, has {mine.call}; every rank of the "
                "group must make the same calls, with the same runners and buckets"
            )
