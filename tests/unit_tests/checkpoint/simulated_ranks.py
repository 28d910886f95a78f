"""Hundreds of ranks in one process, for tests: threads that meet instead of communicating, with shards of their own.

A process group is one for a process, so the mesh is that of a fake one, with a copy for each rank that knows its place.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from torchtitan.checkpoint.ranks import Ranks

T = TypeVar("T")


class Meeting:
    """Where all bring something, and see what the others have brought."""

    def __init__(self, num_ranks: int, timeout_s: float):
        self._barrier = threading.Barrier(num_ranks, timeout=timeout_s)
        self._brought: list[Any] = [None] * num_ranks
        self.size = num_ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._brought[rank] = value
        self._barrier.wait()
        seen = list(self._brought)
        self._barrier.wait()
        return seen


class SimulatedRanks(Ranks):
    def __init__(self, rank: int, meeting: Meeting):
        self.rank, self.size, self.is_first, self._meeting = rank, meeting.size, rank == 0, meeting

    def gather(self, value: T) -> list[T]:
        return self._meeting.exchange(self.rank, value)

    def gather_first(self, value: T) -> list[T] | None:
        values = self.gather(value)
        return values if self.is_first else None

    def _tell(self, value: T) -> T:
        return self.gather(value)[0]


def run_ranks(num_ranks: int, work: Callable[[Ranks], T], *, timeout_s: float = 120) -> list[T]:
    """What `work` gives on each rank, of which none waits longer than that for the others."""
    meeting = Meeting(num_ranks, timeout_s)
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(lambda rank: work(SimulatedRanks(rank, meeting)), range(num_ranks)))


def mesh_of(rank: int, mesh: DeviceMesh) -> DeviceMesh:
    """As the rank sees it that is the `rank`th of the mesh."""
    own = copy.copy(mesh)
    own._coordinate_on_dim = tuple(int(i) for i in torch.unravel_index(torch.tensor(rank), tuple(mesh.shape)))
    return own


def divide(
    state: Mapping[str, Tensor], layouts: Mapping[str, tuple[Placement, ...]], mesh: DeviceMesh
) -> dict[str, Tensor]:
    """A rank's shards of whole tensors; zeros where they are meant to be loaded into."""
    return {key: _divide(tensor, mesh, layouts.get(key, (Replicate(),) * mesh.ndim)) for key, tensor in state.items()}


def _divide(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )
