"""The first tokens of the fused loss under a tight budget: their logits lie in the memory of the weight gradient.

Shapes: A tokens, at most D; D model dim; V vocabulary; R rows of a slice of the weight gradient.

The weight gradient dW (V, D) is not needed before its first product, and until then has room for D tokens' logits,
transposed:

    Z^T = W H^T                    (V, A)  in the first A columns of dW
    G^T = scale * (softmax(Z) - Y)^T  in place; reductions run down the columns
    dH  = G W                      (A, D)
    for each slice of rows: copy G^T[slice] out, then dW[slice] = G^T[slice] H over it

No logits are recomputed, and beside the copy of a slice little is allocated: a token's statistics for each 4096 words.
The slice has 128 rows or more, whatever the budget. A tight budget makes token chunks of few rows, each of which reads
and writes all of dW; this takes the first D tokens out of that.
"""

import torch
from torch import Tensor

from torchtitan.components.loss.chunking import ALIGNMENT
from torchtitan.components.loss.gradient_sum import WeightGradient
from torchtitan.components.loss.softmax_gradient import (
    column_statistics,
    combine_statistics,
    write_column_gradient_,
)

_SLICE_ROWS = 2048
"""At most: the copy of a slice is then read from a GPU's cache."""


def fill_in_place(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (A,) int64
    scale: Tensor,  # () float32
    *,
    losses: Tensor,  # (A,) float32, written
    d_hidden: Tensor | None,  # (A, D), written
    d_weight: WeightGradient | None,  # (V, D) in the dtype of `hidden`, written
    budget_bytes: int,
) -> None:
    """Losses and both gradients of `scale * sum(losses)`, for at most D tokens, the first that `d_weight` gets."""
    assert d_weight is not None, "without a weight gradient there is no memory to borrow"
    whole = d_weight.claim()
    num_tokens, dim = hidden.shape
    assert num_tokens <= dim and whole.dtype == hidden.dtype, "the logits do not fit the weight gradient's memory"
    logits = whole[:, :num_tokens]  # (V, A)
    torch.mm(weight, hidden.t(), out=logits)
    lse, losses[:] = combine_statistics(column_statistics(logits, labels), labels)
    write_column_gradient_(logits, lse, labels, scale)
    if d_hidden is not None:
        torch.mm(logits.t(), weight, out=d_hidden)
    slice_rows = budget_bytes // (num_tokens * logits.element_size())
    slice_rows = min(max(slice_rows - slice_rows % ALIGNMENT, ALIGNMENT), _SLICE_ROWS)
    copy = logits.new_empty(min(slice_rows, len(logits)), num_tokens)  # (R, A)
    for rows in (slice(first, first + slice_rows) for first in range(0, len(logits), slice_rows)):
        gradient = copy[: len(logits[rows])].copy_(logits[rows])
        torch.mm(gradient, hidden, out=whole[rows])
