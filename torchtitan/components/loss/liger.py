"""Liger-Kernel's fused linear cross entropy: the only file that imports liger_kernel.

Liger walks over chunks of tokens: logits of a chunk, a Triton kernel that turns them into their gradient
in place, then the products for the hidden and the weight gradient, all in the forward pass. Its module
picks about V / D chunks however many tokens there are, so that at 4k to 16k tokens each product is too
small for the GPU (`docs/performance.md`). We choose the chunk from a memory budget instead.
"""

import importlib.metadata
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from torch import Tensor

from torchtitan.components.loss.chunking import liger_chunk_mem_const, rows_in_budget
from torchtitan.components.loss.gradients import OneBackward, multiply_
from torchtitan.components.loss.terms import IGNORE_INDEX
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.components.loss.valid_rows import ValidRows
from torchtitan.config.errors import LigerTooOldError
from torchtitan.protocols.model import OutputHead

MIN_VERSION = "0.8.5"
"""First release without the strided-gradient bug of 0.8.4; the chunk size is an argument since 0.8.3."""

_ROUNDING = 1e-7
"""In float32, n * (1 / n) may be 6e-8 less than 1."""


class LigerFusedLinearLoss(LigerFusedLinearCrossEntropyLoss):
    """`LigerFusedLinearCrossEntropyLoss` on `output.weight`, with chunks of at most `budget_bytes` of logits.

    Liger rounds a chunk to a power of two rows and needs no less than its own default chunk; a smaller budget
    than that has no effect. On a GPU the host waits for it in forward, which reads the number of valid tokens. Ignored
    tokens are left out before, where the labels are on the host. There is one backward, and no second derivative.

    Raises:
        ImportError: liger-kernel is older than `MIN_VERSION`.
    """

    takes_host_labels = True

    def __init__(
        self, *, budget_bytes: int, accum_dtype: torch.dtype | None = None, sums: TokenSums | None = None
    ) -> None:
        _check_version()  # first: an older one takes other arguments
        super().__init__(ignore_index=IGNORE_INDEX, reduction="mean", accum_dtype=accum_dtype)
        self.sums = sums or TokenSums()
        self.budget_bytes = budget_bytes

    def forward(  # type: ignore[override]  # the contract of our losses, not Liger's argument order
        self,
        hidden: Tensor,  # (B, S, D)
        head: OutputHead,
        labels: Tensor,  # (B, S) int64
        scale: Tensor,  # () float32
    ) -> Tensor:
        return head.with_weight(partial(self._scaled_sum, labels=labels, scale=scale), hidden)

    def _scaled_sum(self, hidden: Tensor, weight: Tensor, *, labels: Tensor, scale: Tensor) -> Tensor:
        valid = ValidRows.of(labels, hidden.device)  # (B, S) -> at most (T,)
        hidden, labels = valid.take(hidden.flatten(0, -2)), valid.labels
        if not torch.is_grad_enabled():  # a parameter asks for its gradient all the same
            hidden, weight = hidden.detach(), weight.detach()
        elif weight.requires_grad and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # Liger computes the weight's gradient only beside theirs
        if len(hidden) == 0:  # Liger divides by their number
            return F.linear(hidden, weight).sum() * scale
        # Liger would read past the row of a label outside the vocabulary; the loss is infinite then, as in-tree
        is_no_word = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= len(weight)))
        labels = labels.masked_fill(is_no_word, IGNORE_INDEX)
        # Liger's mean over this call's tokens, times their share of the global batch: with one rank and one
        # microbatch the share is 1, and in backward no pass over both gradients is needed.
        num_valid = (labels != IGNORE_INDEX).sum()
        share = num_valid * scale
        share = torch.where((share - 1).abs() < _ROUNDING, 1.0, share)
        chunk_mem_const = liger_chunk_mem_const(
            num_tokens=hidden.shape[0],
            dim=weight.shape[1],
            vocab_size=weight.shape[0],
            max_rows=rows_in_budget(
                self.budget_bytes, vocab_rows=weight.shape[0], bytes_per_logit=hidden.element_size()
            ),
        )
        mean, z_mean = _LigerFunction.apply(
            hidden, weight, labels, self.sums.z_loss, self.reduction, self.accum_dtype, chunk_mem_const
        )
        loss = mean * share
        if z_mean is not None:
            loss = self.sums.z_loss_apart(loss, z_mean * num_valid, scale)
        return OneBackward.apply(loss + torch.where(is_no_word, float("inf"), 0.0).sum())


class _LigerFunction(LigerFusedLinearCrossEntropyFunction):  # type: ignore[misc]  # its package has no types
    """Liger's, for what we ask of it; in its own backward the host would wait for the GPU to read the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (T,)
        z_loss: float,
        reduction: str,
        accum_dtype: torch.dtype | None,
        chunk_mem_const: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the part of it that is z-loss, if there is one."""
        found = LigerFusedLinearCrossEntropyFunction.forward(
            ctx,
            hidden,
            weight,
            labels,
            ignore_index=IGNORE_INDEX,
            lse_square_scale=z_loss,
            reduction=reduction,
            return_z_loss=z_loss > 0,
            accum_dtype=accum_dtype,
            chunk_mem_const=chunk_mem_const,
        )
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, _ = ctx.saved_tensors  # the last is of a bias, which we have none of
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                multiply_(gradient, d_loss)
        return d_hidden, d_weight, *[None] * 5


def _check_version() -> None:
    # the package may come from another distribution, such as liger-kernel-nightly
    names = importlib.metadata.packages_distributions().get("liger_kernel", ["liger-kernel"])
    try:
        version = importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    if _numbers(version) < _numbers(MIN_VERSION):
        raise LigerTooOldError(version, MIN_VERSION)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
