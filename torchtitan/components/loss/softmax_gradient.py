"""Statistics of rows of logits, what follows from them, and the gradient of the logits, in place.

Of a row of logits x, after bias and softcap (terms.py), with maximum m and s = sum(exp(x - m)):

    log p[y] = (x[y] - m) - log(s)
    entropy  = log(s) - sum(exp(x - m) * (x - m)) / s

m and log(s) are never added where their sum would be rounded to the size of m, and with it the loss of a token that the
model is sure of. Every gradient that is needed here has one form, with five numbers a row (`Coefficients`):

    g[j] = factor * (exp(x[j] - m) * (share + spread * (x[j] - m)) - target * (j == y) - smooth * c[j]) * dx/dz

In the plain loss factor is scale / s, share 1, target s, and the others 0. Statistics and gradient read the same
rounded logits; everything between is float32 (float64 for float64 logits), and the gradient is rounded once. Rows
labelled IGNORE_INDEX have the gradient 0, whatever is in them.

With the vocabulary sharded over ranks the work splits in two: `row_statistics` of this rank's columns, which the
caller combines over the ranks, then `write_gradient_`. On CUDA what reads logits is a Triton kernel
(softmax_gradient_triton.py); elsewhere the plain torch code below, which is also the kernels' reference.

Shapes: C rows of one chunk, Vp columns of the vocabulary on this rank, K statistics, 3 or 6 (terms.py).
"""

import torch
from torch import Tensor

from torchtitan.components.loss.gradients import runs_on_triton
from torchtitan.components.loss.terms import IGNORE_INDEX, Coefficients, Terms, get_loss_dtype

_CPU_BLOCK_BYTES = 4 << 20
"""Rows are taken in blocks of about this size on a CPU, so that all passes but the first read from the cache."""

MAX, SUM, TARGET, WEIGHTED, SPREAD, ARG_MAX = range(6)
"""The statistics: m; s; x[y], or -inf where another rank holds it; sum(c * x); sum(exp(x - m) * (x - m)); the first id
whose logit is m. The last three are there where terms.py asks for them."""


def statistics_and_gradient_(
    logits: Tensor,  # (C, V), overwritten with the gradient
    labels: Tensor,  # (C,) int64
    factors: Tensor,  # (C,) float32
    statistics: Tensor,  # (K, C) float32, written
    terms: Terms,
) -> None:
    """Turn logits into the gradient of `sum(factors * losses)` with respect to them."""
    if runs_on_triton(logits):
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.statistics_and_gradient_(logits, labels, factors, statistics, terms)
        return
    for rows in _blocks(logits):
        found = row_statistics(logits[rows], labels[rows], terms)
        coefficients = loss_coefficients(found, labels[rows], factors[rows], terms)
        write_gradient_(logits[rows], labels[rows], found[MAX], coefficients, terms)
        statistics[:, rows] = found


def row_statistics(
    logits: Tensor,  # (C, Vp)
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    terms: Terms,
) -> Tensor:  # (K, C) float32
    """The statistics of each row. Those of an ignored row are of no meaning."""
    if runs_on_triton(logits) and logits.shape[1] > 0:
        from torchtitan.components.loss import softmax_gradient_triton

        return softmax_gradient_triton.row_statistics(logits, labels, terms)
    dtype = get_loss_dtype(logits)
    statistics = logits.new_zeros(terms.num_statistics, logits.shape[0], dtype=dtype)
    statistics[MAX] = statistics[TARGET] = float("-inf")
    if logits.shape[1] == 0:  # more ranks than rows of the vocabulary
        return statistics
    class_weights = terms.local_class_weights(logits.shape[1])
    for rows in _blocks(logits):
        x = _transform(logits[rows], terms)
        column, is_local = _target_column(labels[rows], terms.start, x.shape[1])
        found = statistics[:, rows]
        if terms.outputs:
            found[MAX], arg_max = x.max(dim=1)
            found[ARG_MAX] = (arg_max + terms.start).to(dtype)
        else:
            found[MAX] = x.amax(dim=1)
        found[TARGET] = torch.where(is_local, x.gather(1, column.unsqueeze(1)).squeeze(1), float("-inf"))
        if terms.label_smoothing:
            found[WEIGHTED] = x.sum(dim=1) if class_weights is None else x @ class_weights
        x = x - found[MAX].unsqueeze(1)
        e = x.exp() if terms.outputs else x.exp_()
        found[SUM] = e.sum(dim=1)
        if terms.outputs:
            found[SPREAD] = torch.where(e > 0, x, 0.0).mul_(e).sum(dim=1)
    return statistics


def combine_statistics(parts: Tensor) -> Tensor:  # (n, K, C) -> (K, C)
    """The statistics of rows whose columns are in n parts."""
    row_max = parts[:, MAX].amax(dim=0)
    distance = torch.where(parts[:, SUM] > 0, parts[:, MAX] - row_max, 0.0)  # an empty part's maximum is -inf
    ratio = distance.exp()
    combined = [row_max, (parts[:, SUM] * ratio).sum(dim=0), parts[:, TARGET].amax(dim=0)]
    if parts.shape[1] > 3:
        spread = ((parts[:, SPREAD] + parts[:, SUM] * distance) * ratio).sum(dim=0)
        arg_max = torch.where(parts[:, MAX] == row_max, parts[:, ARG_MAX], float("inf")).amin(dim=0)
        combined += [parts[:, WEIGHTED].sum(dim=0), spread, arg_max]
    return torch.stack(combined)


def cross_entropies(statistics: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    """Of each row, (C,); 0 where it is ignored, infinite where the label is no word."""
    row_max, log_sum = statistics[MAX], statistics[SUM].log()
    losses = ((row_max - statistics[TARGET]) + log_sum) * terms.of_target(labels)
    if terms.label_smoothing:
        smoothed = terms.smoothed(statistics)
        uniform = terms.label_smoothing / terms.vocab_size
        losses = losses + ((row_max * smoothed - statistics[WEIGHTED] * uniform) + log_sum * smoothed)
    return torch.where(labels == IGNORE_INDEX, 0.0, losses)


def log_sum_exps(statistics: Tensor, labels: Tensor) -> Tensor:
    """Of each row, (C,); 0 where it is ignored."""
    return torch.where(labels == IGNORE_INDEX, 0.0, statistics[MAX] + statistics[SUM].log())


def entropies(statistics: Tensor, labels: Tensor) -> Tensor:
    """Of each row, (C,), in nats; 0 where it is ignored."""
    found = statistics[SUM].log() - statistics[SPREAD] / statistics[SUM]
    return torch.where(labels == IGNORE_INDEX, 0.0, found)


def loss_coefficients(statistics: Tensor, labels: Tensor, factors: Tensor, terms: Terms) -> Coefficients:
    """Of the gradient of `sum(factors * losses)`."""
    row_sum, target = statistics[SUM], terms.of_target(labels)
    coefficients = Coefficients(factor=factors / row_sum, target=target * row_sum)
    if not terms.has_share:
        return coefficients
    share = target + 2 * terms.z_loss * (statistics[MAX] + row_sum.log())
    if not terms.label_smoothing:
        return coefficients._replace(share=share)
    smooth = row_sum * (terms.label_smoothing / terms.vocab_size)
    return coefficients._replace(share=share + terms.smoothed(row_sum), smooth=smooth)


def log_probability_coefficients(
    statistics: Tensor,
    d_logprobs: Tensor,  # (C,)
    d_entropies: Tensor | None,  # (C,)
) -> Coefficients:
    """Of the gradient of `sum(d_logprobs * log p[y] + d_entropies * entropy)`."""
    row_sum = statistics[SUM]
    coefficients = Coefficients(1 / row_sum, target=-d_logprobs * row_sum, share=-d_logprobs)
    if d_entropies is None:
        return coefficients
    share = d_entropies * statistics[SPREAD] / row_sum - d_logprobs
    return coefficients._replace(share=share, spread=-d_entropies)


def write_gradient_(
    logits: Tensor,  # (C, Vp), overwritten with the gradient
    labels: Tensor,  # (C,) int64, ids of the whole vocabulary
    row_max: Tensor,  # (C,) float32, over the whole vocabulary
    coefficients: Coefficients,
    terms: Terms,
) -> None:
    """Turn logits into the gradient that the coefficients mean."""
    if logits.shape[1] == 0:
        return
    if runs_on_triton(logits):
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.write_gradient_(logits, labels, row_max, coefficients, terms)
        return
    class_weights = terms.local_class_weights(logits.shape[1])
    for rows in _blocks(logits):
        block = logits[rows]
        factor, target, share, smooth, spread = (None if c is None else c[rows].unsqueeze(1) for c in coefficients)
        assert factor is not None and target is not None
        x = _transform(block, terms)  # the block itself where that is its dtype, and nothing else changes it
        slope = 1 - (x / terms.softcap) ** 2 if terms.softcap else None
        x.sub_(row_max[rows].unsqueeze(1))
        g = x.exp_() if spread is None else x.exp()
        if share is not None:
            g.mul_(share if spread is None else torch.where(g > 0, x, 0.0).mul_(spread).add_(share))
        column, is_local = _target_column(labels[rows], terms.start, x.shape[1])
        g.scatter_add_(1, column.unsqueeze(1), torch.where(is_local.unsqueeze(1), -target, 0.0))
        if smooth is not None:
            g.sub_(smooth if class_weights is None else smooth * class_weights)
        g.mul_(factor)
        if slope is not None:
            g.mul_(slope)
        g.masked_fill_((labels[rows] == IGNORE_INDEX).unsqueeze(1), 0)
        if g is not block:
            block.copy_(g)


def _transform(logits: Tensor, terms: Terms) -> Tensor:
    """In the dtype of the loss, with bias and softcap; the logits themselves where nothing changes them."""
    x = logits.to(get_loss_dtype(logits))
    if terms.bias is not None:
        x = x + terms.bias
    return torch.tanh(x / terms.softcap) * terms.softcap if terms.softcap else x


def _target_column(labels: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column here, clamped into range, and whether it is here at all."""
    column = labels - start
    return column.clamp(0, num_columns - 1), (column >= 0) & (column < num_columns)


def _blocks(logits: Tensor) -> list[slice]:
    rows = max(1, _CPU_BLOCK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]
