"""Which rows of the vocabulary a rank holds, and the step from DTensors to this rank's tensors.

DTensor is imported where one is met: who has plain tensors need not have it.

Shapes: B sequences, S tokens each, T = B * S, D model dim, V vocabulary, Vp this rank's rows of it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + Vp) of the vocabulary are on this rank; the other ranks of `group` hold the rest."""

    start: int
    group: dist.ProcessGroup
    rows_per_rank: int
    """Vp of the first rank; the last ones may hold fewer rows, or none."""
    vocab_size: int
    """V, of all ranks together."""

    @staticmethod
    def to_arguments(shard: "VocabShard | None") -> tuple[list[int], str]:
        """For operators, which take no objects: numbers, and the group's name."""
        if shard is None:
            return [], ""
        return [shard.start, shard.rows_per_rank, shard.vocab_size], shard.group.group_name

    @classmethod
    def from_arguments(cls, numbers: Sequence[int], group_name: str) -> "VocabShard | None":
        if not numbers:
            return None
        start, rows_per_rank, vocab_size = numbers
        return cls(start, c10d._resolve_process_group(group_name), rows_per_rank, vocab_size)  # type: ignore[arg-type, attr-defined]


def is_dtensor(tensor: Tensor) -> "TypeIs[DTensor]":
    """Without importing what it is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def vocab_shard_of(sharded: "DTensor", *, dim: int) -> VocabShard:
    """The rows of dim `dim`, sharded over a one-axis mesh, that this rank holds. Raises ValueError otherwise."""
    from torch.distributed.tensor import Shard

    dim = dim % sharded.ndim
    if sharded.device_mesh.ndim != 1 or sharded.placements != (Shard(dim),):
        raise ValueError(f"expected dim {dim} sharded over one mesh axis, got {sharded.placements}")
    mesh = sharded.device_mesh
    rows_per_rank = -(-sharded.shape[dim] // mesh.size())  # as torch.chunk
    start = min(mesh.get_local_rank() * rows_per_rank, sharded.shape[dim])
    return VocabShard(start, mesh.get_group(), rows_per_rank, sharded.shape[dim])


def gather_hidden_local_weight(
    hidden: Tensor,  # (B, S, D), plain, or a DTensor sharded over the sequence
    weight: Tensor,  # (V, D), plain, or a DTensor sharded over the vocabulary
) -> tuple[Tensor, Tensor, VocabShard | None]:  # (B, S, D), (Vp, D)
    """Plain tensors for a loss on this rank's vocabulary rows.

    The hidden states are gathered over the sequence once: 2 * T * D * (n - 1) / n bytes in bf16 for n ranks. Each
    rank's hidden gradient sums over its own rows only, so it is a *partial sum*, reduce-scattered once in backward.
    Labelled `Replicate` instead it would lose the other ranks' part without an error.
    """
    if not is_dtensor(weight):
        return hidden, weight, None
    from torch.distributed.tensor import Partial, Replicate

    assert is_dtensor(hidden), f"expected a DTensor beside a sharded weight, got {type(hidden)}"
    shard = vocab_shard_of(weight, dim=0)
    gathered = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return gathered, weight.to_local(), shard
