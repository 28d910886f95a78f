"""How all ranks come to one answer about a checkpoint, also where one of them fails."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from torchtitan.checkpoint.storage import reason
from torchtitan.config.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The ranks of a group. It is used by nothing else, since saves run beside the collectives of training."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank = dist.get_rank(group)
        self.is_first = self.rank == 0

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

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
        answer = [_attempt(question) if self.is_first else None]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if isinstance(answer[0], CheckpointError):
            raise answer[0]
        return answer[0]  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> T | CheckpointError:
    try:
        return work()
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(reason(error))


__all__ = ["Ranks"]
