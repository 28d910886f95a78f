"""The loss of validation: the standard one, of as many tokens at a time as fit a memory budget.

Shapes: B sequences, S tokens each, D model dim, Vp this rank's rows of the vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.loss.chunking import chunk_rows, rows_in_budget
from torchtitan.components.loss.cross_entropy import CrossEntropySum
from torchtitan.components.loss.terms import get_loss_dtype
from torchtitan.components.loss.vocab_shard import gather_hidden_local_weight

if TYPE_CHECKING:
    from torchtitan.protocols.model import OutputHead

_NUM_COPIES = 3
"""Of the logits in the loss's dtype, at most, that the standard loss makes where it is not compiled."""


class EvalLoss:
    """Sum of the token losses, for a forward pass without gradients."""

    def __init__(self, *, budget_bytes: int = 1 << 30, compile: bool = False) -> None:
        """budget_bytes: for the logits and what the loss makes of them."""
        self._budget_bytes = budget_bytes
        self._sum = CrossEntropySum(compile=compile)

    def __call__(
        self,
        hidden: Tensor,  # (B, S, D)
        head: "OutputHead",
        labels: Tensor,  # (B, S) int64
    ) -> Tensor:
        return head.with_weight(partial(self._of_local_rows, labels=labels), hidden)

    def _of_local_rows(self, hidden: Tensor, weight: Tensor, *, labels: Tensor) -> Tensor:
        hidden, weight, shard = gather_hidden_local_weight(hidden, weight)
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        max_rows = rows_in_budget(
            self._budget_bytes,
            vocab_rows=shard.rows_per_rank if shard else len(weight),  # all ranks must take the same steps
            bytes_per_logit=hidden.element_size() + _NUM_COPIES * get_loss_dtype(hidden).itemsize,
        )
        rows = chunk_rows(len(labels), max_rows)
        total = hidden.new_zeros((), dtype=get_loss_dtype(hidden))
        for part, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            total = total + self._sum.of_local(F.linear(part, weight), targets, shard)
        return total
