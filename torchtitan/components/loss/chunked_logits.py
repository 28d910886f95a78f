"""The walk over the tokens: the logits of some at a time, and their statistics over the whole vocabulary.

With the vocabulary sharded over n ranks, one all-gather of the statistics (3 float32 a token, 12 C bytes a rank, or 6
with outputs or label smoothing) combines those of a chunk. It runs beside the next chunk's product, so that two logits
buffers share the budget.

Shapes: T tokens, D model dim, Vp this rank's rows of the vocabulary, C tokens of one chunk, n ranks, K statistics.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan.components.loss.chunking import plan_chunks
from torchtitan.components.loss.gradients import add_product_
from torchtitan.components.loss.softmax_gradient import combine_statistics, row_statistics
from torchtitan.components.loss.terms import Terms
from torchtitan.components.loss.vocab_shard import VocabShard

collectives: Any = torch.ops._c10d_functional  # the operations below torch.distributed

_CPU_BUDGET_BYTES = 32 << 20
"""On a CPU larger chunks are slower, since they leave the cache: a larger budget is not used."""


class ChunkedLogits:
    """`hidden @ weight.T`, a chunk at a time, in buffers that the next ones overwrite."""

    def __init__(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (Vp, D)
        *,
        budget_bytes: int,
        shard: VocabShard | None,
    ) -> None:
        num_tokens, self._shard, self.is_sharded = len(hidden), shard, shard is not None
        self._hidden, self._weight = hidden, weight
        chunk, num_buffers = plan_chunks(
            num_tokens,
            vocab_rows=len(weight) if shard is None else shard.rows_per_rank,
            bytes_per_logit=hidden.element_size(),
            budget_bytes=budget_bytes if hidden.is_cuda else min(budget_bytes, _CPU_BUDGET_BYTES),
            is_sharded=shard is not None,
        )
        self.rows = [slice(first, min(first + chunk, num_tokens)) for first in range(0, num_tokens, chunk)]
        self._buffers = hidden.new_empty(num_buffers, chunk, len(weight))

    def __getitem__(self, i: int) -> Tensor:  # (C, Vp)
        rows = self.rows[i]
        buffer = self._buffers[i % len(self._buffers), : rows.stop - rows.start]
        return torch.mm(self._hidden[rows], self._weight.t(), out=buffer)

    def with_statistics(self, labels: Tensor, terms: Terms) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, logits (C, Vp), statistics (K, C) over the whole vocabulary) of each chunk."""
        pending: tuple[slice, Tensor, OverRanks] | None = None
        for i in range(len(self.rows) + 1):
            upcoming = None
            if i < len(self.rows):  # the next chunk's product hides the reduction that is under way
                rows, logits = self.rows[i], self[i]
                upcoming = rows, logits, OverRanks(row_statistics(logits, labels[rows], terms), self._shard)
            if pending is not None:
                rows, logits, statistics = pending
                yield rows, logits, statistics.wait()
            pending = upcoming


class GradientProducts:
    """The gradients of hidden states, weight and bias, from those of the logits, chunk by chunk; only those wanted."""

    def __init__(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (Vp, D)
        bias: Tensor | None,  # (Vp,)
        *,
        accum_dtype: torch.dtype,
        needs: Sequence[bool],  # which of them: hidden, weight, bias
    ) -> None:
        self._hidden, self._weight = hidden, weight
        self._d_hidden = torch.empty_like(hidden) if needs[0] else None
        self._d_weight = weight.new_empty(weight.shape, dtype=accum_dtype) if needs[1] else None
        self._d_bias = weight.new_zeros(len(weight), dtype=_float_of(weight)) if needs[2] else None
        self._bias = bias
        if self._d_weight is not None and len(hidden) == 0:
            self._d_weight.zero_()  # there is no first chunk to write it

    def add(self, rows: slice, gradient: Tensor) -> None:  # (C, Vp)
        if self._d_hidden is not None:
            torch.mm(gradient, self._weight, out=self._d_hidden[rows])
        if self._d_weight is not None:
            add_product_(self._d_weight, gradient.t(), self._hidden[rows], is_first=rows.start == 0)
        if self._d_bias is not None:
            self._d_bias += gradient.sum(dim=0, dtype=self._d_bias.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D), (Vp, D) and (Vp,), or without elements where they are not wanted, in the inputs' dtypes."""
        none = self._hidden.new_empty(0)
        return (
            none if self._d_hidden is None else self._d_hidden,
            none.clone() if self._d_weight is None else self._d_weight.to(self._weight.dtype),
            none.clone() if self._d_bias is None or self._bias is None else self._d_bias.to(self._bias.dtype),
        )


def _float_of(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class OverRanks:
    """Row statistics that are on their way to the other ranks of a shard, if there is one."""

    def __init__(self, statistics: Tensor, shard: VocabShard | None) -> None:
        self._mine = statistics  # (K, C), held until they have been sent
        self._all: Tensor | None = None
        if shard is not None:
            group = shard.group
            self._all = collectives.all_gather_into_tensor(statistics, group.size(), group.group_name)  # (n * K, C)
            if not statistics.is_cuda:
                collectives.wait_tensor(self._all)  # nothing is hidden there, and gloo breaks memory with two under way

    def wait(self) -> Tensor:  # (K, C)
        """Those of the whole vocabulary."""
        if self._all is None:
            return self._mine  # without a shard these are of the whole vocabulary
        if self._all.is_cuda:
            collectives.wait_tensor(self._all)
        return combine_statistics(self._all.unflatten(0, (-1, len(self._mine))))
