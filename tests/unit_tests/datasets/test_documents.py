"""Order: each epoch every document once over all ranks, shuffled by the seed; any place can be found again."""

from itertools import islice

import pytest

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.documents import DocumentStream, Position


class Shards:
    """A source in memory."""

    name = "shards in memory"
    fingerprint = "memory"

    def __init__(self, *lengths: int, min_shards_per_rank: int = 1) -> None:
        self.shards = [[f"{shard}-{row}" for row in range(length)] for shard, length in enumerate(lengths)]
        self.min_shards_per_rank = min_shards_per_rank

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, shard):
        return iter(self.shards[shard])

    def all(self) -> list[str]:
        return [document for shard in self.shards for document in shard]


MANY = Shards(3, 0, 5, 1, 4, 2, 6, 1, 1, 3, 0, 7)
FEW = Shards(30, 17, min_shards_per_rank=8)
ONE = Shards(40, min_shards_per_rank=8)
BEGIN = Position()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_DOCUMENTS", 7)


def stream(source, *, seed=0, infinite=False, rank=0, world_size=1) -> DocumentStream:
    return DocumentStream(source, seed=seed, infinite=infinite, rank=rank, world_size=world_size)


def texts(documents: DocumentStream, start: Position = BEGIN) -> list[str]:
    return [text for _, text in documents.read(start)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_ranks_cover_all_documents_without_overlap(source, world_size):
    for epoch in range(3):
        ranks = [texts(stream(source, rank=r, world_size=world_size), Position(epoch)) for r in range(world_size)]
        assert sorted(text for rank in ranks for text in rank) == sorted(source.all())


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_few_shards_are_dealt_evenly(world_size):
    sizes = [len(texts(stream(FEW, rank=r, world_size=world_size))) for r in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_order_depends_on_seed_and_epoch_only(source):
    orders = [texts(stream(source, seed=seed), Position(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == texts(stream(source, seed=0)) != source.all()


def test_one_big_shard_is_shuffled_within_windows():
    order = [int(text.split("-")[1]) for text in texts(stream(ONE))]
    assert [sorted(order[i : i + 7]) for i in range(0, 40, 7)] == [
        list(range(i, min(i + 7, 40))) for i in range(0, 40, 7)
    ]
    assert all(order[i : i + 7] != sorted(order[i : i + 7]) for i in range(0, 35, 7))


def test_window_is_limited_by_characters_too(monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_CHARS", 12)
    order = [int(text.split("-")[1]) for text in texts(stream(Shards(9)))]
    assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("source", [MANY, FEW, ONE], ids=["many", "few", "one"])
def test_every_position_can_be_gone_on_from(source, world_size):
    documents = stream(source, infinite=True, rank=world_size - 1, world_size=world_size)
    undisturbed = list(islice(documents.read(BEGIN), 120))  # over several epochs
    assert undisturbed[-1][0].epoch > 1
    for i, (position, _) in enumerate(undisturbed[:80]):
        assert list(islice(documents.read(position), 40)) == undisturbed[i : i + 40]


def test_some_epochs_are_told(caplog):
    num_documents = len(texts(stream(ONE)))
    list(islice(stream(ONE, infinite=True).read(BEGIN), 5 * num_documents + 1))
    assert caplog.messages == [
        f"Reading ahead: every document of this data rank was read; epoch {epoch} of shards in memory begins"
        for epoch in (1, 2, 4)
    ]


def test_finite_data_ends():
    assert len(texts(stream(ONE))) == 40


@pytest.mark.parametrize("infinite", [True, False])
def test_no_document_is_an_error(infinite):
    with pytest.raises(DatasetError, match="shards in memory: there is no document with text in it"):
        list(stream(Shards(0, 0), infinite=infinite).read(BEGIN))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_whose_shards_hold_nothing_for_a_rank_is_passed_over(rank):
    """Empty files, or pieces inside a line that is longer than they: the next permutation deals others."""
    documents = stream(Shards(3, 0, 3, 0), infinite=True, rank=rank, world_size=2)
    read = list(islice(documents.read(BEGIN), 60))
    epochs = {position.epoch for position, _ in read}
    assert len(epochs) < 1 + max(epochs)  # some were passed over
    for i, (position, _) in enumerate(read[:40]):
        assert list(islice(documents.read(position), 20)) == read[i : i + 20]


def test_fewer_documents_than_ranks_is_an_error():
    source = Shards(2, min_shards_per_rank=8)
    assert (
        sorted(texts(stream(source, rank=0, world_size=3)) + texts(stream(source, rank=1, world_size=3)))
        == source.all()
    )
    message = "there is no document for data rank 2 of 3; give more data or use fewer data-parallel ranks"
    with pytest.raises(DatasetError, match=message):
        texts(stream(source, rank=2, world_size=3))
