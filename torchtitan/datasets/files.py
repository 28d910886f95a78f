"""Documents from files: text and JSON lines; Parquet is in parquet.py, token ids in tokens.py.

Nothing is indexed, converted or copied: text and JSON lines are read in byte ranges that are moved to
the next line's start, so a run over a TB starts as fast as one over a MB.
Compressed JSON lines cannot be read from the middle: each file is unpacked from its start, as it is read.
"""

import gzip
import hashlib
import io
import json
import os
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.source import BadRows, Document, Text, get_text
from torchtitan.tools.logging import logger

TEXT_PIECE_BYTES = 64 * 2**10
"""A longer text counts as several documents: one big file can then be shuffled, and feed many streams."""
JSON_PIECE_BYTES = 2**20
CHECKED_BYTES = 64 * 2**20
"""So much of JSON lines is parsed before the run starts, so that a bad line there costs no training."""
CUT_SEARCH_BYTES = 4096
UNPACKED_BYTES = 64 * 2**10
COMPARED_FILES = 1000
CHECKED_TEXTS = 256
MAX_REPLACED = 0.01
MAX_STREAMS = 2**16
MAX_UNPACKED = 512
"""Files that are open at once, by all ranks together; also how many ranks can read without reading the same."""


def count_files(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _format_size(num_bytes: int) -> str:
    unit, name = next((u for u in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= u[0]), (2**10, "KiB"))
    return f"{num_bytes / unit:.1f} {name}"


class Files:
    """Files and their sizes when the run began: a file that has become smaller since must not be read.

    What one rank has found and checked is sent to the others, pickled, but for `text`, which each sets for itself.
    """

    kind: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    max_streams: ClassVar[int] = MAX_STREAMS
    max_parts: ClassVar[int] = 1
    piece_bytes: ClassVar[int | None] = None  # the size of a shard, where it is a piece of a file

    def __init__(self, files: Sequence[Path], *, root: Path, text: Text = "text") -> None:
        """`root` is what the files' names are below, `text` where a row's text is, if they have rows."""
        self._files = list(files)
        self.text = text
        self._sizes = [file.stat().st_size for file in files]
        self.bad_rows = BadRows()
        # Of names below the root, sizes, and the size of the pieces, which a position in the data counts.
        names = [[os.path.relpath(file, root), size] for file, size in zip(files, self._sizes, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps([names, self.piece_bytes]).encode()).hexdigest()[:16]
        self.name = f"{root}: {count_files(files)} of {self.kind}, {_format_size(sum(self._sizes))}"
        self._look(root)

    def _look(self, root: Path) -> None:
        """Learn what the kind must know of each file besides."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "text": None}  # a function of the user's may be one that cannot be sent

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[Document]:
        raise NotImplementedError

    def find_file(self, shard: int) -> str:
        """The one that a shard is in."""
        return str(self._files[self._find_index(shard)])

    def _find_index(self, shard: int) -> int:
        return shard

    def check(self) -> None:
        """Read so much of it that a mistake costs no training. Raises DatasetError."""

    def find_other_size(self) -> str | None:
        """What is not here as it is listed; of many files, some of them are looked at."""
        step = -(-len(self._files) // COMPARED_FILES)
        for file, size in list(zip(self._files, self._sizes, strict=True))[::step]:
            try:
                now = file.stat().st_size
            except OSError as error:
                return f"{file}: {error.strerror}"
            if now != size:
                return f"{file} has {now:,} bytes, not {size:,}"
        return None

    @contextmanager
    def _open(self, index: int) -> Iterator[BinaryIO]:
        path, size = self._files[index], self._sizes[index]
        advice = "put it back and start again: the run goes on from its last checkpoint"
        try:
            with path.open("rb") as file:
                now = os.fstat(file.fileno()).st_size
                if now < size:
                    raise DatasetError(f"{path} was cut while in use, from {size} to {now} bytes; {advice}")
                yield file
        except FileNotFoundError:
            raise DatasetError(f"{path} has disappeared while in use; {advice}") from None
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror or error}; {advice}") from error


class PiecedFiles(Files):
    """A shard is a piece of a file."""

    def _set_pieces(self, lengths: Sequence[int], piece: int) -> None:
        """Files of these lengths are divided into pieces of one length, the last of each but the rest."""
        self._lengths, self._piece = lengths, piece
        self._first_piece = list(accumulate((-(-length // piece) for length in lengths), initial=0))

    def __len__(self) -> int:
        return self._first_piece[-1]

    def _find_index(self, shard: int) -> int:
        return bisect_right(self._first_piece, shard) - 1

    def _find(self, shard: int, part: int, num_parts: int) -> tuple[int, int, int]:
        """The number of the file, and from where to where a part of the shard goes in it."""
        index = self._find_index(shard)
        start = (shard - self._first_piece[index]) * self._piece
        length = min(self._piece, self._lengths[index] - start)
        return index, start + length * part // num_parts, start + length * (part + 1) // num_parts


class _CutFiles(PiecedFiles):
    """In pieces of about `piece_bytes`. A piece runs from one cut to the next; `_cut` says where cuts may be."""

    piece_bytes: ClassVar[int]

    def _look(self, root: Path) -> None:
        self._set_pieces(self._sizes, self.piece_bytes)

    def _cut(self, file: BinaryIO, at: int) -> int:
        """The first place from byte `at` > 0 on where the file may be cut."""
        raise NotImplementedError

    def _read_piece(self, shard: int, part: int, num_parts: int) -> tuple[Path, int, bytes]:
        """(file, offset in it, bytes)"""
        index, start, end = self._find(shard, part, num_parts)
        size = self._sizes[index]
        with self._open(index) as file:
            # What was appended since the run began is not read.
            begin = min(self._cut(file, start), size) if start else 0
            if end <= begin:  # inside something that cannot be cut
                return self._files[index], begin, b""
            end = min(self._cut(file, end), size) if end < size else size
            file.seek(begin)
            data = file.read(end - begin)
            if len(data) < end - begin:
                raise DatasetError(f"{self._files[index]} was cut while it was read; put it back and start again")
        return self._files[index], begin, data


class TextFiles(_CutFiles):
    """Each text file is a document, or several: see TEXT_PIECE_BYTES. Bytes that are not UTF-8 become U+FFFD."""

    kind = "text"
    # fmt: off
    suffixes = (
        ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml",
        ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".sh", ".sql",
    )
    # fmt: on
    piece_bytes = TEXT_PIECE_BYTES
    max_parts = TEXT_PIECE_BYTES // 2**11  # a document is to be longer than a line

    def _cut(self, file: BinaryIO, at: int) -> int:
        file.seek(at - 1)
        ahead = file.read(CUT_SEARCH_BYTES)
        for mark in (b"\n", b" "):
            if (found := ahead.find(mark)) >= 0:
                return at + found
        # Neither lines nor words: between two characters. Only UTF-8's continuation bytes are 0b10xxxxxx.
        return at + next((i for i, byte in enumerate(ahead[1:]) if byte & 0xC0 != 0x80), len(ahead) - 1)

    def check(self) -> None:
        step = -(-len(self._files) // CHECKED_TEXTS)
        for path in self._files[::step]:
            with path.open("rb") as file:
                data = file.read(TEXT_PIECE_BYTES)
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DatasetError(f"{path} is UTF-16, and text is read as UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
            self._check_bytes(path, data)
            text = data.decode(errors="replace")
            if (replaced := text.count("\ufffd") - data.count("\ufffd".encode())) > MAX_REPLACED * len(text):
                logger.warning(
                    f"{path}: {100 * replaced / len(text):.0f}% of its characters are not UTF-8 and become U+FFFD; if"
                    " it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8"
                )
                return

    def _check_bytes(self, path: Path, data: bytes) -> None:
        if b"\0" in data:
            raise DatasetError(f"{path} is no text: it holds bytes of 0; convert it to UTF-8, or take it out")

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[str]:
        path, _, data = self._read_piece(shard, part, num_parts)
        self._check_bytes(path, data)
        if text := data.decode("utf-8-sig", errors="replace"):
            yield text


class JsonLinesFiles(_CutFiles):
    """Each line is a row and its text a document. Blank lines are passed over."""

    kind = "JSON lines"
    suffixes = (".jsonl", ".ndjson", ".json")
    piece_bytes = JSON_PIECE_BYTES
    max_parts = JSON_PIECE_BYTES // 2**10

    def _look(self, root: Path) -> None:
        super()._look(root)
        self._long_lines: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """By file, sorted, from where to where one line goes that is longer than a piece: to find its end once."""

    def check(self) -> None:
        for shard in range(min(len(self), CHECKED_BYTES // self.piece_bytes)):
            for _ in self.read(shard):
                pass

    def _cut(self, file: BinaryIO, at: int) -> int:
        long_lines = self._long_lines[file.name]
        before = bisect_right(long_lines, at, key=lambda line: line[0])
        if before and at <= long_lines[before - 1][1]:
            return long_lines[before - 1][1]
        file.seek(at - 1)
        end = at - 1
        while block := file.read(CUT_SEARCH_BYTES):
            newline = block.find(b"\n")
            end += len(block) if newline < 0 else newline + 1
            if newline >= 0:
                break
        if end - at > self.piece_bytes:
            long_lines.insert(before, (at, end))
        return end

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[str]:
        path, offset, data = self._read_piece(shard, part, num_parts)
        for line in io.BytesIO(data):  # one by one: many pieces may be read side by side
            if document := _get_text(self, line, path, offset=offset):
                yield document
            offset += len(line)


class CompressedJsonLinesFiles(Files):
    """JSON lines in .gz or .zst. Each file is a shard, unpacked line by line as it is read."""

    kind = "compressed JSON lines"
    suffixes = tuple(f"{suffix}{packed}" for suffix in JsonLinesFiles.suffixes for packed in (".gz", ".zst"))
    max_streams = MAX_UNPACKED  # and in one part: each would be unpacked from the file's start

    def check(self) -> None:
        num_checked = 0
        for shard in range(len(self)):
            for number, line in self._read_lines(shard):
                _get_text(self, line, self._files[shard], number=number)
                num_checked += len(line)
                if num_checked >= CHECKED_BYTES:
                    return

    def __len__(self) -> int:
        return len(self._files)

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[str]:
        for number, line in self._read_lines(shard):
            if document := _get_text(self, line, self._files[shard], number=number):
                yield document

    def _read_lines(self, shard: int) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers."""
        number = 0
        with self._open(shard) as file, _unpack(file, self._files[shard]) as unpacked:
            while True:
                try:
                    line = unpacked.readline()
                except (OSError, EOFError, zlib.error) as error:
                    place, problem = f"{self._files[shard]}, after line {number}", " ".join(str(error).split())
                    advice = "the file is damaged or not whole: get it anew"
                    if "too much memory" in problem:
                        advice = "its window is too long (zstd --long): pack it anew without"
                    raise DatasetError(f"{place}: cannot be unpacked: {problem}; {advice}") from error
                if not line:
                    return
                number += 1
                yield number, line


def _unpack(file: BinaryIO, path: Path) -> io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    import pyarrow  # has Zstandard, which Python has from 3.14 on

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), UNPACKED_BYTES)


def _line_number(path: Path, offset: int) -> int:
    """Of the line that begins at byte `offset`."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(offset, JSON_PIECE_BYTES))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _get_text(files: Files, line: bytes, path: Path, *, number: int = 0, offset: int = 0) -> str:
    """The text of a line of JSON, "" of one that is blank or passed over; without its number, its offset tells it."""
    if line.isspace():
        return ""
    try:
        return get_text(json.loads(line.removesuffix(b"\n")), files.text)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        problem = "is JSON that is nested too deep to be read"
    except ValueError as error:  # UnicodeDecodeError too
        problem = str(error)
    field = files.text if isinstance(files.text, str) else "field"
    place = f"{path}, line {number or _line_number(path, offset)}"
    files.bad_rows.meet(f'{place}: {problem}. Each line must be an object such as {{"{field}": "..."}}')
    return ""
