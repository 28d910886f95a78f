"""What the loss of a token is made of beside its plain cross entropy. What is off costs nothing.

For a row of logits z with target y, token weight w and class weights c (1 where there are none):

    x    = softcap * tanh((z + bias) / softcap)
    lse  = log(sum(exp(x)))
    ce   = (1 - eps) * c[y] * (lse - x[y]) + eps / V * sum_j c[j] * (lse - x[j])    eps: label_smoothing, as in torch
    loss = scale * w * (ce + z_loss * lse^2)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that has no target (the value of torch.nn.functional.cross_entropy)."""


def get_loss_dtype(logits: Tensor) -> torch.dtype:
    """What a loss is computed in: float32, and float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(frozen=True)
class Terms:
    """The terms of one call, and the vocabulary that they are about."""

    vocab_size: int
    """Of all ranks together."""
    start: int = 0
    """Id of this rank's first row of it."""
    bias: Tensor | None = None
    """(Vp,), added to the logits."""
    class_weights: Tensor | None = None
    """(V,) float32, or float64 beside such logits."""
    softcap: float = 0.0
    """Logits stay between -softcap and softcap; 0: as they are."""
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    outputs: bool = False
    """Whether entropies and the arg max are wanted."""

    def __post_init__(self) -> None:
        if not (0 <= self.softcap < math.inf and 0 <= self.z_loss < math.inf and 0 <= self.label_smoothing <= 1):
            raise ValueError(
                "softcap and z_loss must be finite and at least 0, and label_smoothing between 0 and 1,"
                f" got {self.softcap}, {self.z_loss} and {self.label_smoothing}"
            )

    @property
    def numbers(self) -> list[float]:
        return [self.softcap, self.z_loss, self.label_smoothing]

    @property
    def num_statistics(self) -> int:
        """Rows of what softmax_gradient.row_statistics gives."""
        return 6 if self.outputs or self.label_smoothing else 3

    @property
    def has_share(self) -> bool:
        """Whether the gradient's share of the softmax is another than 1."""
        return self.z_loss > 0 or self.label_smoothing > 0 or self.class_weights is not None

    def smoothed(self, like: Tensor) -> Tensor:
        """eps / V * sum of the class weights, ()."""
        if self.class_weights is None:
            return like.new_full((), self.label_smoothing)
        return self.class_weights.sum() * (self.label_smoothing / self.vocab_size)

    def local_class_weights(self, num_columns: int) -> Tensor | None:
        """(Vp,), of this rank's columns."""
        return None if self.class_weights is None else self.class_weights[self.start : self.start + num_columns]

    def of_target(self, labels: Tensor) -> Tensor | float:
        """(1 - eps) * class weight of the label: of each row, or one number for all."""
        if self.class_weights is None:
            return 1 - self.label_smoothing
        is_word = (labels >= 0) & (labels < self.vocab_size)
        weights = self.class_weights[labels.clamp(0, self.vocab_size - 1)]
        return torch.where(is_word, weights, 1.0) * (1 - self.label_smoothing)


class Coefficients(NamedTuple):
    """Of each row's gradient (softmax_gradient.py has it), (C,) each; None is a share of 1, and 0 of the others."""

    factor: Tensor
    target: Tensor
    share: Tensor | None = None
    smooth: Tensor | None = None
    spread: Tensor | None = None
