"""The one global order of a run's sequences, whatever the number of ranks; and a rank's share of it.

    sequence i of the run  ->  sequence j of one source     the one that is furthest behind its weight
    sequence j of a source ->  number j // N of stream j % N, of its N streams (documents.py), each packed by itself
    a step                 ->  the next `global_batch` sequences; sorted by stream, and cut into a block for each rank

So ranks, microbatches and restarts only divide what is read, and a rank tokenises the streams of its own block: with as
many streams as a global batch has sequences, nobody else's. Where there are fewer streams, or another global batch than
the run began with, some streams are read by several ranks, each of which passes over the others' sequences.

A place is, for each source, how many of its sequences were taken, and the cursors of its streams behind them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from torchtitan.datasets.documents import Dealing, DocumentStreams
from torchtitan.datasets.packing import Cursor, Encoder, Packer, Tokens, fill

PASSED_OVER_TOGETHER = 16


@dataclass(frozen=True)
class Division:
    """How a step's sequences are divided: over ranks, and on each into microbatches."""

    rank: int
    world_size: int
    batch_size: int
    """Sequences of a microbatch."""
    global_batch: int
    """Sequences of a step; microbatches and ranks divide it."""
    seq_len: int


@dataclass
class SourcePlace:
    """How far a run has read one source."""

    dealing: Dealing
    taken: int = 0
    """Sequences, of all ranks."""
    cursors: dict[int, Cursor] = field(default_factory=dict)
    """Of streams that have begun; in a rank's snapshot, of those that it is to save."""

    def count(self, stream: int) -> int:
        """How many of the sequences were the stream's."""
        return (self.taken - stream + self.dealing.streams - 1) // self.dealing.streams


@dataclass
class Place:
    """How far a run has read."""

    sources: list[SourcePlace]
    scheduled: list[int] = field(default_factory=list)
    """Of each source, sequences since the weights are what they are."""


@dataclass(frozen=True)
class _Wanted:
    source: int
    stream: int
    number: int


class SequenceReader:
    """A rank's sequences from a place on, microbatch by microbatch, for ever."""

    def __init__(
        self,
        sources: Sequence[DocumentStreams],
        weights: Sequence[float],
        tokenizer: Encoder,
        division: Division,
        start: Place,
    ) -> None:
        self._weights = [weight / sum(weights) for weight in weights]
        self._tokenizer = tokenizer
        self._division = division
        self._start = start
        self._readers = [_StreamReader(*both, division) for both in zip(sources, start.sources, strict=True)]

    def read(self) -> Iterator[tuple[NDArray[np.int32], list[int], Place | None]]:
        """Rows (batch_size, seq_len + 1); of each, the number of its source; behind the last of a step, the place."""
        share = self._division.global_batch // self._division.world_size
        begin = self._division.rank * share
        taken = [place.taken for place in self._start.sources]
        scheduled = list(self._start.scheduled) or [0 for _ in taken]
        while True:
            wanted = []
            for source, n in enumerate(self._schedule(scheduled)):
                wanted += self._readers[source].number(range(taken[source], taken[source] + n), source)
                taken[source] += n
                scheduled[source] += n
            # By stream first, so that a rank's block is of few streams, and of the same ones in each step.
            wanted.sort(key=lambda one: (one.source, one.stream, one.number))
            mine = wanted[begin : begin + share]
            for i in range(0, share, self._division.batch_size):
                microbatch = mine[i : i + self._division.batch_size]
                rows, sources = np.stack(self._take(microbatch)), [one.source for one in microbatch]
                last = i + self._division.batch_size == share
                yield rows, sources, self._get_place(taken, scheduled) if last else None

    def get_place(self) -> Place:
        """Where it begins, with this rank's part of the cursors."""
        return self._get_place([place.taken for place in self._start.sources], self._start.scheduled)

    def _schedule(self, scheduled: list[int]) -> list[int]:
        """How many of the next step's sequences are of each source: each is of the one that is furthest behind."""
        if len(scheduled) == 1:
            return [self._division.global_batch]
        counts, total = list(scheduled), sum(scheduled)
        for i in range(total + 1, total + 1 + self._division.global_batch):
            behind = [weight * i - count for weight, count in zip(self._weights, counts, strict=True)]
            counts[behind.index(max(behind))] += 1
        return [count - before for count, before in zip(counts, scheduled, strict=True)]

    def _take(self, wanted: Sequence[_Wanted]) -> list[Tokens]:
        seq_len = self._division.seq_len
        packers = [self._readers[one.source].get_packer(one.stream) for one in wanted]
        needs: dict[Packer, int] = {}
        for packer, one in zip(packers, wanted, strict=True):
            reader = self._readers[one.source]
            while (ahead := one.number - reader.counts[one.stream]) > PASSED_OVER_TOGETHER:
                fill({packer: PASSED_OVER_TOGETHER * seq_len + 1}, self._tokenizer)
                reader.take(one.stream, PASSED_OVER_TOGETHER)
            needs[packer] = (ahead + 1) * seq_len + 1
        fill(needs, self._tokenizer)
        # What comes before the one that is wanted is another rank's.
        return [
            reader.take(one.stream, one.number + 1 - reader.counts[one.stream])
            for one, reader in ((one, self._readers[one.source]) for one in wanted)
        ]

    def _get_place(self, taken: list[int], scheduled: list[int]) -> Place:
        sources = [reader.get_place(n) for reader, n in zip(self._readers, taken, strict=True)]
        return Place(sources, list(scheduled))


class _StreamReader:
    """The streams of one source of which this rank has needed something."""

    def __init__(self, documents: DocumentStreams, start: SourcePlace, division: Division) -> None:
        self.counts: dict[int, int] = {}
        """Of each stream, how many sequences were taken or passed over here."""
        self._documents = documents
        self._start = start
        self._division = division
        self._packers: dict[int, Packer] = {}

    def number(self, sequences: range, source: int) -> list[_Wanted]:
        n = self._start.dealing.streams
        return [_Wanted(source, j % n, j // n) for j in sequences]

    def get_packer(self, stream: int) -> Packer:
        if stream not in self._packers:
            cursor = self._start.cursors.get(stream, Cursor())
            documents = self._documents.read(stream, cursor.position)
            self._packers[stream] = Packer(documents, cursor, partial(self._documents.locate, stream))
            self.counts[stream] = self._start.count(stream)
        return self._packers[stream]

    def take(self, stream: int, n: int) -> Tokens:
        """The last of the stream's next n >= 1 sequences."""
        self.counts[stream] += n
        for _ in range(n):
            tokens = self._packers[stream].take(self._division.seq_len)
        return tokens

    def get_place(self, taken: int) -> SourcePlace:
        """With the cursors of those streams whose last sequence was this rank's, and of its part of those of which
        nobody has taken one since the start.
        """
        place = SourcePlace(self._start.dealing, taken)
        for stream, count in self.counts.items():
            if count == place.count(stream) > self._start.count(stream):
                place.cursors[stream] = self._packers[stream].cursor
        own, all_ranks = self._division.rank, self._division.world_size
        for stream, cursor in self._start.cursors.items():
            is_own = stream * all_ranks // self._start.dealing.streams == own
            if is_own and place.count(stream) == self._start.count(stream):
                place.cursors[stream] = cursor
        return place
