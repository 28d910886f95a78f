"""Who writes what of a state: each rank decides for itself, from the layout of its tensors.

Ranks that hold the same shard (copies of HSDP, norms under tensor parallel) share the writing: all go through the
same shards in the same order, and give each to the one that has the fewest bytes so far. What is no DTensor has no
layout to tell who else holds it: there the ranks tell each other their keys, and the first that has one writes it. A
plan is kept while no rank's state changes but in its values, and then costs the ranks one bit each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.checkpoint.ranks import Ranks


class Shard(NamedTuple):
    """A box of a tensor."""

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank writes."""

    shards: tuple[Shard, ...] = ()
    values: tuple[str, ...] = ()
    """Keys of what is no tensor."""


class Planner:
    """One rank's; all ranks make the same calls."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._layout: list[Any] | None = None
        self._plan = Plan()

    def plan(self, state: Mapping[str, Any]) -> Plan:
        layout = [_get_layout(key, value) for key, value in state.items()]
        if not all(self.ranks.gather(layout == self._layout)):
            others = [key for key, value in state.items() if not isinstance(value, DTensor)]
            first: dict[str, int] = {}
            for rank, keys in enumerate(self.ranks.gather(others)):
                for key in keys:
                    first.setdefault(key, rank)
            mine = {key: state[key] for key in others if first[key] == self.ranks.rank}
            plain = [
                Shard(key, value.dtype, tuple(value.shape), (0,) * value.dim(), tuple(value.shape))
                for key, value in mine.items()
                if isinstance(value, Tensor)
            ]
            values = tuple(key for key, value in mine.items() if not isinstance(value, Tensor))
            self._plan, self._layout = Plan((*_divide(state), *plain), values), layout
        return self._plan


def get_box(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a tensor begins, and its sizes."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets), tuple(sizes)


def _get_layout(key: str, value: Any) -> Any:
    if isinstance(value, DTensor):
        return key, value.dtype, value.shape, value.placements, value.device_mesh
    return (key, value.dtype, value.shape) if isinstance(value, Tensor) else key


def _divide(state: Mapping[str, Any]) -> list[Shard]:
    """Of the DTensors, what this rank writes."""
    shards = []
    boxes: dict[Any, Any] = {}
    written: dict[Any, list[int]] = {}  # bytes by copy, for each kind of copies
    for key, tensor in state.items():
        if not isinstance(tensor, DTensor) or (coordinate := tensor.device_mesh.get_coordinate()) is None:
            continue
        mesh, placements = tensor.device_mesh, tensor.placements
        if (kind := (tensor.shape, placements, mesh)) not in boxes:  # of which a model has a dozen
            boxes[kind] = get_box(tensor)
        offsets, sizes = boxes[kind]
        copies = tuple(axis for axis, placement in enumerate(placements) if placement.is_replicate())
        mine = 0
        for axis in copies:
            mine = mine * mesh.size(axis) + coordinate[axis]
        num_bytes = written.setdefault((mesh, copies), [0] * math.prod(mesh.size(axis) for axis in copies))
        writer = num_bytes.index(min(num_bytes))
        num_bytes[writer] += math.prod(sizes) * tensor.dtype.itemsize
        if writer == mine and math.prod(sizes):
            shards.append(Shard(key, tensor.dtype, tuple(tensor.shape), offsets, sizes))
    return shards
