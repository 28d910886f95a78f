"""What the log says of each dataset of a mixture: its tokens, and its mean loss over the steps since the last line.

The sums stay on the device until then, and a run of one dataset makes none.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.utils import sum_over_world_


class SourceLosses:
    """Adds up what the loss has of each sequence, by the dataset that it is of."""

    def __init__(
        self, get_tokens: Callable[[], Mapping[str, int]], of_step: TokenSums, mesh: Mesh, device: torch.device
    ) -> None:
        """get_tokens: how many tokens of each dataset the run has read; of none, if there is only one."""
        self._get_tokens = get_tokens
        self._of_step = of_step
        self._mesh = mesh
        num_sources = len(get_tokens())
        self._sums = torch.zeros(num_sources, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_sources, dtype=torch.float64)

    def add_step(self, microbatches: Sequence[Batch]) -> None:
        """After their loss."""
        if not self._of_step.by_sequence:
            return
        sources = torch.cat([batch.sources for batch in microbatches if batch.sources is not None])
        is_of = F.one_hot(sources, len(self._counts)).double()  # (sequences, datasets)
        num_valid = torch.cat([(batch.labels != IGNORE_INDEX).sum(-1) for batch in microbatches])
        self._counts += num_valid.double() @ is_of
        if self._of_step.of_sequences:  # a pipeline's are on its last stage
            losses = torch.cat(self._of_step.of_sequences).double()
            self._sums += losses @ is_of.to(self._sums.device, non_blocking=True)

    def report(self) -> dict[str, tuple[int, float | None]]:
        """Of each dataset, tokens since the run began, and the mean loss since the last report, of all ranks.

        The loss is None where no token of the dataset was among them, or where the loss does not tell it.
        """
        tokens = self._get_tokens()
        if not self._of_step.by_sequence:
            return {name: (n, None) for name, n in tokens.items()}
        # of context ranks, whose parts of the sequences add up, and of one rank of those that count the same ones
        sums = self._sums * self._mesh.is_first("tp")
        counts = self._counts.to(self._sums.device) * self._mesh.is_first("pp", "cp", "tp")
        found = sum_over_world_(torch.stack([sums, counts])).T.tolist()
        self._sums.zero_()
        self._counts.zero_()
        both = zip(tokens.items(), found, strict=True)
        return {name: (n, total / count if count else None) for (name, n), (total, count) in both}
