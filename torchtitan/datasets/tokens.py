"""Documents that are token ids already: read where they lie, at once at any size, and not tokenised again.

    .npy         one row of uint16 or uint32, as numpy.save writes it: what `torchtitan tokenize` makes
    .bin         uint16 from the first byte on, as nanoGPT writes it, or behind llm.c's header of 1,024 bytes
    .bin, .idx   Megatron's: .idx says of which type the ids are and where each document begins

Begin and end tokens are in the files. Without .idx a document is a piece of up to 65,536 tokens, wherever it is cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.files import PiecedFiles
from torchtitan.tools.files import read_json

PIECE_TOKENS = 2**16
META = "tokens.meta"
_MEGATRON = b"MMIDIDX\0\0"
_MEGATRON_HEADER_BYTES = 34
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLM_C_HEADER_BYTES = 1024
_LLM_C_TYPES = {20240520: "<u2", 20240801: "<u4"}


class _Layout(NamedTuple):
    """Where a file's tokens are."""

    dtype: str
    offset: int
    """Of the first one, in bytes."""
    num_tokens: int
    num_documents: int
    """That an index tells; 0 without one."""


class TokenFiles(PiecedFiles):
    """A shard is a piece of a file, whose documents are those that begin in it, or itself."""

    kind = "token ids"
    suffixes = (".npy", ".bin")
    max_parts = PIECE_TOKENS // 2**11

    def _look(self, root: Path) -> None:
        meta = (root if root.is_dir() else root.parent) / META
        self.tokenizer = read_json(meta, DatasetError).get("tokenizer") if meta.is_file() else None
        self._layouts = [_find_layout(*both) for both in zip(self._files, self._sizes, strict=True)]
        self._set_pieces([layout.num_tokens for layout in self._layouts], PIECE_TOKENS)
        if len(self) == 0:
            raise DatasetError(f"{root} is empty: its files hold no token")

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[NDArray[Any]]:
        index, begin, end = self._find(shard, part, num_parts)
        has_index = self._layouts[index].num_documents
        cuts = self._find_documents(index, begin, end) if has_index else np.array([begin, end])
        if len(cuts) < 2:
            return
        tokens = self._read_tokens(index, int(cuts[0]), int(cuts[-1]))
        for first, after in zip(cuts[:-1] - cuts[0], cuts[1:] - cuts[0], strict=True):
            if after > first:
                yield tokens[first:after]

    def _find_documents(self, index: int, begin: int, end: int) -> NDArray[np.int64]:
        """Where the documents begin that do so between the two tokens, and where the last one ends."""
        layout, path = self._layouts[index], self._files[index].with_suffix(".idx")
        n, width = layout.num_documents, np.dtype(layout.dtype).itemsize
        starts = np.memmap(path, "<i8", "r", offset=_MEGATRON_HEADER_BYTES + 4 * n, shape=n)
        first, after = np.searchsorted(starts, [begin * width, end * width])
        cuts = starts[first : after + 1] // width
        return np.append(cuts, layout.num_tokens) if after == n and after > first else np.asarray(cuts)

    def _read_tokens(self, index: int, begin: int, end: int) -> NDArray[Any]:
        layout = self._layouts[index]
        with self._open(index) as file:
            file.seek(layout.offset + begin * np.dtype(layout.dtype).itemsize)
            return np.fromfile(file, layout.dtype, end - begin)


def _find_layout(path: Path, size: int) -> _Layout:
    with path.open("rb") as file:
        if path.suffix.lower() == ".npy":
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            except ValueError as error:
                raise DatasetError(f"{path} is not what numpy.save writes: {error}") from None
            if len(shape) != 1 or dtype.kind not in "ui":
                raise DatasetError(f"{path} holds {dtype} of shape {shape}, not one row of token ids")
            layout = _Layout(dtype.str, file.tell(), shape[0], 0)
        elif (found := path.with_suffix(".idx")).is_file():
            layout = _read_index(found, size)
        else:
            magic = int.from_bytes(file.read(4), "little")
            offset = _LLM_C_HEADER_BYTES if magic in _LLM_C_TYPES else 0
            dtype = np.dtype(_LLM_C_TYPES.get(magic, "<u2"))
            layout = _Layout(dtype.str, offset, (size - offset) // dtype.itemsize, 0)
    if size < layout.offset + layout.num_tokens * np.dtype(layout.dtype).itemsize:
        raise DatasetError(f"{path} has {size:,} bytes, too few for the {layout.num_tokens:,} tokens it is to hold")
    return layout


def _read_index(path: Path, size: int) -> _Layout:
    with path.open("rb") as file:
        header = file.read(_MEGATRON_HEADER_BYTES)
    code, n = header[17] if len(header) > 17 else 0, int.from_bytes(header[18:26], "little")
    if not header.startswith(_MEGATRON) or code not in _MEGATRON_TYPES:
        raise DatasetError(
            f"{path} is not an index of Megatron's, version 1, of whole numbers; mend it, or take it out"
        )
    dtype = np.dtype(_MEGATRON_TYPES[code])
    return _Layout(dtype.str, 0, size // dtype.itemsize, n)
