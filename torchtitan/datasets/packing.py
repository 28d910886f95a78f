"""Documents to sequences: tokenise, join, cut.

    documents   [bos a a a eos] [bos b b b b b eos] [bos c ...
    stream      bos a a a eos bos b b b b b eos bos c ...
    cut, S = 4  bos a a a eos
                          eos bos b b b
                                      b b b eos bos

Each sequence has S + 1 tokens, S inputs and the S labels one further on; its last token is the next
one's first. So every token of the stream but the very first is the label of exactly one input.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torchtitan.datasets.documents import DocumentStream, Position

GROUP_CHARS = 2**18
GROUP_DOCUMENTS = 64


class Encoder(Protocol):
    """What turns texts into token ids: components/tokenizer.py."""

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool, add_eos: bool) -> list[list[int]]: ...


@dataclass(frozen=True)
class Cursor:
    """A place in a token stream: a document, and how many of its tokens come before."""

    position: Position = field(default_factory=Position)
    offset: int = 0

    def to_list(self) -> list[int]:
        return [*astuple(self.position), self.offset]

    @classmethod
    def from_list(cls, numbers: list[int]) -> "Cursor":
        *position, offset = numbers
        return cls(Position(*position), offset)


def pack(
    documents: DocumentStream,
    tokenizer: Encoder,
    *,
    seq_len: int,
    start: Cursor,
) -> Iterator[tuple[NDArray[np.int32], Cursor]]:
    """Sequences (seq_len + 1,) from `start` on, each with the cursor at which the next one begins.

    At the end of the data the last sequence may be shorter, but never shorter than one input and its label.
    """
    tokens: list[int] = []
    consumed = 0  # tokens of the list that are inputs of a sequence already
    # (end in the list, length, position) of documents with tokens left
    ends: deque[tuple[int, int, Position]] = deque()
    skip = start.offset
    for group in _group(documents.read(start.position)):
        del tokens[:consumed]
        ends = deque((end - consumed, length, position) for end, length, position in ends)
        consumed = 0
        encoded = tokenizer.encode_batch([text for _, text in group], add_bos=True, add_eos=True)
        for (position, _), ids in zip(group, encoded, strict=True):
            tokens += ids[skip:]
            skip = 0
            ends.append((len(tokens), len(ids), position))
        while len(tokens) - consumed > seq_len:
            sequence = np.array(tokens[consumed : consumed + seq_len + 1], dtype=np.int32)
            consumed += seq_len
            while ends[0][0] < consumed:
                ends.popleft()
            end, length, position = ends[0]
            yield sequence, Cursor(position, length - (end - consumed))
    if len(tokens) - consumed > 1:
        _, length, position = ends[-1]
        yield np.array(tokens[consumed:], dtype=np.int32), Cursor(position, length)


def _group(documents: Iterator[tuple[Position, str]]) -> Iterator[list[tuple[Position, str]]]:
    """Documents in groups that are tokenised together, in one call."""
    group: list[tuple[Position, str]] = []
    num_chars = 0
    for position, text in documents:
        group.append((position, text))
        num_chars += len(text)
        if num_chars >= GROUP_CHARS or len(group) >= GROUP_DOCUMENTS:
            yield group
            group, num_chars = [], 0
    if group:
        yield group
