"""In-tree fused linear cross entropy: the loss of hidden states without the (T, V) logits.

Shapes: T tokens, D model dim, V vocabulary, Vp this rank's rows of it, C tokens of one chunk, n ranks.

For each chunk of tokens, all in the forward pass:

    Z  = H W^T                     (C, Vp)  one buffer, reused, in the dtype of H; float32 inside the product
    G  = scale * (softmax(Z) - Y)  in place over Z (softmax_gradient.py), float32 inside
    dH = G W                       (C, D)   written once
    dW = dW + G^T H                (Vp, D)  the first chunk writes, the others add, in W's dtype or float32

Three matrix products, 6 T Vp D operations, none recomputed. Backward hands out dH and dW, times the upstream
gradient: on a GPU a kernel that returns at once when that is 1, so nothing waits for the host.

Memory beside dH and dW, in bytes of bf16: standard cross entropy, run eagerly, holds 2 T V of logits and 8 T V or more
of float32 softmax and gradient; this holds 2 C Vp, where C comes from a memory budget (chunking.py). For Llama 3 8B and
8192 tokens that is 1002 MiB of one chunk instead of 10958 (docs/performance.md). Each further chunk costs a read and a
write of dW.

A budget of less than 2048 rows makes chunks so small that a GPU spends much of its time on dW; then the first D tokens
are computed in dW's own memory (in_place.py). Below 320 rows even a fourth product costs less: what is left goes over
slices of the vocabulary, with the logits computed twice (vocab_slices.py).

Vocabulary sharded over n ranks (tensor parallel): H is gathered by the caller (vocab_shard.py), each rank computes
its own columns, and per chunk one all-gather of 3 float32 a token (12 C bytes a rank) combines maximum, sum and target
logit. The gather of one chunk runs beside the next chunk's product, so that two logits buffers share the budget.
dH is then a partial sum, which the caller's DTensor reduce-scatters once; dW needs no communication.

Liger's implementation differs in its chunk size (see liger.py), in its host syncs, and in knowing no sharded
vocabulary.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.components.loss.chunking import plan_chunks, rows_in_budget
from torchtitan.components.loss.gradient_sum import WeightGradient
from torchtitan.components.loss.in_place import fill_in_place
from torchtitan.components.loss.softmax_gradient import (
    combine_statistics,
    loss_and_gradient_,
    row_statistics,
    write_gradient_,
)
from torchtitan.components.loss.vocab_shard import VocabShard, gather_hidden_local_weight
from torchtitan.components.loss.vocab_slices import fill_by_vocab_slices
from torchtitan.protocols.model import OutputHead

collectives = torch.ops._c10d_functional  # the operations below torch.distributed

_CPU_BUDGET_BYTES = 32 << 20
"""On a CPU larger chunks are slower, since they leave the cache: a larger budget is not used."""


_FEW_ROWS = 2048
"""Below this many rows a chunk, the first tokens are computed in the weight gradient's memory (in_place.py)."""

_VERY_FEW_ROWS = 320
"""Below this many, the other tokens go over slices of the vocabulary (vocab_slices.py)."""


class FusedLinearCrossEntropyLoss:
    """The in-tree loss behind the contract of all losses (`loss(hidden, head, labels, scale)`)."""

    def __init__(self, *, budget_bytes: int, accum_dtype: torch.dtype | None = None) -> None:
        self._loss = partial(_loss_of_local_rows, budget_bytes=budget_bytes, accum_dtype=accum_dtype)

    def __call__(
        self,
        hidden: Tensor,  # (B, S, D)
        head: OutputHead,
        labels: Tensor,  # (B, S) int64
        scale: Tensor,  # () float32
    ) -> Tensor:
        return head.with_weight(partial(self._loss, labels=labels, scale=scale), hidden)


def _loss_of_local_rows(hidden: Tensor, weight: Tensor, *, labels: Tensor, scale: Tensor, **options: Any) -> Tensor:
    hidden, weight, shard = gather_hidden_local_weight(hidden, weight)
    return fused_linear_cross_entropy(hidden, weight, labels, scale=scale, shard=shard, **options)


def fused_linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (Vp, D)
    labels: Tensor,  # (...) int64, ids of the whole vocabulary
    *,
    scale: Tensor | float = 1.0,
    budget_bytes: int = 1 << 30,
    accum_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """`scale * sum of cross entropies` of `hidden @ weight.T`, () float32, without materialising those logits.

    Args:
        scale: a number, or a 0-dim tensor on the device, which is not read by the host. It gets no gradient. In float16
            a loss scaler's factor belongs into it: the gradients are rounded with `scale` inside.
        budget_bytes: memory for the logits of one chunk.
        accum_dtype: dtype of the weight gradient's sum over chunks; None is the weight's own.
        shard: which rows of the vocabulary `weight` holds; None means all. Each rank of its group must pass the same
            hidden states and labels; the hidden gradient is this rank's partial sum.

    Tokens labelled -100 are ignored; if all are, the loss is 0 and so are the gradients. Any other label outside the
    vocabulary makes the loss infinite: to raise an error, the host would have to wait for the device.

    There is one backward, and no second derivative; torch.func's transforms do not know the function.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if isinstance(weight, DTensor):
        raise ValueError("the weight is sharded: gather it, or call the loss through OutputHead.with_weight")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1] or weight.ndim != 2:
        raise ValueError(
            "expected hidden (..., D), weight (V, D) and labels (...), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if isinstance(scale, Tensor):
        scale = scale.to(hidden.device, torch.float32)
    else:
        scale = torch.full((), scale, device=hidden.device)
    if scale.ndim != 0:
        raise ValueError(f"scale must be a number or a 0-dim tensor, got the shape {tuple(scale.shape)}")
    if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same
        hidden, weight = hidden.detach(), weight.detach()
    # copies only where they are not contiguous
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]).contiguous(), labels.reshape(-1).contiguous()
    options = _Options(budget_bytes, accum_dtype or weight.dtype, shard)
    return _FusedLinearCrossEntropy.apply(hidden, weight, labels, scale, options)


@dataclass(frozen=True)
class _Options:
    budget_bytes: int
    accum_dtype: torch.dtype
    shard: VocabShard | None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (Vp, D)
        labels: Tensor,  # (T,)
        scale: Tensor,  # ()
        options: _Options,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = WeightGradient(weight, options.accum_dtype) if needs_weight else None
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        # Triton launches on the current device
        with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
            for tokens, fill in _ways_by_tokens(hidden, weight, options, needs_weight=needs_weight):
                fill(
                    hidden[tokens],
                    weight,
                    labels[tokens],
                    scale,
                    losses=losses[tokens],
                    d_hidden=d_hidden[tokens] if d_hidden is not None else None,
                    d_weight=d_weight,
                    budget_bytes=options.budget_bytes,
                )
        ctx.save_for_backward(d_hidden, d_weight.finish() if d_weight is not None else None)
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # by create_graph=True: what was computed in forward has no graph
            raise RuntimeError("the fused linear cross entropy has no second derivative: leave create_graph off")
        d_hidden, d_weight = ctx.saved_tensors
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                _multiply_(gradient, grad_loss)
        return d_hidden, d_weight, None, None, None


class _Fill(Protocol):
    """A way to compute the token losses and both gradients of `scale * sum(losses)`, for some of the tokens."""

    def __call__(
        self,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (Vp, D)
        labels: Tensor,  # (T,)
        scale: Tensor,  # ()
        *,
        losses: Tensor,  # (T,) float32, written
        d_hidden: Tensor | None,  # (T, D), written
        d_weight: WeightGradient | None,  # (Vp, D), added to
        budget_bytes: int,
    ) -> None: ...


def _ways_by_tokens(
    hidden: Tensor, weight: Tensor, options: _Options, *, needs_weight: bool
) -> list[tuple[slice, _Fill]]:
    """How each token is computed: in chunks, unless a GPU has a better way. Only ways with tokens are named."""
    num_tokens, dim = hidden.shape
    by_chunks: _Fill = partial(_fill_by_chunks, shard=options.shard)
    num_in_place, otherwise = 0, by_chunks
    if hidden.is_cuda and needs_weight and options.shard is None:
        logit_bytes = hidden.element_size()
        max_rows = rows_in_budget(options.budget_bytes, vocab_rows=weight.shape[0], bytes_per_logit=logit_bytes)
        if options.accum_dtype == hidden.dtype and max_rows < min(_FEW_ROWS, num_tokens):
            num_in_place = min(num_tokens, dim)
        if max_rows < min(_VERY_FEW_ROWS, num_tokens - num_in_place):
            otherwise = fill_by_vocab_slices
    ways = [(slice(0, num_in_place), fill_in_place), (slice(num_in_place, num_tokens), otherwise)]
    return [(tokens, fill) for tokens, fill in ways if tokens.start < tokens.stop]


def _fill_by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    losses: Tensor,
    d_hidden: Tensor | None,
    d_weight: WeightGradient | None,
    budget_bytes: int,
    shard: VocabShard | None,
) -> None:
    needs_gradient = d_hidden is not None or d_weight is not None
    for rows, gradient in _chunk_gradients(
        hidden, weight, labels, scale, losses, budget_bytes, shard, needs_gradient=needs_gradient
    ):
        if d_hidden is not None:
            torch.mm(gradient, weight, out=d_hidden[rows])
        if d_weight is not None:
            d_weight.add(gradient, hidden[rows])


def _chunk_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    losses: Tensor,
    budget_bytes: int,
    shard: VocabShard | None,
    *,
    needs_gradient: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, gradient of their logits) chunk by chunk, and fill `losses`. Yields nothing without a gradient.

    The gradient lies in a buffer that the next steps overwrite.
    """
    num_tokens, vocab_rows = hidden.shape[0], weight.shape[0]
    chunk, num_buffers = plan_chunks(
        num_tokens,
        vocab_rows=vocab_rows if shard is None else shard.rows_per_rank,
        bytes_per_logit=hidden.element_size(),
        budget_bytes=budget_bytes if hidden.is_cuda else min(budget_bytes, _CPU_BUDGET_BYTES),
        is_sharded=shard is not None,
    )
    chunks = [slice(first, min(first + chunk, num_tokens)) for first in range(0, num_tokens, chunk)]
    buffers = hidden.new_empty(num_buffers, chunk, vocab_rows)

    def logits_of(i: int) -> Tensor:
        rows = chunks[i]
        return torch.mm(hidden[rows], weight.t(), out=buffers[i % num_buffers, : rows.stop - rows.start])

    if shard is None and needs_gradient:
        for i, rows in enumerate(chunks):
            logits = logits_of(i)
            loss_and_gradient_(logits, labels[rows], scale, losses[rows])
            yield rows, logits
        return

    start = shard.start if shard is not None else 0
    pending: _PendingStatistics | None = None
    for i in range(len(chunks) + 1):
        upcoming = None
        if i < len(chunks):  # the next chunk's product hides the reduction that is under way
            logits = logits_of(i)
            statistics = row_statistics(logits, labels[chunks[i]], start=start)
            upcoming = _PendingStatistics(chunks[i], logits, statistics, shard)
        if pending is not None:
            rows = pending.rows
            lse, losses[rows] = combine_statistics(pending.wait(), labels[rows])
            if needs_gradient:
                write_gradient_(pending.logits, lse, labels[rows], scale, start=start)
                yield rows, pending.logits
        pending = upcoming


class _PendingStatistics:
    """A chunk whose row statistics are on their way to the other ranks."""

    def __init__(self, rows: slice, logits: Tensor, statistics: Tensor, shard: VocabShard | None) -> None:
        self.rows, self.logits, self._shard = rows, logits, shard
        self._joined = statistics  # (3 * n, C) of n ranks; without a shard one part holds the whole vocabulary
        if shard is not None:
            self._joined = collectives.all_gather_into_tensor(statistics, shard.group.size(), shard.group.group_name)

    def wait(self) -> Tensor:  # (n, 3, C)
        if self._shard is not None:
            collectives.wait_tensor(self._joined)
        return self._joined.unflatten(0, (-1, 3))


def _multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a 0-dim device tensor without reading it on the host; free when it is 1."""
    if gradient.is_cuda:
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.multiply_unless_one_(gradient, factor)
    elif factor != 1:
        gradient.mul_(factor)
    # The gradient is given away: count that as a change, so that a second backward is refused, and does not change it.
    torch.autograd.graph.increment_version(gradient)
