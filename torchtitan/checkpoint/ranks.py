"""How all ranks come to one answer about a checkpoint, also where one of them fails.

The ranks are a tree: rank r has the ranks FAN_OUT * r + 1 to FAN_OUT * r + FAN_OUT below it. What all are told comes
down it, what is collected goes up, so that a rank has FAN_OUT + 2 sockets at most, however many ranks there are.
"""

import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

from torchtitan.checkpoint.storage import reason
from torchtitan.config.errors import CheckpointError

T = TypeVar("T")

FAN_OUT = 8
# How long a rank waits for one that writes a large file to a slow disk.
TIMEOUT = timedelta(minutes=30)


class Ranks:
    """All ranks, in a group of their own, since saves run beside the collectives of training.

    All make the same calls in the same order; the first call makes the group. `alone`, a process is all ranks.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self.is_first = self.rank == 0
        first_below = FAN_OUT * self.rank + 1
        self._below = range(first_below, min(first_below + FAN_OUT, self.size))

    @cached_property
    def group(self) -> dist.ProcessGroup:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each of them."""
        return self._tell(self.gather_first(value) or [])

    def gather_first(self, value: T) -> list[T] | None:
        """The values of all ranks, on the first one; None on the others."""
        mine = {self.rank: pickle.dumps(value)}
        for rank in self._below:
            mine |= pickle.loads(self._receive(rank))
        if not self.is_first:
            self._send(_above(self.rank), pickle.dumps(mine))
            return None
        return [pickle.loads(mine[rank]) for rank in range(len(mine))]

    def together(self, work: Callable[[], T]) -> T:
        """Do the work on each rank. Where it fails on one, all raise its CheckpointError, and none waits for it."""
        outcome = _attempt(work)
        for other in self.gather(outcome if isinstance(outcome, CheckpointError) else None):
            if other is not None:
                raise other
        assert not isinstance(outcome, CheckpointError)
        return outcome

    def ask_first(self, question: Callable[[], T]) -> T:
        """The answer of the first rank, or its CheckpointError."""
        answer = self._tell(_attempt(question) if self.is_first else None)
        if isinstance(answer, CheckpointError):
            raise answer
        return answer  # type: ignore[return-value]

    def _tell(self, value: T) -> T:
        """The first rank's value, on each of them."""
        content = pickle.dumps(value) if self.is_first else self._receive(_above(self.rank))
        for rank in self._below:
            self._send(rank, content)
        told: T = value if self.is_first else pickle.loads(content)
        return told

    def _send(self, rank: int, content: bytes) -> None:
        dist.send(torch.tensor(len(content)), group=self.group, group_dst=rank)
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), group=self.group, group_dst=rank)

    def _receive(self, rank: int) -> bytes:
        num_bytes = torch.tensor(0)
        dist.recv(num_bytes, group=self.group, group_src=rank)
        content = torch.empty(int(num_bytes), dtype=torch.uint8)
        dist.recv(content, group=self.group, group_src=rank)
        return content.numpy().tobytes()


def _above(rank: int) -> int:
    return (rank - 1) // FAN_OUT


def _attempt(work: Callable[[], T]) -> T | CheckpointError:
    try:
        return work()
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(reason(error))
