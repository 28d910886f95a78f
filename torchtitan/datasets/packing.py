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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from torchtitan.config.errors import DatasetError, TokenizerError, UnknownTextError
from torchtitan.datasets.documents import Position
from torchtitan.datasets.source import Document

GROUP_CHARS = 2**18
GROUP_DOCUMENTS = 64

Tokens = NDArray[np.int32]
"""(S + 1,) token ids, or fewer at the end of the data."""


class Encoder(Protocol):
    """What turns texts into token ids: components/tokenizer.py."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool, add_eos: bool) -> list[list[int]]: ...


@dataclass(frozen=True)
class Cursor:
    """A place in a token stream: a document, and how many of its tokens come before."""

    position: Position = field(default_factory=Position)
    offset: int = 0

    def to_list(self) -> list[int]:
        return [*astuple(self.position), self.offset]

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> "Cursor":
        *position, offset = numbers
        return cls(Position(*position), offset)


class Packer:
    """The sequences of one stream of documents, from a cursor on; `fill` has its documents tokenised."""

    def __init__(
        self,
        documents: Iterator[tuple[Position, Document]],
        start: Cursor,
        locate: Callable[[Position, Document], str] | None = None,
    ) -> None:
        """`documents` begins with the one that `start` names; `locate` says where one of them lies."""
        self.locate = locate or (lambda position, document: "the data")
        self.cursor = start
        """Where the next sequence begins."""
        self.ended = False
        self._documents = documents
        self._skip = start.offset
        self._tokens: list[int] = []
        self._consumed = 0  # tokens of the list that are inputs of a sequence already
        # (end in the list, length, position) of documents with tokens left
        self._ends: deque[tuple[int, int, Position]] = deque()

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) - self._consumed

    def read(self, num_chars: int, num_documents: int) -> list[tuple[Position, Document]]:
        """The next documents, about as many as that, and at least one before the end."""
        documents: list[tuple[Position, Document]] = []
        for position, text in self._documents:
            documents.append((position, text))
            num_chars -= len(text)
            if num_chars <= 0 or len(documents) >= num_documents:
                return documents
        self.ended = True
        return documents

    def add(self, position: Position, ids: list[int]) -> None:
        """The tokens of the next document."""
        if self._consumed:
            del self._tokens[: self._consumed]
            self._ends = deque((end - self._consumed, length, place) for end, length, place in self._ends)
            self._consumed = 0
        self._tokens += ids[self._skip :]
        self._skip = 0
        self._ends.append((len(self._tokens), len(ids), position))

    def take(self, seq_len: int) -> Tokens:
        """The next sequence, (seq_len + 1,), or at the end of the data what is left: at least one input and label."""
        sequence = np.array(self._tokens[self._consumed : self._consumed + seq_len + 1], dtype=np.int32)
        self._consumed += seq_len
        while len(self._ends) > 1 and self._ends[0][0] < self._consumed:
            self._ends.popleft()
        end, length, position = self._ends[0]
        self.cursor = Cursor(position, min(length, length - (end - self._consumed)))
        return sequence


def fill(wanted: Mapping[Packer, int], tokenizer: Encoder) -> None:
    """Tokenise until each packer has as many tokens, or its data has ended; documents of all in one call."""
    while lacking := [packer for packer, n in wanted.items() if packer.num_tokens < n and not packer.ended]:
        chars, documents = GROUP_CHARS // len(lacking), max(1, GROUP_DOCUMENTS // len(lacking))
        group = [(packer, *document) for packer in lacking for document in packer.read(chars, documents)]
        texts = [document for *_, document in group if isinstance(document, str)]
        try:
            encoded = iter(tokenizer.encode_batch(texts, add_bos=True, add_eos=True))
        except UnknownTextError as error:
            place = next(packer.locate(position, text) for packer, position, text in group if text is error.text)
            raise TokenizerError(f"{place}: {error}") from None
        for packer, position, document in group:
            packer.add(position, next(encoded) if isinstance(document, str) else _check(document, tokenizer.vocab_size))


def _check(ids: NDArray[Any], vocab_size: int) -> list[int]:
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DatasetError(
            f"the data holds the token id {ids.max()}, and the tokenizer has {vocab_size} ids: it was tokenised with"
            " another, or is of another type; set model.tokenizer_path to the one that made it"
        )
    return ids.tolist()


def pack(
    documents: Iterator[tuple[Position, Document]],
    tokenizer: Encoder,
    *,
    seq_len: int,
    start: Cursor,
    locate: Callable[[Position, Document], str] | None = None,
) -> Iterator[tuple[Tokens, Cursor]]:
    """Sequences (seq_len + 1,) of documents that begin with that of `start`, each with the cursor behind it.

    At the end of the data the last sequence may be shorter, but never shorter than one input and its label.
    """
    packer = Packer(documents, start, locate)
    while True:
        fill({packer: seq_len + 1}, tokenizer)
        if packer.num_tokens < 2:
            return
        yield packer.take(seq_len), packer.cursor
