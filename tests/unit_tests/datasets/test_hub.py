"""Hugging Face `datasets` as a source: shards, any kind of its datasets, and its errors in our words."""

import pytest

from torchtitan.config.errors import DatasetError
from torchtitan.datasets import DocumentStreams, HuggingFaceStream, Position, choose_dealing, open_dataset

datasets = pytest.importorskip("datasets")


def generate(shards):
    for shard in shards:
        for row in range(5):
            yield {"text": f"{shard}-{row}" if row else (None if shard % 2 else ""), "id": row}


def make_iterable(num_shards: int = 4):
    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(num_shards))})


def read_all(source) -> list[str]:
    return [document for shard in range(len(source)) for document in source.read(shard, 0, 1)]


EXPECTED = [f"{shard}-{row}" for shard in range(4) for row in range(1, 5)]


def test_streamed_dataset_is_read_by_shard():
    source = HuggingFaceStream(make_iterable, name="mine", text="text")
    assert len(source) == 4
    assert list(source.read(2)) == [f"2-{row}" for row in range(1, 5)]  # rows without text are no documents
    assert read_all(source) == EXPECTED


def test_dataset_on_the_disk_is_read_by_shard():
    source = HuggingFaceStream(lambda: datasets.Dataset.from_list(list(make_iterable())), name="mine", text="text")
    assert len(source) == 20
    assert read_all(source) == EXPECTED


@pytest.mark.parametrize(("sequences", "num_streams"), [(1, 1), (3, 1), (4, 4), (16, 4)])
def test_streams_cover_the_shards_without_overlap(sequences, num_streams):
    """A shard, which is a download, is read by one stream."""
    source = HuggingFaceStream(make_iterable, name="mine", text="text")
    dealing = choose_dealing(source, sequences)
    assert (dealing.streams, dealing.parts) == (num_streams, 1)
    documents = DocumentStreams(source, 0, False, dealing)
    streams = [[text for _, text in documents.read(stream, Position())] for stream in range(num_streams)]
    assert sorted(text for stream in streams for text in stream) == EXPECTED
    assert all(streams)


def test_several_datasets_are_named():
    several = {"train": make_iterable(), "test": make_iterable()}
    with pytest.raises(DatasetError, match=r"mine is several datasets, train, test; load one of them: split="):
        HuggingFaceStream(lambda: several, name="mine", text="text")


@pytest.mark.parametrize("make", [make_iterable, lambda: datasets.Dataset.from_list(list(make_iterable()))])
def test_a_shuffle_without_a_seed_is_named(make):
    with pytest.raises(DatasetError, match=r"mine is in another order each time .*shuffle\(\) without a seed.*give it"):
        HuggingFaceStream(lambda: make().shuffle(), name="mine", text="text")
    one, same, other = (
        HuggingFaceStream(lambda seed=seed: make().shuffle(seed=seed), name="mine", text="text") for seed in (1, 1, 2)
    )
    assert one.order == same.order != other.order  # which ranks compare
    assert read_all(one) == read_all(same) != read_all(other)


def test_wrong_rows_are_named():
    with pytest.raises(DatasetError, match="mine, row 1 of shard 0 has no field 'body' \\(it has 'text', 'id'\\)"):
        read_all(HuggingFaceStream(make_iterable, name="mine", text="body"))


def test_failing_read_is_a_dataset_error():
    def fail(shards):
        yield {"text": "fine"}
        raise ConnectionError("the network\nis down")

    def load():
        return datasets.IterableDataset.from_generator(fail, gen_kwargs={"shards": [0]})

    source = HuggingFaceStream(load, name="mine", text="text")
    with pytest.raises(DatasetError, match="mine, after row 1 of shard 0: cannot be read: the network is down; check"):
        read_all(source)


def test_c4_streams_from_the_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return make_iterable()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_all(open_dataset("c4")) == EXPECTED
    assert open_dataset("c4_validation").name == "allenai/c4/en (validation) of the Hugging Face hub"
    arguments = ("allenai/c4", "en")
    assert calls == [(arguments, {"split": s, "streaming": True}) for s in ("train", "validation")]


def test_hub_that_cannot_be_reached_is_a_dataset_error(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"allenai/c4/en \(train\) of the Hugging Face hub cannot be opened: Couldn't reach the Hub; check the network,"
        " or give a local file or folder as dataset_path"
    )
    with pytest.raises(DatasetError, match=message):
        open_dataset("c4")
