"""The standard loss: logits in the model's dtype, then cross entropy in float32.

It obeys the contract of all losses (see __init__.py) and is the oracle of the fused ones. Under tensor
parallelism the logits stay sharded over the vocabulary: each rank reduces its own columns, and two
all-reduces combine them, of the maxima (T,) and of sums and target logits (2, T).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.loss.terms import IGNORE_INDEX, get_loss_dtype
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.components.loss.vocab_shard import VocabShard, is_dtensor, vocab_shard_of

if TYPE_CHECKING:
    from torchtitan.protocols.model import OutputHead

Sums = tuple[Tensor, Tensor | None, Tensor | None]
"""Of the token losses; what of it is the z-loss; that of each sequence, without z-loss. None where not asked for."""


class CrossEntropyLoss:
    """Cross entropy of the head's logits. With `compile`, the cast, the softmax and the gradient are fused.

    Pipeline stages, which run the head themselves, call its `sum` on logits.
    """

    tells_tokens = True

    def __init__(self, *, compile: bool = False, sums: TokenSums | None = None) -> None:
        self.sum = CrossEntropySum(compile=compile, sums=sums)

    def __call__(
        self,
        hidden: Tensor,  # (B, S, D)
        head: "OutputHead",
        labels: Tensor,  # (B, S) int64
        scale: Tensor,  # () float32
    ) -> Tensor:
        return self.sum(head(hidden), labels) * scale


class CrossEntropySum:
    """`cross_entropy_sum`, optionally compiled."""

    def __init__(self, *, compile: bool = False, sums: TokenSums | None = None) -> None:
        self._whole: Callable[..., Sums] = torch.compile(_whole_sum) if compile else _whole_sum
        self._sharded: Callable[..., Sums] = torch.compile(_sharded_sum) if compile else _sharded_sum
        self._sums = sums or TokenSums()

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not is_dtensor(logits):
            return self.of_local(logits, labels, None)
        local = logits.to_local(grad_placements=logits.placements)
        return self.of_local(local, labels, vocab_shard_of(logits, dim=-1))

    def of_local(
        self,
        logits: Tensor,  # (..., Vp)
        labels: Tensor,  # (...) int64, ids of the whole vocabulary
        shard: VocabShard | None,  # which columns these are; None: all
    ) -> Tensor:
        options = self._sums.z_loss, self._sums.by_sequence
        if shard is None:
            total, z_sum, of_sequences = self._whole(logits, labels, *options)
        else:
            columns = shard.start, shard.vocab_size, shard.group
            total, z_sum, of_sequences = self._sharded(logits, labels, *columns, *options)
        if of_sequences is not None:
            self._sums.of_sequences.append(of_sequences)
        if self._sums.wants_predictions:
            self._sums.add_logits(logits, labels, shard)
        return total if z_sum is None else self._sums.z_loss_apart(total, z_sum)


def cross_entropy_sum(
    logits: Tensor,  # (..., V), plain, or a DTensor sharded over the vocabulary
    labels: Tensor,  # (...) int64
) -> Tensor:
    """Sum of the token losses in float32; tokens labelled IGNORE_INDEX count 0."""
    return CrossEntropySum()(logits, labels)


def _whole_sum(logits: Tensor, labels: Tensor, z_loss: float = 0.0, by_sequence: bool = False) -> Sums:
    x = logits.flatten(0, -2).to(get_loss_dtype(logits))  # (T, V)
    losses = F.cross_entropy(x, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return _sums(losses, x.logsumexp(dim=1) if z_loss else losses, labels, z_loss, by_sequence)


def _sharded_sum(
    logits: Tensor,  # (..., Vp)
    labels: Tensor,  # (...) int64, ids of the whole vocabulary
    start: int,
    vocab_size: int,
    group: dist.ProcessGroup,
    z_loss: float = 0.0,
    by_sequence: bool = False,
) -> Sums:
    x = logits.flatten(0, -2).to(get_loss_dtype(logits))  # (T, Vp)
    shape, labels = labels.shape, labels.flatten()
    if x.shape[1] == 0:  # more ranks than rows: this one only takes part in the reductions
        x = F.pad(x, (0, 1), value=float("-inf"))
    # all-reduce the max first: exp() of another shard's logits may overflow
    row_max = funcol.all_reduce(x.detach().amax(dim=1), "max", group)
    column = labels - start
    is_local = (column >= 0) & (column < logits.shape[-1])
    target = x.gather(1, column.clamp(0, x.shape[1] - 1).unsqueeze(1)).squeeze(1)
    target = torch.where(is_local, target, 0.0)
    sum_exp = (x - row_max.unsqueeze(1)).exp().sum(dim=1)
    sum_exp, target = _SumOverRanks.apply(torch.stack([sum_exp, target]), group).unbind(0)
    log_sum = sum_exp.log()
    losses = (row_max - target) + log_sum  # in another order a sure token's loss would be lost in rounding
    is_word = (labels >= 0) & (labels < vocab_size)
    losses = torch.where(is_word, losses, float("inf"))  # an error would need the host to wait
    losses = torch.where(labels == IGNORE_INDEX, 0.0, losses)
    return _sums(losses, row_max + log_sum, labels.view(shape), z_loss, by_sequence)


def _sums(losses: Tensor, log_sum_exps: Tensor, labels: Tensor, z_loss: float, by_sequence: bool) -> Sums:
    """Of losses and log-sum-exps of tokens, (T,), and labels (..., S)."""
    of_sequences = losses.detach().view(labels.shape).sum(-1) if by_sequence else None
    if not z_loss:
        return losses.sum(), None, of_sequences
    z_sum = z_loss * torch.where(labels.flatten() == IGNORE_INDEX, 0.0, log_sum_exps).square().sum()
    return losses.sum() + z_sum, z_sum, of_sequences


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose result every rank uses alike, so the gradient of each addend is the result's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return funcol.all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
