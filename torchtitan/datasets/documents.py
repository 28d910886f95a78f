"""The order in which documents are read: dealt to streams, shuffled, endless if asked, resumable.

A run reads a source in N streams, each of which is packed into sequences by itself. How many there are depends on the
source and on the global batch, never on the number of ranks: a rank reads whichever it needs (sequences.py), so that
any number of ranks reads the same.

Shuffling has two levels. Each epoch permutes the shards, or parts of them where there are few, and deals them to
the streams; the documents of a stream's consecutive parts are gathered in windows, and each window is permuted. Both
permutations are functions of the seed and the position, so a position is four integers and a resume reads one window
again, no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.source import Document, Source
from torchtitan.tools.logging import logger

WINDOW_CHARS = 8 * 2**20
WINDOW_DOCUMENTS = 16384
ALL_WINDOWS_CHARS = 64 * 2**20
"""Of all streams together: one rank may have to fill them all before its first batch."""
MIN_WINDOW_CHARS = 64 * 2**10
CHARS_OF_TOKEN = 4  # about
MAX_UNEVENNESS = 1.25
"""No stream gets over a quarter more shards than the mean, so a quarter of an epoch is read twice at most before the
last of it is read once."""


@dataclass(frozen=True)
class Position:
    """Where a document is in a stream's order."""

    epoch: int = 0
    shard: int = 0
    """How many of the stream's parts of shards were read to the end before the window began."""
    row: int = 0
    """How many documents of the next part came before the window."""
    index: int = 0
    """How many of the window's documents came before this one."""


@dataclass(frozen=True)
class Dealing:
    """How a source's documents are dealt: part of what a position means, and so of a checkpoint."""

    streams: int = 1
    parts: int = 1
    """Into which each shard is divided."""
    window_chars: int = WINDOW_CHARS


def choose_dealing(source: Source, sequences: int) -> Dealing:
    """For a source that gives so many sequences to each global batch.

    One stream for each of them, and whole shards, where they are enough to be dealt evenly. Else shards are divided, as
    far as the source allows, or, where one is expensive to open, some of a batch's sequences come from the same stream.
    """
    best: tuple[int, int] | None = None
    for streams in dict.fromkeys(sequences // n for n in range(1, sequences + 1)):
        if best is not None and 2 * streams < best[0]:
            break
        if streams > source.max_streams or (best is not None and sequences % streams):
            continue
        if (parts := _get_parts(source, streams)) is not None:
            best = streams, parts
            if sequences % streams == 0:  # then the same of a rank's sequences are of the same stream in each step
                break
    assert best is not None, "one stream takes any number of shards"
    streams, parts = best
    return Dealing(streams, parts, min(WINDOW_CHARS, max(MIN_WINDOW_CHARS, ALL_WINDOWS_CHARS // streams)))


def _get_parts(source: Source, streams: int) -> int | None:
    """The fewest parts of each shard that can be dealt evenly, if any."""
    for parts in range(1, source.max_parts + 1):
        n = len(source) * parts
        if -(-n // streams) * streams <= MAX_UNEVENNESS * n:
            return parts
    return None


@dataclass(frozen=True)
class DocumentStreams:
    """The documents of a source in `dealing.streams` streams."""

    source: Source
    seed: int
    infinite: bool
    dealing: Dealing = Dealing()
    _of_epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False)

    def read(self, stream: int, start: Position) -> Iterator[tuple[Position, Document]]:
        """Documents of a stream from `start` on, each with its position."""
        while True:
            num_read = 0
            for position, document in self._read_epoch(stream, start):
                num_read += 1
                yield position, document
            # None at all in an epoch: the stream's parts held none, and the next permutation deals it others.
            if num_read == 0 and start == Position(start.epoch) and not self._has_documents():
                raise DatasetError(f"{self.source.name}: there is no document with text in it")
            if not self.infinite:
                return
            start = Position(start.epoch + 1)
            if stream == 0 and start.epoch.bit_count() == 1:  # 1, 2, 4, ...: small data would fill the log
                logger.info(f"Reading ahead: every document was read; epoch {start.epoch} of {self.source.name} begins")

    def _has_documents(self) -> bool:
        return any(True for shard in range(len(self.source)) for _ in self.source.read(shard, 0, 1))

    def _read_epoch(self, stream: int, start: Position) -> Iterator[tuple[Position, Document]]:
        index = start.index
        for shard, row, window in self._read_windows(stream, start):
            order = np.random.default_rng([self.seed, start.epoch, shard, row]).permutation(len(window)).tolist()
            for i in range(index, len(order)):
                yield Position(start.epoch, shard, row, i), window[order[i]]
            index = 0

    def _read_windows(self, stream: int, start: Position) -> Iterator[tuple[int, int, list[Document]]]:
        """Windows from a place on, each with the place where it begins."""
        parts = self._get_parts_of(stream, start.epoch)
        window: list[Document] = []
        num_chars = 0
        begin = (start.shard, start.row)
        for s in range(start.shard, len(parts)):
            shard, part = divmod(int(parts[s]), self.dealing.parts)
            skip = start.row if s == start.shard else 0
            documents = self.source.read(shard, part, self.dealing.parts)
            for r, document in enumerate(islice(documents, skip, None), start=skip):
                window.append(document)
                num_chars += len(document) * (1 if isinstance(document, str) else CHARS_OF_TOKEN)
                if num_chars >= self.dealing.window_chars or len(window) >= WINDOW_DOCUMENTS:
                    yield *begin, window
                    window, num_chars, begin = [], 0, (s, r + 1)
        if window:
            yield *begin, window

    def locate(self, stream: int, position: Position, document: Document) -> str:
        """Where a text lies that was read at a position: its window is read again."""
        for dealt in self._get_parts_of(stream, position.epoch)[position.shard :]:
            shard, part = divmod(int(dealt), self.dealing.parts)
            if document in self.source.read(shard, part, self.dealing.parts):
                where = getattr(self.source, "find_file", None)
                return f"{self.source.name}, shard {shard}" if where is None else where(shard)
        return self.source.name

    def _get_parts_of(self, stream: int, epoch: int) -> NDArray[np.int64]:
        """A stream's, in an epoch."""
        parts = self._deal(epoch)
        if len(parts) < self.dealing.streams:  # other streams get none in each epoch
            stream = (stream + epoch) % self.dealing.streams
        return parts[stream :: self.dealing.streams]

    def _deal(self, epoch: int) -> NDArray[np.int64]:
        """All parts of all shards, permuted; the streams take turns. Kept, because they are read side by side."""
        if epoch not in self._of_epochs:
            while len(self._of_epochs) > 1:
                del self._of_epochs[next(iter(self._of_epochs))]
            n = len(self.source) * self.dealing.parts
            self._of_epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(n)
        return self._of_epochs[epoch]
