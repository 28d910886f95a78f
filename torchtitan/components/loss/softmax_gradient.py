"""Softmax, loss and gradient of one chunk of logits, in place.

For a row of logits x with target y, upstream scale a, m = max(x) and s = sum(exp(x - m)):

    loss = (m - x[y]) + log(s)            gradient of a * loss = a / s * (exp(x - m) - s * onehot(y))

m and log(s) are never added: their sum would be rounded to the size of m, and with it the loss of a token that the
model is sure of. The loss and the gradient read the same rounded logits; everything between is float32 (float64 for
float64 logits), and the gradient is rounded once. Rows labelled IGNORE_INDEX get loss 0 and gradient 0.

With the vocabulary sharded over ranks the work splits in two: `row_statistics` of this rank's columns, which the
caller combines over the ranks, then `write_gradient_`. On CUDA what reads logits is a Triton kernel
(softmax_gradient_triton.py); elsewhere the plain torch code below, which is also the kernels' reference.

Shapes: C rows of one chunk, Vp columns of the vocabulary on this rank, of which the first has id `start`.
"""

import torch
from torch import Tensor

from torchtitan.components.loss.cross_entropy import IGNORE_INDEX, get_loss_dtype
from torchtitan.components.loss.gradients import runs_on_triton

_CPU_BLOCK_BYTES = 4 << 20
"""Rows are taken in blocks of about this size on a CPU, so that all passes but the first read from the cache."""


def loss_and_gradient_(
    logits: Tensor,  # (C, V), overwritten with the gradient
    labels: Tensor,  # (C,) int64
    scale: Tensor,  # () float32
    losses: Tensor,  # (C,) float32, written: unscaled token losses
) -> None:
    """Turn logits into the gradient of `scale * sum(losses)` with respect to them."""
    if runs_on_triton(logits):
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.loss_and_gradient_(logits, labels, scale, losses)
        return
    for rows in _blocks(logits):
        statistics = row_statistics(logits[rows], labels[rows])
        row_max, row_sum, losses[rows] = combine_statistics(statistics.unsqueeze(0), labels[rows])
        write_gradient_(logits[rows], row_max, row_sum, labels[rows], scale)


def row_statistics(
    logits: Tensor,  # (C, Vp)
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    *,
    start: int = 0,
) -> Tensor:  # (3, C) float32
    """Per row: the maximum, the sum of exp(x - maximum), and the target's logit (-inf where another rank holds it)."""
    if runs_on_triton(logits) and logits.shape[1] > 0:
        from torchtitan.components.loss import softmax_gradient_triton

        return softmax_gradient_triton.row_statistics(logits, labels, start=start)
    dtype = get_loss_dtype(logits)
    statistics = logits.new_full((3, logits.shape[0]), float("-inf"), dtype=dtype)
    if logits.shape[1] == 0:  # more ranks than rows of the vocabulary
        statistics[1] = 0
        return statistics
    for rows in _blocks(logits):
        x = logits[rows].to(dtype)
        statistics[0, rows] = x.amax(dim=1)
        statistics[1, rows] = (x - statistics[0, rows].unsqueeze(1)).exp_().sum(dim=1)
        column, is_local = _target_column(labels[rows], start, x.shape[1])
        statistics[2, rows] = torch.where(is_local, x.gather(1, column.unsqueeze(1)).squeeze(1), float("-inf"))
    return statistics


def combine_statistics(
    statistics: Tensor,  # (n, 3, C) float32, of the n parts that make up the vocabulary
    labels: Tensor,  # (C,) int64
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' maximum, sum of exp(x - maximum) and token losses, (C,) float32 each."""
    part_max, part_sum, part_target = statistics.unbind(1)  # (n, C) each
    row_max = part_max.amax(dim=0)
    row_sum = (part_sum * (part_max - row_max).exp()).sum(dim=0)
    losses = (row_max - part_target.amax(dim=0)) + row_sum.log()
    return row_max, row_sum, torch.where(labels == IGNORE_INDEX, 0.0, losses)


def write_gradient_(
    logits: Tensor,  # (C, Vp), overwritten with the gradient
    row_max: Tensor,  # (C,) float32, over the whole vocabulary
    row_sum: Tensor,  # (C,) float32, over the whole vocabulary
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    scale: Tensor,  # () float32
    *,
    start: int = 0,
) -> None:
    """Turn logits into `scale * (softmax - onehot)`, given what `combine_statistics` found."""
    if logits.shape[1] == 0:
        return
    if runs_on_triton(logits):
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.write_gradient_(logits, row_max, row_sum, labels, scale, start=start)
        return
    for rows in _blocks(logits):
        block = logits[rows]
        x = block.to(row_max.dtype)  # the block itself where that is its dtype
        x.sub_(row_max[rows].unsqueeze(1)).exp_()
        column, is_local = _target_column(labels[rows], start, x.shape[1])
        at_target = torch.where(is_local, -row_sum[rows], 0.0)
        x.scatter_add_(1, column.unsqueeze(1), at_target.unsqueeze(1))
        x.mul_((scale / row_sum[rows]).unsqueeze(1))
        x.masked_fill_((labels[rows] == IGNORE_INDEX).unsqueeze(1), 0)
        if x is not block:
            block.copy_(x)


def _target_column(labels: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column here, clamped into range, and whether it is here at all."""
    column = labels - start
    return column.clamp(0, num_columns - 1), (column >= 0) & (column < num_columns)


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, _CPU_BLOCK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]
