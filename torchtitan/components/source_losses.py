"""What the log says of each dataset of a mixture: its tokens, and its mean loss over the steps since the last line.

The sums stay on the device until then, and a run of one dataset makes none.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.utils import sum_over_world_
from torchtitan.protocols.model import Loss, NotesSequences
from torchtitan.tools.logging import logger


class SourceLosses:
    """Adds up what the loss notes of each sequence, by the dataset that it is of."""

    def __init__(
        self, loss: Loss, get_tokens: Callable[[], Mapping[str, int]], mesh: Mesh, device: torch.device
    ) -> None:
        """get_tokens: how many tokens of each dataset the run has read; of none, if there is only one."""
        self._get_tokens = get_tokens
        self._mesh = mesh
        self._noted: list[Tensor] = []
        self._is_on = False
        names = list(get_tokens())
        if names and isinstance(loss, NotesSequences):
            self._is_on = True
            loss.note_sequences(self._noted)
        elif names:
            logger.info(
                f"The log has no loss of each dataset: {type(loss).__name__} gives one for all tokens. The in-tree loss"
                " (liger_kernel.implementation=native) and the standard one tell it"
            )
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(names), dtype=torch.float64)

    def add_step(self, microbatches: Sequence[Batch]) -> None:
        """What was noted last is of these."""
        if not self._is_on:
            return
        sources = torch.cat([batch.sources for batch in microbatches if batch.sources is not None])
        is_of = F.one_hot(sources, len(self._counts)).double()  # (sequences, datasets)
        num_valid = torch.cat([(batch.labels != IGNORE_INDEX).sum(-1) for batch in microbatches])
        self._counts += num_valid.double() @ is_of
        if self._noted:  # a pipeline's are on its last stage
            noted = torch.cat(self._noted)[-len(sources) :]  # before it, of a try that ended for want of memory
            self._sums += noted.double() @ is_of.to(self._sums.device, non_blocking=True)
            self._noted.clear()

    def report(self) -> dict[str, tuple[int, float | None]]:
        """Of each dataset, tokens since the run began, and the mean loss since the last report, of all ranks.

        The loss is None where no token of the dataset was among them, or where the loss does not tell it.
        """
        tokens = self._get_tokens()
        if not self._is_on:
            return {name: (n, None) for name, n in tokens.items()}
        # of context ranks, whose parts of the sequences add up, and of one rank of those that count the same ones
        sums = self._sums * self._mesh.is_first("tp")
        counts = self._counts.to(self._sums.device) * self._mesh.is_first("pp", "cp", "tp")
        found = sum_over_world_(torch.stack([sums, counts])).T.tolist()
        self._sums.zero_()
        self._counts.zero_()
        both = zip(tokens.items(), found, strict=True)
        return {name: (n, total / count if count else None) for (name, n), (total, count) in both}
