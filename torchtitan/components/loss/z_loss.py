"""The z-loss of training (Chowdhery et al., 2022, PaLM), told apart from the cross entropy."""

from torch import Tensor


class ZLoss:
    """`coefficient * log_sum_exp ** 2` of each token, and the sum of what that was since `reset`."""

    def __init__(self, coefficient: float = 0.0) -> None:
        self.coefficient = coefficient
        self.reset()

    def reset(self) -> None:
        self.sum: Tensor | float = 0.0
        """Over this rank's tokens, without `scale`."""

    def apart(self, total: Tensor, added: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """The cross entropy of a total that holds `scale * added`, with the gradients of the total."""
        added = added.detach()
        self.sum = self.sum + added
        return total - scale * added
