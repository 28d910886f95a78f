"""What every dataset offers: shards that can be read in any order, each an iterator of documents.

A shard is the unit in which data is shuffled over the whole set and dealt to streams: a piece of a text
file, a MiB of JSON lines, a compressed file of them, a row group of Parquet, a file on the hub. Formats
are in files.py, parquet.py, tokens.py and hub.py; order and resuming in documents.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from torchtitan.config.errors import DatasetError
from torchtitan.tools.logging import logger

MAX_BAD_ROWS = 100

Document = str | NDArray[Any]
"""A text, or its token ids, begin and end tokens among them."""

Text = str | Callable[[Mapping[str, Any]], str]
"""Where a row's text is: the name of a field, or a function of the row."""


class Source(Protocol):
    """Documents in shards. Reading a shard twice gives the same documents, none of them empty."""

    @property
    def name(self) -> str:
        """What it is and how much, for the log and for errors."""

    @property
    def fingerprint(self) -> str:
        """Changes when a position in the old data means nothing in the new."""

    @property
    def max_streams(self) -> int:
        """How many shards may be read side by side: few, where each of them keeps a file or a download open."""

    @property
    def max_parts(self) -> int:
        """Into how many parts a shard can be divided where there are few; 1: it is always read as a whole."""

    def __len__(self) -> int:
        """Number of shards, at least 1."""

    def read(self, shard: int, part: int, num_parts: int) -> Iterator[Document]:
        """The documents of a part of a shard; each document is in one part, or a part of it in each of several.

        Raises DatasetError, which names the place, where one cannot be read.
        """


@dataclass
class BadRows:
    """What becomes of a row that cannot be read: the run stops, or passes over it, some times."""

    skip: bool = False
    _met: set[str] = field(default_factory=set)

    def meet(self, problem: str) -> None:
        """Return where the row is to be passed over; `problem` says where it is and what is wrong with it.

        Raises:
            DatasetError: it is not, or it is one too many.
        """
        if not self.skip:
            raise DatasetError(problem)
        if problem in self._met:  # in an earlier epoch
            return
        self._met.add(problem)
        if len(self._met) > MAX_BAD_ROWS:
            told = f"training.bad_rows=skip passes over {MAX_BAD_ROWS} rows of a rank, and this is one more"
            raise DatasetError(f"{problem}. {told}: mend the data")
        logger.warning(f"Row {len(self._met)} that is passed over: {problem}")


def get_text(row: Any, text: Text) -> str:
    """The text of a row, "" for null; ValueError says what is wrong with the row, the caller adds where it is."""
    value: Any
    if callable(text):
        value, place = text(row), "as its text"
    elif not isinstance(row, Mapping):
        raise ValueError(f"is {_describe(row)}, not an object with the text in {text!r}")
    elif text not in row:
        raise ValueError(f"has no field {text!r} (it has {', '.join(map(repr, row)) or 'none'})")
    else:
        value, place = row[text], f"in {text!r}"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"holds {_describe(value)} {place}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON lets through: no tokenizer takes it
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    return value


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
