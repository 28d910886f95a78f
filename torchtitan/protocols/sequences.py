"""What the tokens of a batch are part of: positions, and documents that do not see each other.

Masks, rotary positions and cuts of the sequence read it; nothing else carries positions. Every tensor's first dim is
the batch's, so that a pipeline can cut it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents in packed sequences begin and end, each sequence counted whole."""

    bounds: Tensor  # (B, M + 1) int32
    """Where each document begins, then the length of the sequence, repeated where others have more documents."""
    longest: Tensor  # (B, n, 0) int8
    """Empty: n, of its shape, is the longest document's length. As a number it would be compiled for anew each time."""

    def get_numbers(self, seq_len: int) -> Tensor:  # (B, seq_len) int64
        """The number of each token's document within its sequence."""
        index = torch.arange(seq_len, dtype=torch.int32, device=self.bounds.device)
        return torch.searchsorted(self.bounds, index.expand(len(self.bounds), -1).contiguous(), right=True) - 1

    def get_positions(self, seq_len: int) -> Tensor:  # (B, seq_len) int64
        """The position of each token in its document."""
        return torch.arange(seq_len, device=self.bounds.device) - self.bounds.gather(1, self.get_numbers(seq_len))


class Sequences(NamedTuple):
    """Of a model's input (B, S)."""

    positions: Tensor  # (B, S) int64
    documents: Documents | None = None
    """None: every token sees all before it."""

    def split(self, size: int) -> "list[Sequences]":
        """Parts of `size` rows."""
        positions = self.positions.split(size)
        if self.documents is None:
            return [Sequences(part) for part in positions]
        documents = map(Documents, *(tensor.split(size) for tensor in self.documents))
        return [Sequences(*both) for both in zip(positions, documents, strict=True)]
