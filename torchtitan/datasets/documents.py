"""The order in which one data rank sees documents: shuffled, dealt to ranks, endless if asked, resumable.

Shuffling has two levels. Each epoch permutes all shards; the documents of consecutive shards are then
gathered in windows of some MiB, and each window is permuted. Both permutations are functions of the
seed and the position, so a position is five integers and a resume reads one window again, no more.

Ranks get different shards where there are enough of them. With few shards, every rank goes through all
of them and takes each `world_size`-th document, so a single file can feed many ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.source import Source
from torchtitan.tools.logging import logger

WINDOW_CHARS = 8 * 2**20
WINDOW_DOCUMENTS = 16384


@dataclass(frozen=True)
class Position:
    """Where a document is in a rank's order."""

    epoch: int = 0
    shard: int = 0
    """How many of the rank's shards were read to the end before the window began."""
    row: int = 0
    """How many documents of the next shard came before the window."""
    num_before: int = 0
    """How many documents of the epoch this rank had read, its own or not, before the window."""
    index: int = 0
    """How many of the window's documents came before this one."""


@dataclass(frozen=True)
class DocumentStream:
    """The documents of data rank `rank` out of `world_size`."""

    source: Source
    seed: int
    infinite: bool
    rank: int = 0
    world_size: int = 1

    @property
    def deals_shards(self) -> bool:
        """Whether ranks get different shards, rather than different documents of the same shards."""
        return len(self.source) >= self.source.min_shards_per_rank * self.world_size

    def read(self, start: Position) -> Iterator[tuple[Position, str]]:
        """Documents from `start` on, each with its position."""
        while True:
            num_read = 0
            for position, document in self._read_epoch(start):
                num_read += 1
                yield position, document
            # Only a whole epoch tells that there is nothing: a resume may begin at an epoch's end.
            if num_read == 0 and start == Position(start.epoch) and not self._has_documents_later():
                raise DatasetError(self._explain_nothing())
            if not self.infinite:
                return
            start = Position(start.epoch + 1)
            if start.epoch.bit_count() == 1:  # 1, 2, 4, ...: small data would fill the log
                logger.info(
                    f"Reading ahead: every document of this data rank was read; epoch {start.epoch} of"
                    f" {self.source.name} begins"
                )

    def _has_documents_later(self) -> bool:
        """Whether an epoch without documents for this rank is followed by others: it had only shards without any."""
        if not (self.infinite and self.deals_shards):
            return False
        return any(True for shard in range(len(self.source)) for _ in self.source.read(shard))

    def _read_epoch(self, start: Position) -> Iterator[tuple[Position, str]]:
        shards = self._permutation(len(self.source), start.epoch)
        if self.deals_shards:
            shards = shards[self.rank :: self.world_size]
        num_before, index = start.num_before, start.index
        for shard, row, window in self._read_windows(shards, start.shard, start.row):
            order = self._permutation(len(window), start.epoch, shard, row)
            if not self.deals_shards:
                order = [i for i in order if (num_before + i) % self.world_size == self.rank]
            for i in range(index, len(order)):
                yield Position(start.epoch, shard, row, num_before, i), window[order[i]]
            num_before, index = num_before + len(window), 0

    def _read_windows(self, shards: Sequence[int], shard: int, row: int) -> Iterator[tuple[int, int, list[str]]]:
        """Windows from a place on, each with the place where it begins."""
        window: list[str] = []
        num_chars = 0
        begin = (shard, row)
        for s in range(shard, len(shards)):
            skip = row if s == shard else 0
            for r, document in enumerate(islice(self.source.read(shards[s]), skip, None), start=skip):
                window.append(document)
                num_chars += len(document)
                if num_chars >= WINDOW_CHARS or len(window) >= WINDOW_DOCUMENTS:
                    yield *begin, window
                    window, num_chars, begin = [], 0, (s, r + 1)
        if window:
            yield *begin, window

    def _permutation(self, n: int, *what: int) -> list[int]:
        return np.random.default_rng([self.seed, *what]).permutation(n).tolist()

    def _explain_nothing(self) -> str:
        if self.world_size == 1:
            return f"{self.source.name}: there is no document with text in it"
        return (
            f"{self.source.name}: there is no document for data rank {self.rank} of {self.world_size};"
            " give more data or use fewer data-parallel ranks"
        )
