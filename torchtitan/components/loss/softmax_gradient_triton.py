"""The Triton kernels of softmax_gradient.py: one program per row of logits.

With both passes in one kernel a row is read twice and written once. The first pass keeps a running maximum and sum
(online softmax); the second reads the row again, mostly from the L2 cache since the rows in flight fit in it, and
stores the gradient over it.
Row offsets are 64-bit: T * V passes 2**31 in real runs. Exponentials are taken base 2, as the hardware does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtitan.components.loss.cross_entropy import IGNORE_INDEX

_LOG2E = tl.constexpr(1.4426950408889634)
# (block, warps), the fastest of eight on one H100 80GB with 4096 rows of 128256 bf16 logits: 0.87 ms for both passes
# together, against 0.70 ms of a bare copy, and 0.39 + 0.77 ms for the two passes apart
_BOTH_PASSES = {"BLOCK": 32768, "num_warps": 32}
_ONE_PASS = {"BLOCK": 16384, "num_warps": 16}


def loss_and_gradient_(logits: Tensor, labels: Tensor, scale: Tensor, losses: Tensor) -> None:
    _loss_and_gradient_kernel[(logits.shape[0],)](
        logits,
        labels,
        scale,
        losses,
        row_stride=logits.stride(0),
        num_columns=logits.shape[1],
        ignore_index=IGNORE_INDEX,
        **_BOTH_PASSES,
    )


def row_statistics(logits: Tensor, labels: Tensor, *, start: int) -> Tensor:
    statistics = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    _statistics_kernel[(logits.shape[0],)](
        logits,
        labels,
        statistics,
        row_stride=logits.stride(0),
        num_rows=logits.shape[0],
        num_columns=logits.shape[1],
        start=start,
        **_ONE_PASS,
    )
    return statistics


def write_gradient_(
    logits: Tensor, row_max: Tensor, row_sum: Tensor, labels: Tensor, scale: Tensor, *, start: int
) -> None:
    _gradient_kernel[(logits.shape[0],)](
        logits,
        row_max,
        row_sum,
        labels,
        scale,
        row_stride=logits.stride(0),
        num_columns=logits.shape[1],
        start=start,
        ignore_index=IGNORE_INDEX,
        **_ONE_PASS,
    )


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
def _row_max_and_sum(row, num_columns, BLOCK: tl.constexpr):
    """Maximum of a row and sum of exp(x - maximum), which is scaled to base 2 after the difference, not before."""
    row_max = -float("inf")
    row_sum = 0.0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < num_columns, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(x))
        row_sum = row_sum * tl.exp2((row_max - new_max) * _LOG2E) + tl.sum(tl.exp2((x - new_max) * _LOG2E))
        row_max = new_max
    return row_max, row_sum


@triton.jit
def _store_row_gradient(row, num_columns, row_max, row_sum, target, scale, BLOCK: tl.constexpr):
    """Overwrite a row of logits with scale * (softmax - onehot)."""
    factor = scale / row_sum
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < num_columns, other=0.0, eviction_policy="evict_first")
        e = tl.exp2((x.to(tl.float32) - row_max) * _LOG2E)
        gradient = tl.where(columns == target, e - row_sum, e) * factor
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def _store_row_zeros(row, num_columns, BLOCK: tl.constexpr):
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.zeros([BLOCK], row.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def _loss_and_gradient_kernel(
    logits, labels, scale, losses, row_stride, num_columns, ignore_index: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    target = tl.load(labels + index)
    if target == ignore_index:
        tl.store(losses + index, 0.0)
        _store_row_zeros(row, num_columns, BLOCK)
    else:
        # read before any program's thread overwrites it: the reductions of the first pass come between
        is_word = (target >= 0) & (target < num_columns)
        target_logit = tl.load(row + target, mask=is_word, other=-float("inf")).to(tl.float32)
        row_max, row_sum = _row_max_and_sum(row, num_columns, BLOCK)
        tl.store(losses + index, (row_max - target_logit) + tl.log(row_sum))
        _store_row_gradient(row, num_columns, row_max, row_sum, target, tl.load(scale), BLOCK)


@triton.jit
def _statistics_kernel(logits, labels, statistics, row_stride, num_rows, num_columns, start, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    column = tl.load(labels + index) - start
    is_local = (column >= 0) & (column < num_columns)
    target_logit = tl.load(row + column, mask=is_local, other=-float("inf")).to(tl.float32)
    row_max, row_sum = _row_max_and_sum(row, num_columns, BLOCK)
    tl.store(statistics + index, row_max)
    tl.store(statistics + num_rows + index, row_sum)
    tl.store(statistics + 2 * num_rows + index, target_logit)


@triton.jit
def _gradient_kernel(
    logits,
    row_max,
    row_sum,
    labels,
    scale,
    row_stride,
    num_columns,
    start,
    ignore_index: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    target = tl.load(labels + index)
    if target == ignore_index:
        _store_row_zeros(row, num_columns, BLOCK)
    else:
        maximum, total = tl.load(row_max + index), tl.load(row_sum + index)
        _store_row_gradient(row, num_columns, maximum, total, target - start, tl.load(scale), BLOCK)


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
