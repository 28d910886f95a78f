"""What training tells of its tokens beside the loss: z-loss (Chowdhery et al., 2022, PaLM), the cross entropy of each
sequence, and predictions: how often the label is the likeliest word, and the entropy of the words' distribution.
"""

import torch
from torch import Tensor

from torchtitan.components.loss.chunked_logits import OverRanks
from torchtitan.components.loss.softmax_gradient import ARG_MAX, entropies, row_statistics
from torchtitan.components.loss.terms import IGNORE_INDEX, Terms
from torchtitan.components.loss.vocab_shard import VocabShard


class TokenSums:
    """Sums over this rank's tokens since `reset`, without `scale`."""

    def __init__(self, *, z_loss: float = 0.0, predictions: bool = False, by_sequence: bool = False) -> None:
        self.z_loss = z_loss
        """The coefficient of log_sum_exp ** 2."""
        self.predictions = predictions
        """Whether the log has accuracy and entropy."""
        self.by_sequence = by_sequence
        """Whether the log has the loss of each dataset of a mixture."""
        self.reset(logged=False)

    def reset(self, *, logged: bool) -> None:
        """logged: whether the log tells of the coming step, for which alone predictions are looked at."""
        self.wants_predictions = self.predictions and logged
        self._z_loss = self._correct = self._entropy = torch.zeros(())
        self.of_sequences: list[Tensor] = []
        """With by_sequence, the cross entropies of a microbatch's sequences each, (B,)."""

    def z_loss_apart(self, total: Tensor, added: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """The cross entropy of a total that holds `scale * added`, with the gradients of the total."""
        added = added.detach()
        self._z_loss = self._z_loss + added
        return total - scale * added

    def add_predictions(self, correct: Tensor, entropies: Tensor) -> None:
        """Of tokens: whether the label is the arg max, and the entropies; 0 where they are ignored."""
        self._correct, self._entropy = self._correct + correct.sum(), self._entropy + entropies.sum()

    @torch.no_grad()
    def add_logits(
        self,
        logits: Tensor,  # (..., Vp)
        labels: Tensor,  # (...) int64, ids of the whole vocabulary
        shard: VocabShard | None,  # which columns these are; None: all
    ) -> None:
        """The same, by one more look at the logits."""
        logits, labels = logits.flatten(0, -2), labels.flatten()
        start, vocab_size = (0, logits.shape[1]) if shard is None else (shard.start, shard.vocab_size)
        mine = row_statistics(logits, labels, Terms(vocab_size, start, outputs=True))
        statistics = OverRanks(mine, shard).wait()
        is_correct = (statistics[ARG_MAX] == labels) & (labels != IGNORE_INDEX)
        self.add_predictions(is_correct, entropies(statistics, labels))

    def scaled(self, scale: Tensor) -> dict[str, Tensor]:
        """What there is to tell, () each: means over all tokens, once all ranks' are added."""
        told = {"z_loss": self._z_loss} if self.z_loss else {}
        if self.wants_predictions:
            told |= {"token_accuracy": self._correct, "token_entropy": self._entropy}
        return {name: total * scale for name, total in told.items()}
