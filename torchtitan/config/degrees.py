"""How many ranks each kind of parallelism takes. Plain numbers; distributed/mesh.py makes a device mesh of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Parallelism, Training

_SHARD = "data_parallel_shard_degree"


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
        degrees = {  # in the order of the fields
            "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
            _SHARD: parallelism.data_parallel_shard_degree,
            "context_parallel_degree": parallelism.context_parallel_degree,
            "tensor_parallel_degree": parallelism.tensor_parallel_degree,
            "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        }
        others = math.prod(degrees.values()) // degrees[_SHARD]  # also where that is -1
        dp_shard = world_size // others if degrees[_SHARD] == -1 else degrees[_SHARD]
        if dp_shard * others != world_size:
            raise ConfigError(_explain_misfit(degrees, others, world_size))
        return cls(*(degrees | {_SHARD: dp_shard}).values())

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    def get_global_batch_size(self, training: Training) -> int:
        """Sequences of a step, over all ranks and microbatches: one microbatch of each rank where that is -1."""
        return max(training.local_batch_size * self.dp, training.global_batch_size)

    def get_num_microbatches(self, training: Training) -> int:
        """In which a rank takes its part of a step. The global batch divides: config/validate.py."""
        return self.get_global_batch_size(training) // (training.local_batch_size * self.dp)

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP shards: context-parallel ranks hold equal weights, so they share them out too."""
        return self.dp_shard * self.cp


def _explain_misfit(degrees: dict[str, int], others: int, world_size: int) -> str:
    """`others` is the product of all degrees but the shard degree."""
    shard = degrees[_SHARD]
    named = [name for name, degree in degrees.items() if degree != 1] or [_SHARD]
    given = ", ".join(f"parallelism.{name}={degrees[name]}" for name in named)
    product = f"{others} (times the shard degree, -1)" if shard == -1 else f"{others * shard}"
    message = f"The parallel degrees do not fit {world_size} process{'es' * (world_size != 1)}: {given}; "
    message += f"their product is {product}, the world size {world_size}. "
    if world_size % others == 0:
        return message + f"parallelism.{_SHARD}={world_size // others} (or -1) would fit."
    needed = others * max(shard, 1)
    return message + (
        f"Start {needed} processes (NGPU={needed}, or --nproc_per_node {needed}), or give degrees whose product divides"
        f" {world_size}, and parallelism.{_SHARD}=-1 for the rest."
    )
