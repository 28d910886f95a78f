"""The loss on held-out data: the mean over all valid tokens of the whole set, over all ranks.

Sums and counts are added up over batches and ranks and divided once, so batches with few valid tokens count for
little. Every validation reads the same batches. It takes the standard path, whichever loss trains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from torchtitan.components.dataloader import Batch, build_validation_dataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.run_guard import RunGuard
from torchtitan.components.runner import Runner
from torchtitan.components.samples import Sampler
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import DatasetError
from torchtitan.config.sections import Training, Validation
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.utils import sum_over_world_


@dataclass
class Validator:
    """Validates at step 1 and every `freq` steps, if enabled; each rank reads its share of the set.

    Raises:
        DatasetError: the set is missing, empty or in no known format.
        ConfigError: a prompt does not fit into the model's context.
    """

    validation: Validation
    training: Training
    tokenizer: Tokenizer
    runner: Runner
    metrics: MetricsProcessor
    mark_documents: Callable[[Batch], Batch]
    shard_context: ContextSharder
    mesh: Mesh
    device: torch.device
    guard: RunGuard

    def __post_init__(self) -> None:
        if not self.validation.enabled:
            return
        self.batches = build_validation_dataloader(
            self.validation,
            self.tokenizer,
            training=self.training,
            dp_rank=self.mesh["dp"].get_local_rank(),
            dp_world_size=self.mesh["dp"].size(),
            asked_to_stop=self.guard.asked_to_stop,
        )
        context = max(self.training.seq_len, self.validation.seq_len)
        self.sample = Sampler(
            self.validation,
            self.tokenizer,
            self.runner,
            self.shard_context,
            self.mesh,
            self.device,
            context,
            self.guard.must_stop,
        )

    def maybe_validate(self, step: int) -> bool:
        """Returns whether it was broken off, since some rank was asked to stop."""
        if self.validation.enabled and (step == 1 or step % self.validation.freq == 0):
            with self.metrics.validating(), self._evaluating():
                if (result := self.validate()) is None:
                    return True
                loss, n_tokens = result
                self.metrics.log_validation(step, loss=loss, n_tokens=n_tokens)
                if (texts := self.sample()) is None:
                    return True
                for prompt, text in texts:
                    self.metrics.log_text(step, prompt, text)
        return False

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for part in self.runner.model_parts:
            part.eval()
        yield
        for part in self.runner.model_parts:
            part.train()
            for module in part.modules():  # what backward would have freed
                if isinstance(module, FSDPModule):
                    module.reshard()

    def validate(self) -> tuple[float, int] | None:
        """The mean loss over the whole set and all ranks, and the number of tokens that this data rank read.

        None where some rank is asked to stop, by the end of the batch in which it is.
        """
        sum_and_count = torch.zeros(2, dtype=torch.float64, device=self.device)
        n_tokens = 0
        steps = self.validation.steps
        for batch in chain(islice(self.batches, steps if steps > 0 else None), [None]):
            if self.guard.must_stop():  # where a rank's batches have ended for that, the others have one here
                return None
            if batch is not None:
                n_tokens += batch.tokens.numel()
                sum_and_count += self._sum_and_count(batch)
        total, count = sum_over_world_(sum_and_count).tolist()
        if count == 0:
            raise DatasetError("the validation data holds no token to predict: a document has two tokens at least")
        return total / count, n_tokens

    def _sum_and_count(self, batch: Batch) -> Tensor:
        batch = self.mark_documents(batch)
        # one rank of those that read the same sequences counts, and one of tensor parallel's, which have the same loss
        counts_tokens, counts_loss = self.mesh.is_first("pp", "cp", "tp"), self.mesh.is_first("tp")
        num_valid = (batch.labels != IGNORE_INDEX).sum() * counts_tokens
        loss_sum = self.runner.eval_loss(*self.shard_context(*batch.to(self.device)))
        return torch.stack([loss_sum.double() * counts_loss, num_valid.to(self.device, torch.float64)])
