"""Order: each epoch every document once over all streams, shuffled by the seed; any place can be found again."""

from itertools import islice
from pathlib import Path

import pytest

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.documents import Dealing, DocumentStreams, Position, choose_dealing


class Shards:
    """A source in memory. Part p of n of a shard is each n-th of its documents."""

    name = "shards in memory"
    fingerprint = "memory"

    def __init__(self, *lengths: int, max_parts: int = 1, max_streams: int = 10**6) -> None:
        self.shards = [[f"{shard}-{row}" for row in range(length)] for shard, length in enumerate(lengths)]
        self.max_parts, self.max_streams = max_parts, max_streams

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, shard, part, num_parts):
        return iter(self.shards[shard][part::num_parts])

    def all(self) -> list[str]:
        return [document for shard in self.shards for document in shard]


MANY = Shards(3, 0, 5, 1, 4, 2, 6, 1, 1, 3, 0, 7)
FEW = Shards(30, 17, max_parts=16)
ONE = Shards(40, max_parts=16)
BEGIN = Position()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_DOCUMENTS", 7)


def streams(source, n=1, *, seed=0, infinite=False) -> DocumentStreams:
    dealing = choose_dealing(source, n)
    assert dealing.streams == n
    return DocumentStreams(source, seed=seed, infinite=infinite, dealing=dealing)


def texts(documents: DocumentStreams, stream: int = 0, start: Position = BEGIN) -> list[str]:
    return [text for _, text in documents.read(stream, start)]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_streams_cover_all_documents_without_overlap(source, n):
    documents = streams(source, n)
    for epoch in range(3):
        read = [texts(documents, stream, Position(epoch)) for stream in range(n)]
        assert sorted(text for stream in read for text in stream) == sorted(source.all())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_shards_are_divided_evenly(n):
    sizes = [len(texts(streams(Shards(30, 30, max_parts=16), n), stream)) for stream in range(n)]
    assert max(sizes) <= 1.25 * 60 / n


@pytest.mark.parametrize(
    ("num_shards", "max_parts", "max_streams", "sequences", "expected"),
    [
        (10_000, 32, 10**6, 64, (64, 1)),
        (1024, 1, 10**6, 1024, (1024, 1)),
        (1024, 1, 10**6, 768, (384, 1)),  # 256 of 768 streams would get two shards, the others one
        (1024, 1, 10**6, 1025, (1025, 1)),  # one stream goes on to the next epoch at once
        (1024, 16, 10**6, 768, (768, 2)),
        (1, 1024, 10**6, 512, (512, 410)),
        (1, 1, 128, 512, (1, 1)),  # one file that cannot be divided: all sequences are of one stream
        (25_000, 1, 128, 512, (128, 1)),
        (25_000, 1, 128, 1000, (125, 1)),
    ],
)
def test_streams_are_as_many_as_the_source_can_feed_evenly(num_shards, max_parts, max_streams, sequences, expected):
    source = Shards(*[0] * num_shards, max_parts=max_parts, max_streams=max_streams)
    dealing = choose_dealing(source, sequences)
    assert (dealing.streams, dealing.parts) == expected
    dealt = num_shards * dealing.parts / dealing.streams
    assert -(-num_shards * dealing.parts // dealing.streams) <= 1.25 * dealt


def test_windows_of_all_streams_together_are_limited():
    source = Shards(*[0] * 1024)
    assert [choose_dealing(source, n).window_chars // 2**10 for n in (1, 8, 64, 1024)] == [8192, 8192, 1024, 64]


@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_order_depends_on_seed_and_epoch_only(source):
    orders = [texts(streams(source, seed=seed), 0, Position(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == texts(streams(source, seed=0)) != source.all()


def test_one_big_shard_is_shuffled_within_windows():
    order = [int(text.split("-")[1]) for text in texts(streams(ONE))]
    assert [sorted(order[i : i + 7]) for i in range(0, 40, 7)] == [
        list(range(i, min(i + 7, 40))) for i in range(0, 40, 7)
    ]
    assert all(order[i : i + 7] != sorted(order[i : i + 7]) for i in range(0, 35, 7))


def test_window_is_limited_by_characters_too():
    documents = DocumentStreams(Shards(9), seed=0, infinite=False, dealing=Dealing(window_chars=12))
    order = [int(text.split("-")[1]) for text in texts(documents)]
    assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_every_position_can_be_gone_on_from(source, n):
    documents = streams(source, n, infinite=True)
    undisturbed = list(islice(documents.read(n - 1, BEGIN), 120))  # over several epochs
    assert undisturbed[-1][0].epoch > 1
    for i, (position, _) in enumerate(undisturbed[:80]):
        assert list(islice(documents.read(n - 1, position), 40)) == undisturbed[i : i + 40]


def test_some_epochs_are_told(caplog):
    num_documents = len(texts(streams(ONE)))
    list(islice(streams(ONE, infinite=True).read(0, BEGIN), 5 * num_documents + 1))
    assert caplog.messages == [
        f"Reading ahead: every document was read; epoch {epoch} of shards in memory begins" for epoch in (1, 2, 4)
    ]


def test_finite_data_ends():
    assert len(texts(streams(ONE))) == 40


@pytest.mark.parametrize("infinite", [True, False])
def test_no_document_is_an_error(infinite):
    with pytest.raises(DatasetError, match="shards in memory: there is no document with text in it"):
        list(streams(Shards(0, 0), infinite=infinite).read(0, BEGIN))


@pytest.mark.parametrize("stream", [0, 1])
def test_an_epoch_whose_shards_hold_nothing_for_a_stream_is_passed_over(stream):
    """Empty files, or pieces inside a line that is longer than they: the next permutation deals others."""
    documents = streams(Shards(3, 0, 3, 0), 2, infinite=True)
    read = list(islice(documents.read(stream, BEGIN), 60))
    epochs = {position.epoch for position, _ in read}
    assert len(epochs) < 1 + max(epochs)  # some were passed over
    for i, (position, _) in enumerate(read[:40]):
        assert list(islice(documents.read(stream, position), 20)) == read[i : i + 20]


def test_fewer_documents_than_streams_feed_all_of_them():
    """Those that get none in an epoch read the next ones."""
    documents = streams(Shards(2, max_parts=16), 8, infinite=True)
    for stream in range(8):
        assert {text for _, text in islice(documents.read(stream, BEGIN), 20)} == {"0-0", "0-1"}


LAYOUTS = {
    "one JSON lines file of 10 GB": Shards(*[0] * 9537, max_parts=1024),
    "25,000 files of Parquet": Shards(*[0] * 25_000, max_parts=16, max_streams=512),
    "1,024 compressed files": Shards(*[0] * 1024, max_streams=512),
    "1,024 files of the hub": Shards(*[0] * 1024, max_streams=128),
    "one compressed file": Shards(0, max_streams=512),
}


def simulate(source: Shards, ranks: int) -> list[str]:
    """A row of the table: what the ranks of a run fetch over 12 steps, by the rule of sequences.py."""
    steps, batch = 12, max(ranks, 64)
    dealing = choose_dealing(source, batch)
    n, share = dealing.streams, batch // ranks
    counts: list[dict[int, int]] = [{} for _ in range(ranks)]
    for step in range(steps):
        wanted = sorted((j % n, j // n) for j in range(step * batch, (step + 1) * batch))
        for rank, count in enumerate(counts):
            for stream, number in wanted[rank * share : (rank + 1) * share]:
                count[stream] = number + 1  # what comes before is passed over
    fetched = sum(sum(count.values()) for count in counts) / (steps * batch)
    most = max(map(len, counts))
    return [f"{ranks:,}", f"{n:,}", f"{fetched:.1f}", str(most), f"{most * dealing.window_chars / 2**20:.1f} MiB"]


def test_the_table_of_the_documentation_is_what_the_ranks_fetch():
    rows = [(name, n) for name in LAYOUTS for n in (1, 8, 96, 768, 1025, 4096)]
    lines = [f"| {name} | {' | '.join(simulate(LAYOUTS[name], n))} |" for name, n in rows]
    page = Path("docs/datasets.md").read_text()
    assert "\n".join(lines) in page
