"""A place in the data as a checkpoint holds it, and back: for any number of ranks, and for the data that it is one in.

Each data rank saves the cursors of its streams, as one string under its own name; a load needs the strings of all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from torchtitan.config.errors import CheckpointError
from torchtitan.datasets import Cursor, Dealing, Place, Source, SourcePlace
from torchtitan.tools.logging import logger

START_ANEW = "to start the data anew, add dataloader to checkpoint.exclude_from_loading"


class DataloaderStateError(CheckpointError):
    """A saved position that means nothing to this run's data."""


class Reading(NamedTuple):
    """What a place in the data is one of; all of it is saved with the place."""

    labels: Sequence[str]
    """Of each source, what the options call it."""
    datasets: Sequence[str]
    """Of each source, the name that says how it is read."""
    sources: Sequence[Source]
    tokenizer: str
    """Its fingerprint."""


def save_place(place: Place, reading: Reading, *, seed: int, rank: int) -> dict[str, str]:
    """A rank's part of the state."""
    named = zip(reading.labels, reading.datasets, reading.sources, place.sources, strict=True)
    sources = [
        {
            "label": label,
            "dataset": dataset,
            "fingerprint": source.fingerprint,
            "dealing": list(astuple(part.dealing)),
            "taken": part.taken,
            "cursors": [[stream, *cursor.to_list()] for stream, cursor in sorted(part.cursors.items())],
        }
        for label, dataset, source, part in named
    ]
    state = {"seed": seed, "tokenizer": reading.tokenizer, "scheduled": place.scheduled, "sources": sources}
    # One string under this rank's own name: a checkpoint merges the dictionaries of all ranks.
    return {f"dp_rank_{rank}": json.dumps(state)}


def load_place(state_dict: Mapping[str, str], reading: Reading, fresh: Place) -> tuple[Place, int]:
    """The place and the seed in the states of all ranks. What they do not know begins as in `fresh`.

    Raises:
        DataloaderStateError: the place cannot be found again: other data, another tokenizer, or a rank's part is
            missing.
    """
    if not state_dict:
        raise DataloaderStateError(f"the checkpoint holds no place in the data; {START_ANEW}")
    ranks = [json.loads(state) for state in state_dict.values()]
    if "sources" not in ranks[0]:
        raise DataloaderStateError(f"the checkpoint's place in the data is of an older version; {START_ANEW}")
    if ranks[0]["tokenizer"] != reading.tokenizer:
        raise DataloaderStateError(
            "the checkpoint's data was read with another tokenizer, and a place in the data, which counts tokens,"
            f" cannot be carried over; {START_ANEW}, or set model.tokenizer_path to the tokenizer of before"
        )
    saved = ranks[0]["sources"]
    matches = [
        _find(saved, dataset, source.fingerprint)
        for dataset, source in zip(reading.datasets, reading.sources, strict=True)
    ]
    for label, source, match in zip(reading.labels, reading.sources, matches, strict=True):
        if match is None and any(other["label"] == label for other in saved):
            raise DataloaderStateError(
                f"the checkpoint's place in the data is not one in {source.name}: files were added, removed, renamed or"
                f" are of another size, or it is another dataset; {START_ANEW}, or give the same data as before"
            )
    if all(match is None for match in matches):
        before, now = saved[0]["label"], reading.labels[0]
        raise DataloaderStateError(
            f"the checkpoint's data was read as training.dataset={before}, this run's is {now}, and a place in the one"
            f" means nothing in the other; {START_ANEW}, or set training.dataset as before"
        )
    places = []
    for label, match, begin in zip(reading.labels, matches, fresh.sources, strict=True):
        places.append(begin if match is None else _join(ranks, match))
        if match is None:
            logger.info(f"The checkpoint's data was read without {label}, which begins now")
    for i, other in enumerate(saved):
        if i not in matches:
            logger.info(f"The checkpoint's data was read with {other['label']}, which is left out from now on")
    same = matches == list(range(len(saved)))
    return Place(places, ranks[0]["scheduled"] if same else []), ranks[0]["seed"]


def _find(saved: Sequence[Mapping[str, Any]], dataset: str, fingerprint: str) -> int | None:
    wanted = (dataset, fingerprint)
    return next((i for i, other in enumerate(saved) if (other["dataset"], other["fingerprint"]) == wanted), None)


def _join(ranks: Sequence[Mapping[str, Any]], index: int) -> SourcePlace:
    """The place in one source, from the parts of all ranks."""
    parts = [rank["sources"][index] for rank in ranks]
    place = SourcePlace(Dealing(*parts[0]["dealing"]), parts[0]["taken"])
    for stream, *cursor in (cursor for part in parts for cursor in part["cursors"]):
        place.cursors[stream] = Cursor.from_list(cursor)
    missing = [s for s in range(place.dealing.streams) if place.count(s) > 0 and s not in place.cursors]
    if missing:
        raise DataloaderStateError(
            f"the checkpoint lacks the place in {len(missing)} of {place.dealing.streams} streams of the data, which"
            f" some of the ranks that saved it have not left; {START_ANEW}"
        )
    return place
