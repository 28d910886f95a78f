"""Softmax, loss and gradient of one chunk of logits, in place.

For a row of logits x with target y, upstream scale a and p = softmax(x):

    loss = logsumexp(x) - x[y]            gradient of a * loss = a * (p - onehot(y))

The loss and the gradient read the same rounded logits; everything between is float32; `p - 1` at the target
is computed in float32 and rounded once. Rows labelled IGNORE_INDEX get loss 0 and gradient 0.

With the vocabulary sharded over ranks the work splits in two: `row_statistics` of this rank's columns, which the
caller combines over the ranks, then `write_gradient_`. On CUDA what reads logits is a Triton kernel
(softmax_gradient_triton.py); elsewhere the plain torch code below, which is also the kernels' reference.

Shapes: C rows of one chunk, Vp columns of the vocabulary on this rank, of which the first has id `start`.
"""

import torch
from torch import Tensor

from torchtitan.components.loss.cross_entropy import IGNORE_INDEX

_CPU_BLOCK_BYTES = 4 << 20
"""Rows are taken in blocks of about this size on a CPU, so that all passes but the first read from the cache."""


def loss_and_gradient_(
    logits: Tensor,  # (C, V), overwritten with the gradient
    labels: Tensor,  # (C,) int64
    scale: Tensor,  # () float32
    losses: Tensor,  # (C,) float32, written: unscaled token losses
) -> None:
    """Turn logits into the gradient of `scale * sum(losses)` with respect to them."""
    if logits.is_cuda:
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.loss_and_gradient_(logits, labels, scale, losses)
        return
    for rows in _blocks(logits):
        statistics = row_statistics(logits[rows], labels[rows])
        lse, losses[rows] = combine_statistics(statistics.unsqueeze(0), labels[rows])
        write_gradient_(logits[rows], lse, labels[rows], scale)


def row_statistics(
    logits: Tensor,  # (C, Vp)
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    *,
    start: int = 0,
) -> Tensor:  # (3, C) float32
    """Per row: the maximum, the sum of exp(x - maximum), and the target's logit (-inf where another rank holds it)."""
    if logits.is_cuda and logits.shape[1] > 0:
        from torchtitan.components.loss import softmax_gradient_triton

        return softmax_gradient_triton.row_statistics(logits, labels, start=start)
    statistics = logits.new_full((3, logits.shape[0]), float("-inf"), dtype=torch.float32)
    if logits.shape[1] == 0:  # more ranks than rows of the vocabulary
        statistics[1] = 0
        return statistics
    for rows in _blocks(logits):
        x = logits[rows].float()
        statistics[0, rows] = x.amax(dim=1)
        statistics[1, rows] = (x - statistics[0, rows].unsqueeze(1)).exp_().sum(dim=1)
        column, is_local = _target_column(labels[rows], start, x.shape[1])
        statistics[2, rows] = torch.where(is_local, x.gather(1, column.unsqueeze(1)).squeeze(1), float("-inf"))
    return statistics


def combine_statistics(
    statistics: Tensor,  # (n, 3, C) float32, of the n parts that make up the vocabulary
    labels: Tensor,  # (C,) int64
) -> tuple[Tensor, Tensor]:
    """The rows' logsumexp (C,) and token losses (C,), both float32."""
    part_max, part_sum, part_target = statistics.unbind(1)  # (n, C) each
    row_max = part_max.amax(dim=0)
    lse = (part_sum * (part_max - row_max).exp()).sum(dim=0).log() + row_max
    return lse, torch.where(labels == IGNORE_INDEX, 0.0, lse - part_target.amax(dim=0))


def write_gradient_(
    logits: Tensor,  # (C, Vp), overwritten with the gradient
    lse: Tensor,  # (C,) float32, over the whole vocabulary
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    scale: Tensor,  # () float32
    *,
    start: int = 0,
) -> None:
    """Turn logits into `scale * (softmax - onehot)`, given the rows' logsumexp."""
    if logits.shape[1] == 0:
        return
    if logits.is_cuda:
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.write_gradient_(logits, lse, labels, scale, start=start)
        return
    row_scale = torch.where(labels == IGNORE_INDEX, 0.0, scale)  # (C,)
    for rows in _blocks(logits):
        block = logits[rows]
        x = block if block.dtype == torch.float32 else block.float()
        x.sub_(lse[rows].unsqueeze(1)).exp_()
        column, is_local = _target_column(labels[rows], start, x.shape[1])
        x.scatter_add_(1, column.unsqueeze(1), -is_local.to(x.dtype).unsqueeze(1))
        x.mul_(row_scale[rows].unsqueeze(1))
        if x is not block:
            block.copy_(x)


def column_statistics(
    logits: Tensor,  # (V, C), a row for each word of the vocabulary, a column for each token
    labels: Tensor,  # (C,) int64
) -> Tensor:  # (n, 3, C) float32, of n parts of the vocabulary
    """`row_statistics` of transposed logits."""
    if logits.is_cuda:
        from torchtitan.components.loss import softmax_gradient_triton

        return softmax_gradient_triton.column_statistics(logits, labels)
    return row_statistics(logits.t(), labels).unsqueeze(0)


def write_column_gradient_(
    logits: Tensor,  # (V, C), overwritten with the gradient
    lse: Tensor,  # (C,) float32
    labels: Tensor,  # (C,) int64
    scale: Tensor,  # () float32
) -> None:
    """`write_gradient_` of transposed logits."""
    if logits.is_cuda:
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.write_column_gradient_(logits, lse, labels, scale)
    else:
        write_gradient_(logits.t(), lse, labels, scale)


def _target_column(labels: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column here, clamped into range, and whether it is here at all."""
    column = labels - start
    return column.clamp(0, num_columns - 1), (column >= 0) & (column < num_columns)


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, _CPU_BLOCK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]
