"""One order of the data for any number of ranks; ranks are simulated in this process."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchtitan.components.data_state import DataloaderStateError, Reading, load_place, save_place
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.datasets import (
    Division,
    DocumentStreams,
    Place,
    SequenceReader,
    SourcePlace,
    choose_dealing,
    open_path,
)

TOKENIZER = build_tokenizer("tests/assets/tokenizer")
DOCUMENTS = [f"document {i}: " + "naïve 例 🌍 x\n" * (i % 7) + f"end {i}" for i in range(50)]
SEQ_LEN = 16
G = 8  # sequences of a global batch

Step = list[list[int]]
"""The sequences of a step, in the order of the slots: rank by rank, microbatch by microbatch."""


def write_text(folder: Path) -> None:
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(document)


def write_one(folder: Path) -> None:
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))


def write_gz(folder: Path) -> None:
    import gzip

    for i in range(3):  # fewer streams than sequences in a global batch
        lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[i::3])
        (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


KINDS: dict[str, Callable[[Path], None]] = {"text": write_text, "one file": write_one, "gz": write_gz}


class Run:
    """The data of all ranks of a run, which may be stopped and gone on with by other ranks."""

    def __init__(self, *folders: Path, weights: tuple[float, ...] = (1.0,), names: tuple[str, ...] = ("d",)) -> None:
        sources = [open_path(folder, "text") for folder in folders]
        self.reading = Reading(names, names, sources, "tokenizer")
        self.weights = weights
        shares = [max(1, round(weight / sum(weights) * G)) for weight in weights]
        self.place = Place([SourcePlace(choose_dealing(*both)) for both in zip(sources, shares, strict=True)])
        self.seed = 0
        self.counts: list[Counter[int]] = []
        """Of each step that was read, the sequences of each source."""

    def read(self, num_steps: int, *, dp: int, batch: int, global_batch: int = G) -> list[Step]:
        """So many steps, and `place` goes on to behind them, by way of what a checkpoint holds."""
        streams = [
            DocumentStreams(source, seed=self.seed, infinite=True, dealing=place.dealing)
            for source, place in zip(self.reading.sources, self.place.sources, strict=True)
        ]
        steps: list[Step] = [[] for _ in range(num_steps)]
        counts = [Counter[int]() for _ in steps]
        state: dict[str, str] = {}
        for rank in range(dp):
            division = Division(rank, dp, batch, global_batch, SEQ_LEN)
            reader = SequenceReader(streams, self.weights, TOKENIZER, division, self.place)
            rows = reader.read()
            place: Place | None = reader.get_place()
            for step, count in zip(steps, counts, strict=True):
                for _ in range(global_batch // dp // batch):
                    assert place is not None or step
                    microbatch, of, place = next(rows)
                    count.update(of)
                    step += microbatch.tolist()
            assert place is not None
            state |= save_place(place, self.reading, seed=self.seed, rank=rank)
        self.place, self.seed = load_place(state, self.reading, self.place)
        self.counts += counts
        return steps


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_DOCUMENTS", 11)
    monkeypatch.setattr("torchtitan.datasets.packing.GROUP_DOCUMENTS", 3)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    KINDS[request.param](tmp_path)
    return tmp_path


def test_any_number_of_ranks_and_microbatches_reads_the_same(folder):
    """In order, slot by slot, over several epochs."""
    alone = Run(folder).read(30, dp=1, batch=G)
    assert len(alone[0]) == G
    for dp, batch in ((1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)):
        assert Run(folder).read(30, dp=dp, batch=batch) == alone


def test_another_number_of_ranks_goes_on_with_the_undisturbed_curve(folder):
    undisturbed = Run(folder).read(40, dp=1, batch=2)
    run = Run(folder)
    read = []
    for num_steps, dp in ((5, 2), (0, 8), (1, 4), (9, 1), (3, 8), (2, 2)):
        read += run.read(num_steps, dp=dp, batch=1)
    assert read == undisturbed[: len(read)]


def test_another_global_batch_reads_nothing_twice_and_leaves_nothing_out(folder):
    """Sequence i of the run is the same one, whatever the batches that it comes in."""
    undisturbed = [tuple(row) for step in Run(folder).read(30, dp=1, batch=G) for row in step]
    run = Run(folder)
    read: list[tuple[int, ...]] = []
    for num_steps, dp, global_batch in ((3, 2, 8), (2, 3, 12), (3, 4, 4), (2, 5, 10), (1, 16, 16), (5, 1, 1)):
        for step in run.read(num_steps, dp=dp, batch=1, global_batch=global_batch):
            read += map(tuple, step)
            assert Counter(read) == Counter(undisturbed[: len(read)])


def test_another_length_goes_on_at_the_next_token(folder):
    run = Run(folder)
    short = run.read(4, dp=2, batch=2)
    cursors = run.place.sources[0].cursors
    streams = DocumentStreams(run.reading.sources[0], seed=0, infinite=True, dealing=run.place.sources[0].dealing)
    division = Division(0, 1, G, G, 50)
    rows, *_ = next(SequenceReader([streams], [1.0], TOKENIZER, division, run.place).read())
    assert len(cursors) == streams.dealing.streams
    ends, begins = Counter(row[-1] for row in short[-1]), Counter(rows[:, 0].tolist())
    if streams.dealing.streams == G:
        assert ends == begins


def test_few_streams_are_read_by_few_of_the_ranks(folder):
    """A rank tokenises what others use only where there are fewer streams than ranks, or ones that do not fit."""
    run = Run(folder)
    num_streams = run.place.sources[0].dealing.streams
    used = []
    for rank in range(4):
        streams = DocumentStreams(run.reading.sources[0], seed=0, infinite=True, dealing=run.place.sources[0].dealing)
        reader = SequenceReader([streams], [1.0], TOKENIZER, Division(rank, 4, 1, G, SEQ_LEN), run.place)
        rows = reader.read()
        for _ in range(10):
            next(rows)
        used.append(set(reader._readers[0].counts))
    assert sum(map(len, used)) == max(4, num_streams)
    assert set().union(*used) == set(range(num_streams))


def test_a_state_that_is_no_place_here_says_what_to_do(tmp_path):
    write_one(tmp_path)
    run = Run(tmp_path)
    (text,) = save_place(run.place, run.reading, seed=0, rank=0).values()
    other = text.replace(run.reading.sources[0].fingerprint, "of other files")
    for state, match in (
        ({"dp_rank_0": '{"cursor": [0, 0, 0, 0, 2, 12]}'}, "of an older version; to start the data anew, add"),
        ({"dp_rank_0": other}, "is not one in .*: files were added, removed"),
        ({}, "holds no place in the data"),
    ):
        with pytest.raises(DataloaderStateError, match=match):
            load_place(state, run.reading, run.place)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, ...]:
    folders = tuple(tmp_path / name for name in "abc")
    for folder, write in zip(folders, KINDS.values(), strict=True):
        folder.mkdir()
        write(folder)
    return folders


def get_taken(run: Run) -> list[int]:
    return [place.taken for place in run.place.sources]


def test_a_mixture_keeps_its_shares_in_each_window_and_for_any_ranks(three):
    """2,000 sequences: 70, 20 and 10% of any 200 of them, to within two; and the same ones after stops inside."""
    mixture: dict[str, Any] = {"weights": (7, 2, 1), "names": ("a", "b", "c")}
    alone, run = Run(*three, **mixture), Run(*three, **mixture)
    undisturbed = alone.read(250, dp=1, batch=G)
    assert get_taken(alone) == [1400, 400, 200]
    for size in (1, 25, 40, 125):
        for begin in range(250 - size + 1):
            window = sum(alone.counts[begin : begin + size], Counter[int]())
            assert all(abs(window[i] - share * G * size) < 2 for i, share in enumerate((0.7, 0.2, 0.1)))
    read = [step for n, dp in ((83, 2), (1, 8), (59, 1), (107, 4)) for step in run.read(n, dp=dp, batch=1)]
    assert read == undisturbed and run.counts == alone.counts


def test_a_mixture_may_change_and_each_source_goes_on(three, caplog):
    run = Run(*three[:2], weights=(1, 1), names=("a", "b"))
    run.read(4, dp=2, batch=1)
    saved = run.place
    state = save_place(saved, run.reading, seed=5, rank=0)
    other = Run(three[2], three[1], weights=(1, 3), names=("c", "b"))
    other.place, other.seed = load_place(state, other.reading, other.place)
    assert other.seed == 5
    assert get_taken(other) == [0, 16]
    assert other.place.sources[1] == saved.sources[1]
    assert caplog.messages == [
        "The checkpoint's data was read without c, which begins now",
        "The checkpoint's data was read with a, which is left out from now on",
    ]
    other.read(1, dp=1, batch=1)
    assert get_taken(other) == [2, 22]  # the new weights, from here on
    with pytest.raises(DataloaderStateError, match="not one in .*/a: 50 files of text"):
        load_place(state, Run(three[0], three[1], names=("b", "e"), weights=(1, 1)).reading, saved)
