"""Documents from anything that Hugging Face `datasets` can load: the hub, streamed, or a local file.

Only its public interface of shards is used, but to find a shuffle without a seed. A position is a shard and a number of
rows in it, so it means the same in every version of `datasets`. The package is imported when a dataset is opened.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import DatasetError, UnreachableDataError
from torchtitan.datasets.source import BadRows, Text, get_text

if TYPE_CHECKING:
    import datasets

MAP_STYLE_SHARDS = 1024
COMPARED_ROWS = 16
MAX_DOWNLOADS = 128
"""By all ranks together, which is also how many ranks can read without reading the same."""


class HuggingFaceStream:
    """`load` gives a `datasets.IterableDataset`, or a `datasets.Dataset` that is already on the disk.

    `name` is to change with the data that is loaded: a place in the data is one under this name.
    """

    max_streams = MAX_DOWNLOADS
    max_parts = 1  # a download would be made for each

    def __init__(self, load: Callable[[], Any], *, name: str, text: Text) -> None:
        self.name = name
        self.bad_rows = BadRows()
        self._text = text
        self.order = ""
        """Of its rows, as far as it is cheap to know: for ranks to compare. It may differ from run to run."""
        self._dataset = self._load(load)
        self.fingerprint = f"{name}, {len(self)} shards"

    @classmethod
    def of_hub(cls, path: str, config: str, *, split: str, text: Text) -> "HuggingFaceStream":
        def load() -> Any:
            import datasets  # here, because it takes a second

            return datasets.load_dataset(path, config, split=split, streaming=True)

        return cls(load, name=f"{path}/{config} ({split}) of the Hugging Face hub", text=text)

    def __len__(self) -> int:
        return self._dataset.num_shards

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[str]:
        rows = iter(self._dataset.shard(num_shards=len(self), index=shard))
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # network, decompression, file system, parsing: whatever lies below
                place = f"{self.name}, after row {number} of shard {shard}"
                raise UnreachableDataError(
                    f"{place}: cannot be read: {_one_line(error)}; check the network or the file and start again:"
                    " the run goes on from its last checkpoint"
                ) from error
            if row is None:
                return
            number += 1
            try:
                document = get_text(row, self._text)
            except ValueError as error:
                self.bad_rows.meet(f"{self.name}, row {number} of shard {shard} {error}")
                continue
            if document:
                yield document

    def _load(self, load: Callable[[], Any]) -> "datasets.IterableDataset":
        try:
            dataset = load()
        except Exception as error:
            raise UnreachableDataError(
                f"{self.name} cannot be opened: {_one_line(error)}; check the network,"
                " or give a local file or folder as dataset_path"
            ) from error
        if isinstance(dataset, dict):  # DatasetDict and IterableDatasetDict
            raise DatasetError(f"{self.name} is several datasets, {', '.join(dataset)}; load one of them: split=...")
        self.order, is_shuffled = _get_order(dataset)
        if is_shuffled and _get_order(load())[0] != self.order:
            raise DatasetError(
                f"{self.name} is in another order each time it is loaded, as by .shuffle() without a seed: each rank"
                " and each restart would read other data; give it a seed, or leave it out: training.seed shuffles"
            )
        if hasattr(dataset, "to_iterable_dataset"):
            dataset = dataset.to_iterable_dataset(num_shards=max(1, min(MAP_STYLE_SHARDS, len(dataset))))
        return dataset


def _get_order(dataset: Any) -> tuple[str, bool]:
    """A hash of some rows' order, and whether they may have been shuffled."""
    if hasattr(dataset, "to_iterable_dataset"):  # rows are on the disk, and a shuffle is an index of them
        rows = [dataset[i] for i in range(0, len(dataset), 1 + len(dataset) // COMPARED_ROWS)]
        return _hash(rows), getattr(dataset, "_indices", None) is not None
    states, layer = [], getattr(dataset, "_shuffling", None) or getattr(dataset, "_ex_iterable", None)
    while layer is not None:  # a shuffle of a stream is a layer with a generator of numbers
        if (generator := getattr(layer, "generator", None)) is not None:
            states.append(generator.bit_generator.state)
        layer = getattr(layer, "ex_iterable", None)
    return _hash(states), bool(states)


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16] if values else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
