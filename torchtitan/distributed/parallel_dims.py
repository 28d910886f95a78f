"""How many ranks each kind of parallelism takes, and the device mesh of that layout.

Degrees are plain numbers: torch is imported only when the mesh is built, so that options are checked fast.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import Parallelism

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The mesh's axes, outermost first: the ranks of one tp group are neighbours, those of one pp group far apart."""


@dataclass(frozen=True)
class ParallelDims:
    """The degree of each axis. Their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> ParallelDims:
        """Take the degrees from [parallelism]; a shard degree of -1 becomes what the other degrees leave over."""
        degrees = {
            "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
            "data_parallel_shard_degree": parallelism.data_parallel_shard_degree,
            "context_parallel_degree": parallelism.context_parallel_degree,
            "tensor_parallel_degree": parallelism.tensor_parallel_degree,
            "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        }
        dp_shard = degrees["data_parallel_shard_degree"]
        others = math.prod(degree for name, degree in degrees.items() if name != "data_parallel_shard_degree")
        if dp_shard == -1 and world_size % others == 0:
            dp_shard = world_size // others
        if dp_shard == -1 or dp_shard * others != world_size:
            raise ConfigError(_explain_misfit(degrees, world_size))
        return cls(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=dp_shard,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
        )

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP shards: context-parallel ranks hold equal weights, so they share them out too."""
        return self.dp_shard * self.cp

    def build_mesh(self, device_type: str) -> Mesh:
        """The mesh of this layout; a collective call."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)
        return Mesh(init_device_mesh(device_type, shape, mesh_dim_names=AXES))


class Mesh:
    """The ranks by axis. Every axis is there, also where its size is 1.

    mesh["tp"] and so on for each of AXES; besides them
    | dp           | dp_replicate x dp_shard      | ranks that read different sequences           |
    | dp_shard_cp  | dp_shard x cp                | ranks over which FSDP shards the weights      |
    | hsdp         | dp_replicate, dp_shard x cp  | two-dimensional: copies of those shards       |
    """

    def __init__(self, root: DeviceMesh):
        self.device_type = root.device_type
        self._axes = {axis: root[axis] for axis in AXES}
        self._axes["dp"] = root["dp_replicate", "dp_shard"]._flatten("dp")
        self._axes["dp_shard_cp"] = root["dp_shard", "cp"]._flatten("dp_shard_cp")
        with warnings.catch_warnings():
            # torch asks to keep flattened axes oneself, as is done above, but has no public way yet to pair one up.
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")
            self._axes["hsdp"] = root["dp_replicate", "dp_shard_cp"]

    def __getitem__(self, axis: str) -> DeviceMesh:
        return self._axes[axis]

    def is_first(self, *axes: str) -> bool:
        """Whether this rank comes first on each of the axes."""
        return all(self[axis].get_local_rank() == 0 for axis in axes)

    def get_groups(self) -> list[ProcessGroup]:
        """The process group of each axis that this rank is in."""
        return [mesh.get_group() for axis, mesh in self._axes.items() if axis != "hsdp"]


def _explain_misfit(degrees: dict[str, int], world_size: int) -> str:
    shard = degrees["data_parallel_shard_degree"]
    named = [name for name, degree in degrees.items() if degree != 1] or ["data_parallel_shard_degree"]
    given = ", ".join(f"parallelism.{name}={degrees[name]}" for name in named)
    others = math.prod(degree for name, degree in degrees.items() if name != "data_parallel_shard_degree")
    product = f"{others} (times the shard degree, -1)" if shard == -1 else f"{others * shard}"
    message = f"The parallel degrees do not fit {world_size} process{'es' * (world_size != 1)}: {given}; "
    message += f"their product is {product}, the world size {world_size}. "
    if world_size % others == 0:
        return message + f"parallelism.data_parallel_shard_degree={world_size // others} (or -1) would fit."
    needed = others * max(shard, 1)
    fitting = {name: degree for name, degree in degrees.items() if name != "data_parallel_shard_degree"}
    # Keep as much as possible of what was asked for: give up, in this order, copies, context, stages, tensor.
    for name in (
        "data_parallel_replicate_degree",
        "context_parallel_degree",
        "pipeline_parallel_degree",
        "tensor_parallel_degree",
    ):
        if world_size % math.prod(fitting.values()) == 0:
            break
        rest = math.prod(degree for other, degree in fitting.items() if other != name)
        fitting[name] = math.gcd(fitting[name], world_size // rest) if world_size % rest == 0 else 1
    fitting["data_parallel_shard_degree"] = world_size // math.prod(fitting.values())
    layout = ", ".join(f"parallelism.{name}={degree}" for name, degree in fitting.items() if degree != 1)
    otherwise = f"use {layout} and 1 for the rest" if layout else "leave all degrees at 1"
    return message + f"Start {needed} processes (NGPU={needed}, or --nproc_per_node {needed}), or {otherwise}."
