"""Ignored tokens are not computed where the host has the labels: the others are gathered, and nothing waits for it.

Their number is rounded up to a 64th of all or a tile of the GPU's products, whichever is less, with ignored tokens: the
tile costs the same, and the sizes of what is allocated stay few.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan.components.loss.chunking import TILE, round_up
from torchtitan.components.loss.terms import IGNORE_INDEX

_NUM_SIZES = 64


@dataclass(frozen=True)
class ValidRows:
    """The tokens that the loss walks over."""

    labels: Tensor
    """Theirs, (T,) int64, on the device."""
    num_tokens: int
    """Of all."""
    rows: Tensor | None
    """Where they are among all, on the device; None: all are taken."""

    @classmethod
    def of(cls, labels: Tensor, device: torch.device) -> "ValidRows":
        """Of labels (...) on the device, or on the host, which then looks whether leaving some out is worth while."""
        labels = labels.reshape(-1)
        rows = None
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            is_valid = labels != IGNORE_INDEX
            wanted = round_up(int(is_valid.sum()), max(1, min(TILE, -(-len(labels) // _NUM_SIZES))))
            if wanted < len(labels):
                rows = torch.cat([is_valid.nonzero(), (~is_valid).nonzero()]).flatten()[:wanted]
        taken = labels if rows is None else labels[rows]
        return cls(_to(taken.contiguous(), device), len(labels), None if rows is None else _to(rows, device))

    def take(self, values: Tensor) -> Tensor:
        """Of (T, ...), those of the tokens that are walked over."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def put_back(self, values: Tensor, fill: float) -> Tensor:
        """The values of all tokens, with `fill` for those left out."""
        if self.rows is None:
            return values
        return values.new_full((self.num_tokens, *values.shape[1:]), fill).index_copy(0, self.rows, values)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # or the copy would wait for what the device does
    return tensor.to(device, non_blocking=True)
