"""The loss on held-out data: the mean over all valid tokens of the whole set, over all ranks.

Sums and counts are added up over batches and ranks and divided once, so batches with few valid tokens count for
little. Every validation reads the same batches. The logits are made in full here (the standard path).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from torchtitan.components.dataloader import Batch, build_validation_dataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.runner import Runner
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.job_config import Validation
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.utils import sum_over_world_


class Validator:
    """Validates at step 1 and every `freq` steps, if enabled."""

    def __init__(
        self,
        validation: Validation,
        *,
        batches: Iterable[Batch],
        runner: Runner,
        metrics: MetricsProcessor,
        shard_context: ContextSharder,
        device: torch.device,
        counts_tokens: bool,
        counts_loss: bool,
    ) -> None:
        self._validation = validation
        self._batches = batches
        self._runner = runner
        self._metrics = metrics
        self._shard_context = shard_context
        self._device = device
        self._counts_tokens = counts_tokens
        self._counts_loss = counts_loss

    def maybe_validate(self, step: int) -> None:
        if self._validation.enabled and (step == 1 or step % self._validation.freq == 0):
            with self._metrics.validating():
                loss, n_tokens = self.validate()
                self._metrics.log_validation(step, loss=loss, n_tokens=n_tokens)

    def validate(self) -> tuple[float, int]:
        """The mean loss over the whole set and all ranks, and the number of tokens that this data rank read."""
        for part in self._runner.model_parts:
            part.eval()
        sum_and_count = torch.zeros(2, dtype=torch.float64, device=self._device)
        n_tokens = 0
        for i, batch in enumerate(self._batches):
            if i == self._validation.steps:
                break
            n_tokens += batch.tokens.numel()
            sum_and_count += self._sum_and_count(batch)
        total, count = sum_over_world_(sum_and_count).tolist()
        for part in self._runner.model_parts:
            part.train()
            for module in part.modules():  # what backward would have freed
                if isinstance(module, FSDPModule):
                    module.reshard()
        return total / max(count, 1), n_tokens

    def _sum_and_count(self, batch: Batch) -> Tensor:
        num_valid = (batch.labels != IGNORE_INDEX).sum() if self._counts_tokens else torch.zeros(())
        tokens, labels, positions = self._shard_context(*(t.to(self._device, non_blocking=True) for t in batch))
        loss_sum = self._runner.eval_loss(tokens, labels, positions)
        return torch.stack([loss_sum.double() * self._counts_loss, num_valid.to(self._device, torch.float64)])


def build_validator(
    validation: Validation,
    *,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_world_size: int,
    runner: Runner,
    metrics: MetricsProcessor,
    shard_context: ContextSharder,
    device: torch.device,
    counts_tokens: bool,
    counts_loss: bool,
) -> Validator:
    """A validator of this rank's share of the set.

    Args:
        counts_tokens: True on one rank of those that work on the same sequences.
        counts_loss: True on one of the tensor-parallel ranks, which all have the same loss.

    Raises:
        DatasetError: the data is missing, empty or in no known format.
    """
    batches: Iterable[Batch] = []
    if validation.enabled:
        batches = build_validation_dataloader(
            dataset=validation.dataset,
            dataset_path=validation.dataset_path,
            tokenizer=tokenizer,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=validation.local_batch_size,
            seq_len=validation.seq_len,
        )
    return Validator(
        validation,
        batches=batches,
        runner=runner,
        metrics=metrics,
        shard_context=shard_context,
        device=device,
        counts_tokens=counts_tokens,
        counts_loss=counts_loss,
    )
