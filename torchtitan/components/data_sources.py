"""Opens a run's data: looked at once, on the first rank, and the same on all of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import DatasetError
from torchtitan.datasets import HuggingFaceStream, Source, open_dataset
from torchtitan.datasets.files import Files
from torchtitan.datasets.registry import get_dataset
from torchtitan.distributed.utils import get_world


def open_together(dataset: str, path: str | None, *, skip_bad_rows: bool = False) -> Source:
    """As open_dataset, by all ranks; what is at a path is listed and checked by the first one alone.

    Raises DatasetError, on all ranks: what open_dataset says on the first one, or that data is not the same on all.
    """
    open_here = partial(open_dataset, dataset, path, skip_bad_rows=skip_bad_rows)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return open_here()
    source: Source | None = None
    if path is not None:
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                found = [open_here()]
            except DatasetError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], DatasetError):
            raise found[0]
        source = found[0]
    told: str | DatasetError
    try:
        if isinstance(source, Files):
            source.text = get_dataset(dataset).text
        source = source or open_here()
        told = f"{source.name} ({source.fingerprint})"
        if isinstance(source, HuggingFaceStream) and source.order:
            told += f" in the order {source.order}"
        # Ranks of one machine see the same files.
        if isinstance(source, Files) and get_world().local_rank == 0 and (other := source.find_other_size()):
            told = other
    except DatasetError as error:
        told = error
    compare([*_gather(told)], what="the data")
    assert source is not None
    return source


def compare(told: Sequence[str | DatasetError], *, what: str) -> None:
    """Raise DatasetError, with the ranks' numbers, unless all have told the same of what they see."""
    for error in told:
        if isinstance(error, DatasetError):
            raise error
    if others := [rank for rank, one in enumerate(told) if one != told[0]]:
        ranks = f"{', '.join(map(str, others[:8]))}{', ...' if len(others) > 8 else ''}"
        raise DatasetError(
            f"{what} is not the same on all ranks: rank 0 has {told[0]}; {len(others)} of {len(told)} differ (rank"
            f" {ranks}), the first with {told[others[0]]}. Give all machines the same files"
        )


def compare_tokenizers(fingerprint: str, tokenizer: Tokenizer) -> None:
    """Raise DatasetError unless all ranks have the same tokenizer."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        compare(_gather(f"one of {tokenizer.vocab_size} ids ({fingerprint})"), what="the tokenizer")


def _gather(value: str | DatasetError) -> list[str | DatasetError]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
