"""Documents that do not see each other: where they begin in a batch, and the labels across their boundaries.

The tokenizer puts a token of its own before or behind each document, which no text contains: they tell where documents
begin, whatever the sequences were read from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Training
from torchtitan.protocols.sequences import Documents


@dataclass(frozen=True)
class DocumentMarker:
    """Adds the documents to a batch on the CPU, and changes its labels in place."""

    bos_id: int | None
    eos_id: int | None
    keeps_labels: bool

    def __call__(self, batch: Batch) -> Batch:
        tokens, labels = batch.tokens, batch.labels
        begins = torch.ones_like(tokens, dtype=torch.bool)  # the first token of a sequence has nothing before it
        begins[:, 1:] = self._begins(tokens[:, :-1], tokens[:, 1:])
        if not self.keeps_labels:
            labels.masked_fill_(self._begins(tokens, labels), IGNORE_INDEX)  # in place: they may be in pinned memory
        return batch._replace(documents=get_documents(begins))

    def _begins(self, before: Tensor, token: Tensor) -> Tensor:
        """Where `token` is the first of a document."""
        if self.eos_id is None:
            assert self.bos_id is not None
            return token.eq(self.bos_id)
        begins = before.eq(self.eos_id)
        return begins & token.eq(self.bos_id) if self.bos_id == self.eos_id else begins


def get_documents(begins: Tensor) -> Documents:
    """From a mask (B, S) of the documents' first tokens."""
    rows, columns = begins.nonzero(as_tuple=True)
    batch_size, seq_len = begins.shape
    bounds = torch.full((batch_size, int(begins.sum(1).max()) + 1), seq_len, dtype=torch.int32)
    bounds[rows, begins.cumsum(1)[rows, columns] - 1] = columns.int()
    longest = torch.empty(batch_size, int(bounds.diff(dim=1).max()), 0, dtype=torch.int8)
    return Documents(bounds.pin_memory() if torch.cuda.is_available() else bounds, longest)


def build_document_marker(training: Training, tokenizer: Tokenizer) -> Callable[[Batch], Batch]:
    """What marks each batch; nothing, without training.document_mask.

    Raises:
        ConfigError: the tokenizer marks no boundary.
    """
    if not training.document_mask:
        return lambda batch: batch
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise ConfigError(
            "training.document_mask needs a tokenizer that marks where documents begin or end, and that of"
            " model.tokenizer_path has neither a BOS nor an EOS token; name one as bos_token or eos_token in its"
            " tokenizer_config.json, or leave the option out"
        )
    return DocumentMarker(tokenizer.bos_id, tokenizer.eos_id, keeps_labels=training.boundary_labels == "keep")
