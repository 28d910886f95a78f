"""The Triton kernels of softmax_gradient.py: one program per row of logits, or per tile where they lie transposed.

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
# of transposed logits: 0.41 ms for the statistics of 128256 rows and 4096 columns, 0.89 ms for the gradient
_STATISTICS_TILE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
_GRADIENT_TILE = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}
_ROWS_PER_PART = 4096


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


def write_gradient_(logits: Tensor, lse: Tensor, labels: Tensor, scale: Tensor, *, start: int) -> None:
    _gradient_kernel[(logits.shape[0],)](
        logits,
        lse,
        labels,
        scale,
        row_stride=logits.stride(0),
        num_columns=logits.shape[1],
        start=start,
        ignore_index=IGNORE_INDEX,
        **_ONE_PASS,
    )


def column_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    num_rows, num_columns = logits.shape
    num_parts = triton.cdiv(num_rows, _ROWS_PER_PART)
    statistics = torch.empty(num_parts, 3, num_columns, dtype=torch.float32, device=logits.device)
    _column_statistics_kernel[(triton.cdiv(num_columns, _STATISTICS_TILE["COLUMNS"]), num_parts)](
        logits,
        labels,
        statistics,
        row_stride=logits.stride(0),
        num_rows=num_rows,
        num_columns=num_columns,
        rows_per_part=_ROWS_PER_PART,
        **_STATISTICS_TILE,
    )
    return statistics


def write_column_gradient_(logits: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> None:
    num_rows, num_columns = logits.shape
    tile_rows, tile_columns = _GRADIENT_TILE["ROWS"], _GRADIENT_TILE["COLUMNS"]
    _column_gradient_kernel[(triton.cdiv(num_rows, tile_rows), triton.cdiv(num_columns, tile_columns))](
        logits,
        lse,
        labels,
        scale,
        row_stride=logits.stride(0),
        num_rows=num_rows,
        num_columns=num_columns,
        ignore_index=IGNORE_INDEX,
        **_GRADIENT_TILE,
    )


def multiply_unless_one_(tensor: Tensor, factor: Tensor) -> None:
    """`tensor *= factor` for a contiguous tensor and a 0-dim factor on the device; costs nothing when it is 1."""
    block = 4096
    num_programs = min(triton.cdiv(tensor.numel(), block), 4 * _num_multiprocessors(tensor.device))
    if num_programs:
        _multiply_kernel[(num_programs,)](tensor, factor, tensor.numel(), BLOCK=block, num_warps=8)


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _row_max_and_sum(row, num_columns, BLOCK: tl.constexpr):
    """Maximum of a row times log2(e), and the sum of 2**(x * log2(e) - that)."""
    row_max = -float("inf")
    row_sum = 0.0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < num_columns, other=-float("inf"), eviction_policy="evict_last")
        x = x.to(tl.float32) * _LOG2E
        new_max = tl.maximum(row_max, tl.max(x))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(x - new_max))
        row_max = new_max
    return row_max, row_sum


@triton.jit
def _store_row_gradient(row, num_columns, lse2, target, scale, BLOCK: tl.constexpr):
    """Overwrite a row of logits with scale * (softmax - onehot); lse2 is the logsumexp times log2(e)."""
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < num_columns, other=0.0, eviction_policy="evict_first")
        p = tl.exp2(x.to(tl.float32) * _LOG2E - lse2)
        gradient = tl.where(columns == target, p - 1.0, p) * scale
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
        lse2 = row_max + tl.log2(row_sum)
        tl.store(losses + index, lse2 / _LOG2E - target_logit)
        _store_row_gradient(row, num_columns, lse2, target, tl.load(scale), BLOCK)


@triton.jit
def _statistics_kernel(logits, labels, statistics, row_stride, num_rows, num_columns, start, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    column = tl.load(labels + index) - start
    is_local = (column >= 0) & (column < num_columns)
    target_logit = tl.load(row + column, mask=is_local, other=-float("inf")).to(tl.float32)
    row_max, row_sum = _row_max_and_sum(row, num_columns, BLOCK)
    tl.store(statistics + index, row_max / _LOG2E)
    tl.store(statistics + num_rows + index, row_sum)
    tl.store(statistics + 2 * num_rows + index, target_logit)


@triton.jit
def _gradient_kernel(
    logits, lse, labels, scale, row_stride, num_columns, start, ignore_index: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    target = tl.load(labels + index)
    if target == ignore_index:
        _store_row_zeros(row, num_columns, BLOCK)
    else:
        lse2 = tl.load(lse + index) * _LOG2E
        _store_row_gradient(row, num_columns, lse2, target - start, tl.load(scale), BLOCK)


@triton.jit
def _column_statistics_kernel(
    logits,
    labels,
    statistics,
    row_stride,
    num_rows,
    num_columns,
    rows_per_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For the columns of one tile and the rows of one part: maximum, sum of exponentials, target's logit."""
    part = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    # a maximum and a sum for each element of the tile: a reduction over its rows in each step would be thrice as slow
    tile_max = tl.full([ROWS, COLUMNS], -float("inf"), tl.float32)
    tile_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_row = part * rows_per_part
    for first in range(0, rows_per_part, ROWS):
        rows = first_row + first + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & is_column[None, :]
        x = tl.load(logits + rows[:, None] * row_stride + columns[None, :], mask=mask, other=-float("inf"))
        x = x.to(tl.float32) * _LOG2E
        new_max = tl.maximum(tile_max, x)
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # of places beyond the last row or column
        tile_sum = tile_sum * tl.exp2(tile_max - safe_max) + tl.exp2(x - safe_max)
        tile_max = new_max
    column_max = tl.max(tile_max, axis=0)
    safe_max = tl.where(column_max == -float("inf"), 0.0, column_max)
    column_sum = tl.sum(tile_sum * tl.exp2(tile_max - safe_max[None, :]), axis=0)
    target = tl.load(labels + columns, mask=is_column, other=-1)
    is_here = (target >= first_row) & (target < tl.minimum(first_row + rows_per_part, num_rows))
    place = logits + target * row_stride + columns
    target_logit = tl.load(place, mask=is_here, other=-float("inf")).to(tl.float32)
    out = statistics + part * 3 * num_columns + columns
    tl.store(out, column_max / _LOG2E, mask=is_column)
    tl.store(out + num_columns, column_sum, mask=is_column)
    tl.store(out + 2 * num_columns, target_logit, mask=is_column)


@triton.jit
def _column_gradient_kernel(
    logits,
    lse,
    labels,
    scale,
    row_stride,
    num_rows,
    num_columns,
    ignore_index: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    target = tl.load(labels + columns, mask=is_column, other=ignore_index)
    lse2 = tl.load(lse + columns, mask=is_column, other=0.0) * _LOG2E
    column_scale = tl.where(target == ignore_index, 0.0, tl.load(scale))
    mask = (rows < num_rows)[:, None] & is_column[None, :]
    place = logits + rows[:, None] * row_stride + columns[None, :]
    p = tl.exp2(tl.load(place, mask=mask, other=0.0).to(tl.float32) * _LOG2E - lse2[None, :])
    gradient = tl.where(rows[:, None] == target[None, :], p - 1.0, p) * column_scale[None, :]
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=mask)


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
            tl.store(tensor + index, (x.to(tl.float32) * value).to(x.dtype), mask=mask)
