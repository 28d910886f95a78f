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
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.components.loss.chunking import plan_chunks
from torchtitan.components.loss.cross_entropy import get_loss_dtype
from torchtitan.components.loss.gradients import OneBackward, add_product_, multiply_
from torchtitan.components.loss.softmax_gradient import (
    combine_statistics,
    loss_and_gradient_,
    row_statistics,
    write_gradient_,
)
from torchtitan.components.loss.vocab_shard import VocabShard, gather_hidden_local_weight
from torchtitan.protocols.model import OutputHead

collectives = torch.ops._c10d_functional  # the operations below torch.distributed

_CPU_BUDGET_BYTES = 32 << 20
"""On a CPU larger chunks are slower, since they leave the cache: a larger budget is not used."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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

    There is one backward, and no second derivative. float64 is computed in float64, and gives a float64 loss.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or are none that the loss can be computed with.
        RuntimeError: a second backward, create_graph, or one of torch.func's transforms.
    """
    _check(hidden, weight, labels)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=get_loss_dtype(hidden), device=hidden.device)
    if scale.ndim != 0:
        raise ValueError(f"scale must be a number or a 0-dim tensor, got the shape {tuple(scale.shape)}")
    scale = scale.to(hidden.device, get_loss_dtype(hidden))
    if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same
        hidden, weight = hidden.detach(), weight.detach()
    # copies only where they are not contiguous
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]).contiguous(), labels.reshape(-1).contiguous()
    accum_dtype = torch.promote_types(accum_dtype or weight.dtype, weight.dtype)
    options = _Options(budget_bytes, accum_dtype, shard)
    return OneBackward.apply(_FusedLinearCrossEntropy.apply(hidden, weight, labels, scale, options))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func's transforms (vmap, grad, jvp, ...) do not know the fused linear cross entropy: "
            "use torch.autograd and a batch dim of the hidden states, or cross_entropy_sum of the logits"
        )
    if isinstance(weight, DTensor):
        raise ValueError("the weight is sharded: gather it, or call the loss through OutputHead.with_weight")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1] or weight.ndim != 2:
        raise ValueError(
            "expected hidden (..., D), weight (V, D) and labels (...), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            "hidden and weight must have one dtype, bfloat16, float16, float32 or float64,"
            f" got {hidden.dtype} and {weight.dtype}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if not hidden.device == weight.device == labels.device:
        devices = f"{hidden.device}, {weight.device} and {labels.device}"
        raise ValueError(f"hidden, weight and labels must be on one device, got {devices}")


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
        losses = scale.new_empty(hidden.shape[0])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = weight.new_empty(weight.shape, dtype=options.accum_dtype) if needs_weight else None
        # Triton launches on the current device
        with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
            _fill(hidden, weight, labels, scale, options, losses, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype) if d_weight is not None else None)
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        gradients = ctx.saved_tensors  # in memory of ours: OneBackward refuses to come here twice
        for gradient in gradients:
            if gradient is not None:
                multiply_(gradient, grad_loss)
        return *gradients, None, None, None


def _fill(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    options: _Options,
    losses: Tensor,  # (T,) float32
    d_hidden: Tensor | None,  # (T, D)
    d_weight: Tensor | None,  # (Vp, D)
) -> None:
    """Write the token losses and the gradients of `scale * sum(losses)`. No logits outlive it."""
    if d_weight is not None and len(hidden) == 0:
        d_weight.zero_()  # there is no first chunk to write it
    needs_gradient = d_hidden is not None or d_weight is not None
    for rows, gradient in _chunk_gradients(
        hidden, weight, labels, scale, options, losses, needs_gradient=needs_gradient
    ):
        if d_hidden is not None:
            torch.mm(gradient, weight, out=d_hidden[rows])
        if d_weight is not None:
            add_product_(d_weight, gradient.t(), hidden[rows], is_first=rows.start == 0)


def _chunk_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    options: _Options,
    losses: Tensor,
    *,
    needs_gradient: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, gradient of their logits) chunk by chunk, and fill `losses`. Yields nothing without a gradient.

    The gradient lies in a buffer that the next steps overwrite.
    """
    num_tokens, vocab_rows, shard = hidden.shape[0], weight.shape[0], options.shard
    chunk, num_buffers = plan_chunks(
        num_tokens,
        vocab_rows=vocab_rows if shard is None else shard.rows_per_rank,
        bytes_per_logit=hidden.element_size(),
        budget_bytes=options.budget_bytes if hidden.is_cuda else min(options.budget_bytes, _CPU_BUDGET_BYTES),
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
            row_max, row_sum, losses[rows] = combine_statistics(pending.wait(), labels[rows])
            if needs_gradient:
                write_gradient_(pending.logits, row_max, row_sum, labels[rows], scale, start=start)
                yield rows, pending.logits
        pending = upcoming


class _PendingStatistics:
    """A chunk whose row statistics are on their way to the other ranks."""

    def __init__(self, rows: slice, logits: Tensor, statistics: Tensor, shard: VocabShard | None) -> None:
        self.rows, self.logits = rows, logits
        self._mine = statistics  # held until they have been sent
        self._all, self._is_here = statistics, True  # without a shard these are of the whole vocabulary
        if shard is not None:
            group = shard.group
            self._all = collectives.all_gather_into_tensor(statistics, group.size(), group.group_name)  # (3 * n, C)
            self._is_here = False
            if not statistics.is_cuda:
                self.wait()  # nothing is hidden there, and gloo breaks memory where two gathers are under way

    def wait(self) -> Tensor:  # (n, 3, C)
        if not self._is_here:
            self._is_here = True
            collectives.wait_tensor(self._all)
        return self._all.unflatten(0, (-1, 3))
