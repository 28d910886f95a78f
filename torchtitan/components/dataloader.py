"""Batches of token ids for one data-parallel rank, made ahead of the step by a thread.

    B sequences per batch, S tokens per sequence

Training reads the run's sequences in their one order (datasets/sequences.py), without end, and its place can be saved
and gone on from to the token, by any number of ranks. Validation reads all documents once, in an order that no run
changes: every layout sees the same sequences, every rank the same number of batches, and no token is dropped.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map

from torchtitan.components.data_sources import compare_tokenizers, open_together
from torchtitan.components.data_state import Reading, load_place, save_place
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import DatasetError
from torchtitan.config.mixture import parse_mixture
from torchtitan.config.sections import Training, Validation
from torchtitan.datasets import (
    Cursor,
    Division,
    DocumentStreams,
    Place,
    SequenceReader,
    SourcePlace,
    choose_dealing,
    find_validation_dataset,
    get_dataset_names,
    pack,
)
from torchtitan.datasets.tokens import TokenFiles
from torchtitan.distributed.utils import dist_max
from torchtitan.protocols.sequences import Documents
from torchtitan.tools.logging import logger

PREFETCHED_BATCHES = 8
VALIDATION_SEED = 0
STOP_TIMEOUT_SECONDS = 5.0
PATIENCE_SECONDS = 1.0
"""How long a rank that was asked to stop waits for a batch."""

Rows = NDArray[np.int32]
"""(B, S + 1) token ids; IGNORE_INDEX where a sequence has ended."""

T = TypeVar("T")


class Batch(NamedTuple):
    """Token ids and, at each place, the id that follows; on the CPU, in pinned memory where there is a GPU."""

    tokens: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE_INDEX where there is nothing to predict
    documents: Documents | None = None
    """Those that do not see each other, where document_mask.py has marked them."""
    sources: Tensor | None = None  # (B,) int64
    """Of a mixture, the number of each sequence's dataset."""

    def to(self, device: torch.device, *, labels_stay: bool = False) -> tuple[Tensor, Tensor, Documents | None]:
        """What the model works on; with labels_stay the labels are left where they are."""
        moving = self.tokens, None if labels_stay else self.labels, self.documents
        tokens, labels, documents = tree_map(lambda x: x if x is None else x.to(device, non_blocking=True), moving)
        return tokens, self.labels if labels_stay else labels, documents


def build_dataloader(
    *,
    training: Training,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_world_size: int,
    batch_size: int,
    global_batch_size: int,
    seq_len: int,
    seed: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> "TrainingDataLoader":
    """For training: see the top of this file.

    Args:
        training: says what is read.
        global_batch_size: sequences of a step; ranks times batch_size divide it.
        asked_to_stop: then it no longer waits for data that do not come.

    Raises DatasetError: the data is missing, empty or in no known format.
    """
    parts = parse_mixture(training.datasets)
    names = get_dataset_names()
    # What is no dataset is a path, and read as `dataset` says.
    readers = [part.name if part.name in names else training.dataset for part in parts]
    paths = [None if part.name in names else str(Path(part.name).expanduser()) for part in parts]
    if not parts:
        readers, paths = [training.dataset], [training.dataset_path]
    skip = training.bad_rows == "skip"
    sources = [open_together(*both, skip_bad_rows=skip) for both in zip(readers, paths, strict=True)]
    fingerprint = tokenizer.fingerprint
    compare_tokenizers(fingerprint, tokenizer)
    for source in sources:
        if isinstance(source, TokenFiles) and source.tokenizer not in (None, fingerprint):
            raise DatasetError(
                f"{source.name}: it was tokenised with another tokenizer than this run's; set"
                " model.tokenizer_path to the one that made it"
            )
    weights = [part.weight for part in parts] or [1.0]
    places = []
    for source, weight in zip(sources, weights, strict=True):
        share = weight / sum(weights)
        places.append(SourcePlace(choose_dealing(source, max(1, round(share * global_batch_size)))))
        of = f"{100 * share:.4g}% " if len(sources) > 1 else ""
        logger.info(f"Training data: {of}{source.name}, in {len(source)} shards")
        if (streams := places[-1].dealing.streams) < dp_world_size * share:
            logger.info(
                f"{dp_world_size} data-parallel ranks share {streams} streams of it: more files would spare work"
            )
    return TrainingDataLoader(
        Reading([part.name for part in parts] or [training.dataset], readers, sources, fingerprint),
        weights,
        tokenizer,
        Division(dp_rank, dp_world_size, batch_size, global_batch_size, seq_len),
        seed,
        Place(places),
        asked_to_stop,
    )


def build_validation_dataloader(
    validation: Validation,
    tokenizer: Tokenizer,
    *,
    training: Training,
    dp_rank: int,
    dp_world_size: int,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> "ValidationDataLoader":
    """For validation; raises as build_dataloader does. training: what is held out may be of its data."""
    skip_bad_rows = training.bad_rows == "skip"
    name = find_validation_dataset(training, validation)
    source = open_together(name, validation.dataset_path, skip_bad_rows=skip_bad_rows)
    logger.info(f"Validation data: {source.name}, in {len(source)} shards")
    documents = DocumentStreams(source, seed=VALIDATION_SEED, infinite=False)
    batch_size, seq_len = validation.local_batch_size, validation.seq_len
    return ValidationDataLoader(documents, tokenizer, dp_rank, dp_world_size, batch_size, seq_len, asked_to_stop)


@dataclass
class TrainingDataLoader:
    """Endless; iterating again goes on behind the last batch that was handed out."""

    reading: Reading
    weights: list[float]
    tokenizer: Tokenizer
    division: Division
    seed: int
    """Of the documents' order: the one it was built with, or a loaded state's."""
    start: Place
    asked_to_stop: Callable[[], bool] = lambda: False
    gave_up: bool = False
    """Asked to stop, it waited in vain for a batch: those from then on are stand-ins, of a step that is left out."""

    def __post_init__(self) -> None:
        self._ahead: Prefetcher[tuple[Rows, list[int], Place | None]] | None = None
        self.place = self._build_reader().get_place()
        """Behind the last whole step that was handed out; what is read ahead does not count."""

    def __iter__(self) -> Iterator[Batch]:
        if self._ahead is None:
            self._ahead = Prefetcher(self._build_reader().read(), self.asked_to_stop)
        for rows, sources, place in self._ahead:
            self.place = place or self.place
            yield _to_batch(rows)._replace(sources=torch.tensor(sources))
        while self._ahead is not None:  # it has not been closed
            self.gave_up = True
            # which labels count, if any, agree_on_ignored says
            word = min({0, 1, 2} - {self.tokenizer.bos_id, self.tokenizer.eos_id})
            rows = np.full((self.division.batch_size, self.division.seq_len + 1), word, np.int32)
            yield _to_batch(rows)._replace(sources=torch.zeros(len(rows), dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of `place`."""
        return save_place(self.place, self.reading, seed=self.seed, rank=self.division.rank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place that any number of ranks saved; to be called before iterating, with the parts of all.

        Raises:
            DataloaderStateError: the place cannot be found again: other data or another tokenizer.
        """
        # The order of documents is the seed's, so a run without training.seed goes on with the one it began with.
        self.start, self.seed = load_place(state_dict, self.reading, self.start)
        self.__post_init__()

    def get_tokens_by_source(self) -> dict[str, int]:
        """Of a mixture, how many tokens of each dataset the run has read; nothing of a single dataset."""
        if len(self.reading.labels) == 1:
            return {}
        both = zip(self.reading.labels, self.place.sources, strict=True)
        return {label: place.taken * self.division.seq_len for label, place in both}

    def close(self) -> None:
        """Stop reading ahead. Interpreter exit does it too."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _build_reader(self) -> SequenceReader:
        documents = [
            DocumentStreams(source, seed=self.seed, infinite=True, dealing=place.dealing)
            for source, place in zip(self.reading.sources, self.start.sources, strict=True)
        ]
        return SequenceReader(documents, self.weights, self.tokenizer, self.division, self.start)


@dataclass
class ValidationDataLoader:
    """One pass over the data each time it is iterated, always the same batches.

    Batches are kept as they are first made (4 bytes a token), and each later pass costs nothing.
    """

    documents: DocumentStreams
    tokenizer: Tokenizer
    dp_rank: int
    dp_world_size: int
    batch_size: int
    seq_len: int
    asked_to_stop: Callable[[], bool] = lambda: False
    """Then a pass ends where data do not come."""
    _ahead: "Prefetcher[Rows] | None" = None
    _kept: list[Rows] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        # A pass that is broken off leaves the reader where it is: a later, longer one goes on from there.
        if self._ahead is None:
            documents = self.documents.read(0, Cursor().position)
            locate = partial(self.documents.locate, 0)
            sequences = pack(documents, self.tokenizer, seq_len=self.seq_len, start=Cursor(), locate=locate)
            rows = _deal(sequences, self.dp_rank, self.dp_world_size, self.batch_size, self.seq_len)
            self._ahead = Prefetcher(rows, self.asked_to_stop)
        ahead, kept = self._ahead, self._kept
        for index in count():
            if index == len(kept):
                if (made := next(ahead, None)) is None:
                    return
                kept.append(made)
            yield _to_batch(kept[index])

    def close(self) -> None:
        """Stop reading ahead, as above."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead, self._kept = None, []


def _deal(
    sequences: Iterator[tuple[NDArray[np.int32], Cursor]], rank: int, world_size: int, batch_size: int, seq_len: int
) -> Iterator[Rows]:
    """This rank's rows of each global batch; where the data ends, rows are filled up with IGNORE_INDEX."""
    while group := list(islice(sequences, world_size * batch_size)):
        rows = np.full((batch_size, seq_len + 1), IGNORE_INDEX, dtype=np.int32)
        for row, (sequence, _) in zip(rows, group[rank * batch_size :], strict=False):
            row[: len(sequence)] = sequence
        yield rows


def agree_on_ignored(batches: list[Batch], axis: DeviceMesh, device: torch.device, *, stand_in: bool) -> None:
    """Have stand-ins ignore the labels that other ranks of the axis, which have the batches themselves, ignore.

    The sizes of what a loss that takes labels on the host communicates hang on them. Only who has stand-ins waits.
    """
    if axis.size() == 1:
        return
    counts = torch.stack([batch.labels != IGNORE_INDEX for batch in batches]).to(torch.uint8) * (not stand_in)
    counts = counts.pin_memory() if device.type == "cuda" else counts
    of_all = dist_max(counts.to(device, non_blocking=True), axis)
    if stand_in:
        for i, (batch, counts) in enumerate(zip(batches, of_all.cpu().bool(), strict=True)):
            batches[i] = batch._replace(labels=batch.labels.where(counts, IGNORE_INDEX))


def _to_batch(rows: Rows) -> Batch:
    ids = torch.from_numpy(rows).long()
    # Inputs that no label follows may be anything, but must be ids.
    batch = Batch(tokens=ids[:, :-1].clamp(min=0), labels=ids[:, 1:].contiguous())
    if torch.cuda.is_available():  # in this thread, which has the right device
        return Batch(batch.tokens.pin_memory(), batch.labels.pin_memory())
    return batch


class Prefetcher(Generic[T]):
    """Takes items from an iterator in a thread, PREFETCHED_BATCHES ahead; its errors are raised here, in order.

    asked_to_stop: then it ends where an item does not come within PATIENCE_SECONDS.
    """

    def __init__(self, items: Iterator[T], asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        self._asked_to_stop = asked_to_stop
        self._queue: queue.Queue[T | _End] = queue.Queue(PREFETCHED_BATCHES)
        self._end: _End | None = None
        stop = threading.Event()
        # A daemon, because others are joined at exit before anything could tell them to stop.
        thread = threading.Thread(target=_fill, args=(self._queue, items, stop), name="dataloader", daemon=True)
        self._stop = weakref.finalize(self, _stop, self._queue, stop, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item: T | _End | None = self._end
        while item is None:
            try:
                item = self._queue.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                item = _End(StopIteration()) if self._asked_to_stop() else None
        if isinstance(item, _End):
            self._end = item
            raise item.error
        return item

    def close(self) -> None:
        """Stop the thread; iterating ends."""
        self._stop()
        self._end = _End(StopIteration())


class _End(NamedTuple):
    """What ends the items: StopIteration, or the error that came instead of the next one."""

    error: BaseException


def _fill(filled: "queue.Queue[T | _End]", items: Iterator[T], stop: threading.Event) -> None:
    error: BaseException = StopIteration()
    try:
        for item in items:
            filled.put(item)
            if stop.is_set():
                return
    except BaseException as e:  # a tokenizer's panic and a function's SystemExit too: the step must not wait for ever
        error = e
    filled.put(_End(error))


def _stop(filled: "queue.Queue[T | _End]", stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    # The thread may wait for room. Once there is some, it puts one more item at most before it sees `stop`.
    while not filled.empty():
        filled.get()
    thread.join(timeout=STOP_TIMEOUT_SECONDS)
