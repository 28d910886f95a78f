"""The Triton kernels of softmax_gradient.py: one program per row of logits.

With both passes in one kernel a row is read twice and written once. The first pass keeps a running maximum and sum
(online softmax); the second reads the row again, mostly from the L2 cache since the rows in flight fit in it, and
stores the gradient over it.
Row offsets are 64-bit: T * V passes 2**31 in real runs. Exponentials are taken base 2, as the hardware does.
What terms.py has off is left out when a kernel is compiled: pointers that are None, numbers whose flag is false.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtitan.components.loss.terms import IGNORE_INDEX, Coefficients, Terms

_LOG2E = tl.constexpr(1.4426950408889634)
_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
# (block, warps), the fastest of seven on one H100 80GB with 4096 rows of 128256 bf16 logits: 0.84 ms for both passes
# together, against 0.70 ms of a bare copy. With a softcap, whose tanh takes registers, 1.24 ms (1.26 with z-loss, token
# weights and outputs). Apart: the statistics 0.36 ms (0.44 with entropy and arg max), the gradient 0.80.
_BOTH_PASSES = {"BLOCK": 32768, "num_warps": 32}
_WITH_SOFTCAP = {"BLOCK": 2048, "num_warps": 4}
_ONE_PASS = {"BLOCK": 16384, "num_warps": 16}


def statistics_and_gradient_(logits: Tensor, labels: Tensor, factors: Tensor, statistics: Tensor, terms: Terms) -> None:
    _statistics_and_gradient_kernel[(logits.shape[0],)](
        logits,
        labels,
        factors,
        statistics,
        terms.smoothed(factors) if terms.label_smoothing else None,
        row_stride=logits.stride(0),
        factor_stride=factors.stride(0),
        statistic_stride=statistics.stride(0),
        num_columns=logits.shape[1],
        z_loss=terms.z_loss,
        label_smoothing=terms.label_smoothing,
        HAS_SHARE=terms.has_share,
        **_of_terms(terms, logits.shape[1]),
        **_wanted(terms),
        **(_WITH_SOFTCAP if terms.softcap else _BOTH_PASSES),
    )


def row_statistics(logits: Tensor, labels: Tensor, terms: Terms) -> Tensor:
    statistics = torch.empty(terms.num_statistics, logits.shape[0], dtype=torch.float32, device=logits.device)
    _statistics_kernel[(logits.shape[0],)](
        logits,
        labels,
        statistics,
        row_stride=logits.stride(0),
        statistic_stride=statistics.stride(0),
        num_columns=logits.shape[1],
        start=terms.start,
        **_of_terms(terms, logits.shape[1]),
        **_wanted(terms),
        **_ONE_PASS,
    )
    return statistics


def write_gradient_(logits: Tensor, labels: Tensor, row_max: Tensor, coefficients: Coefficients, terms: Terms) -> None:
    _gradient_kernel[(logits.shape[0],)](
        logits,
        labels,
        row_max.contiguous(),
        *(None if c is None else c.contiguous() for c in coefficients),
        row_stride=logits.stride(0),
        num_columns=logits.shape[1],
        start=terms.start,
        **_of_terms(terms, logits.shape[1]),
        **_ONE_PASS,
    )


def _of_terms(terms: Terms, num_columns: int) -> dict[str, Any]:
    return {
        "bias": terms.bias,
        "class_weights": terms.local_class_weights(num_columns),
        "softcap": terms.softcap,
        "HAS_SOFTCAP": terms.softcap > 0,
    }


def _wanted(terms: Terms) -> dict[str, bool]:
    return {"SMOOTHING": terms.label_smoothing > 0, "OUTPUTS": terms.outputs}


def multiply_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """`tensor *= factor` for a contiguous tensor and a 0-dim factor on the device; costs nothing when it is 1.

    What is 0 stays 0, also where the factor is inf or nan.
    """
    block = 4096
    num_programs = min(triton.cdiv(tensor.numel(), block), 4 * _num_multiprocessors(tensor.device))
    if num_programs:
        _multiply_kernel[(num_programs,)](tensor, factor, tensor.numel(), BLOCK=block, num_warps=8)


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _load_logits(row, columns, mask, bias, softcap, HAS_SOFTCAP: tl.constexpr, POLICY: tl.constexpr):
    """In float32, with bias and softcap; -inf past the row's end."""
    x = tl.load(row + columns, mask=mask, other=-float("inf"), eviction_policy=POLICY).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        tanh = 1 - 2 / (tl.exp2(x * (2 * _LOG2E / softcap)) + 1)
        x = tl.where(mask, softcap * tanh, -float("inf"))
    return x


@triton.jit
def _row_statistics(
    row,
    bias,
    class_weights,
    softcap,
    num_columns,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, sum of exp(x - maximum), which is scaled to base 2 after the difference, not before, and the rest."""
    row_max = -float("inf")
    row_sum = 0.0
    weighted = 0.0
    spread = 0.0
    arg_max = 0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < num_columns
        x = _load_logits(row, columns, mask, bias, softcap, HAS_SOFTCAP, "evict_last")
        new_max = tl.maximum(row_max, tl.max(x))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # words may be excluded by a bias of -inf
        ratio = tl.exp2((row_max - base) * _LOG2E)
        e = tl.exp2((x - base) * _LOG2E)
        if SMOOTHING:
            c = x
            if class_weights is not None:
                c *= tl.load(class_weights + columns, mask=mask, other=0.0)
            weighted += tl.sum(tl.where(mask, c, 0.0))
        if OUTPUTS:
            moved = tl.where(row_sum > 0, (spread + row_sum * (row_max - base)) * ratio, 0.0)
            spread = moved + tl.sum(tl.where(e > 0, (x - base) * e, 0.0))
            first_of_max = tl.min(tl.where(x == new_max, columns, 2147483647))
            arg_max = tl.where(new_max > row_max, first_of_max, arg_max)
        row_sum = row_sum * ratio + tl.sum(e)
        row_max = new_max
    return row_max, row_sum, weighted, spread, arg_max


@triton.jit
def _store_statistics(
    to, stride, row_max, row_sum, target, weighted, spread, arg_max, SMOOTHING: tl.constexpr, OUTPUTS: tl.constexpr
):
    tl.store(to, row_max)
    tl.store(to + stride, row_sum)
    tl.store(to + 2 * stride, target)
    if SMOOTHING or OUTPUTS:
        tl.store(to + 3 * stride, weighted)
        tl.store(to + 4 * stride, spread)
        tl.store(to + 5 * stride, arg_max)


@triton.jit
def _store_row_gradient(
    row,
    bias,
    class_weights,
    softcap,
    num_columns,
    row_max,
    column_of_target,
    factor,
    target,
    share,
    smooth,
    spread,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite a row of logits with their gradient; the numbers are those of softmax_gradient.Coefficients."""
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < num_columns
        x = _load_logits(row, columns, mask, bias, softcap, HAS_SOFTCAP, "evict_first")
        g = tl.exp2((x - row_max) * _LOG2E)
        if spread is not None:
            g *= share + spread * tl.where(g > 0, x - row_max, 0.0)
        elif share is not None:
            g *= share
        g = tl.where(columns == column_of_target, g - target, g)
        if smooth is not None:
            if class_weights is not None:
                g -= smooth * tl.load(class_weights + columns, mask=mask, other=0.0)
            else:
                g -= smooth
        g *= factor
        if HAS_SOFTCAP:
            y = x * (1 / softcap)
            g *= 1 - y * y
        tl.store(row + columns, g.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _store_row_zeros(row, num_columns, BLOCK: tl.constexpr):
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.zeros([BLOCK], row.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def _statistics_and_gradient_kernel(
    logits,
    labels,
    factors,
    statistics,
    smoothed,
    bias,
    class_weights,
    softcap,
    z_loss,
    label_smoothing,
    row_stride,
    factor_stride,
    statistic_stride,
    num_columns,
    HAS_SHARE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    word = tl.load(labels + index)
    if word == _IGNORE_INDEX:
        _store_statistics(statistics + index, statistic_stride, 0.0, 1.0, 0.0, 0.0, 0.0, 0, SMOOTHING, OUTPUTS)
        _store_row_zeros(row, num_columns, BLOCK)
    else:
        # read before any program's thread overwrites it: the reductions of the first pass come between
        is_word = (word >= 0) & (word < num_columns)
        logit = _load_logits(row, word, is_word, bias, softcap, HAS_SOFTCAP, "")
        row_max, row_sum, weighted, spread, arg_max = _row_statistics(
            row, bias, class_weights, softcap, num_columns, HAS_SOFTCAP, SMOOTHING, OUTPUTS, BLOCK
        )
        _store_statistics(
            statistics + index, statistic_stride, row_max, row_sum, logit, weighted, spread, arg_max, SMOOTHING, OUTPUTS
        )
        factor = tl.load(factors + index * factor_stride) / row_sum
        target = row_sum
        share = None
        smooth = None
        if HAS_SHARE:
            share = 1.0
            if class_weights is not None:
                share = tl.load(class_weights + word, mask=is_word, other=1.0)
            if SMOOTHING:
                share *= 1 - label_smoothing
                smooth = row_sum * (label_smoothing / num_columns)
            target = share * row_sum
            share += 2 * z_loss * (row_max + tl.log(row_sum))
            if SMOOTHING:
                share += tl.load(smoothed)
        _store_row_gradient(
            row,
            bias,
            class_weights,
            softcap,
            num_columns,
            row_max,
            word,
            factor,
            target,
            share,
            smooth,
            None,
            HAS_SOFTCAP,
            BLOCK,
        )


@triton.jit
def _statistics_kernel(
    logits,
    labels,
    statistics,
    bias,
    class_weights,
    softcap,
    row_stride,
    statistic_stride,
    num_columns,
    start,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    word = tl.load(labels + index)
    if word == _IGNORE_INDEX:
        _store_statistics(statistics + index, statistic_stride, 0.0, 1.0, 0.0, 0.0, 0.0, 0, SMOOTHING, OUTPUTS)
    else:
        column = word - start
        is_local = (column >= 0) & (column < num_columns)
        logit = _load_logits(row, column, is_local, bias, softcap, HAS_SOFTCAP, "")
        row_max, row_sum, weighted, spread, arg_max = _row_statistics(
            row, bias, class_weights, softcap, num_columns, HAS_SOFTCAP, SMOOTHING, OUTPUTS, BLOCK
        )
        _store_statistics(
            statistics + index,
            statistic_stride,
            row_max,
            row_sum,
            logit,
            weighted,
            spread,
            arg_max + start,
            SMOOTHING,
            OUTPUTS,
        )


@triton.jit
def _gradient_kernel(
    logits,
    labels,
    row_max,
    factor,
    target,
    share,
    smooth,
    spread,
    bias,
    class_weights,
    softcap,
    row_stride,
    num_columns,
    start,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    word = tl.load(labels + index)
    if word == _IGNORE_INDEX:
        _store_row_zeros(row, num_columns, BLOCK)
    else:
        _store_row_gradient(
            row,
            bias,
            class_weights,
            softcap,
            num_columns,
            tl.load(row_max + index),
            word - start,
            tl.load(factor + index),
            tl.load(target + index),
            None if share is None else tl.load(share + index),
            None if smooth is None else tl.load(smooth + index),
            None if spread is None else tl.load(spread + index),
            HAS_SOFTCAP,
            BLOCK,
        )


@triton.jit
def _multiply_kernel(tensor, factor, num_elements, BLOCK: tl.constexpr):
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for offset in range(first, num_elements, step):
            index = offset + tl.arange(0, BLOCK)
            mask = index < num_elements
            x = tl.load(tensor + index, mask=mask)
            product = (x.to(tl.float32) * value).to(x.dtype)
            tl.store(tensor + index, tl.where(x == 0, x, product), mask=mask)
