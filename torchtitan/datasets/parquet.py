"""Documents from Parquet: a row group is a shard, which is unpacked some rows at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.files import UNPACKED_BYTES, Files
from torchtitan.datasets.source import get_text

if TYPE_CHECKING:
    import pyarrow.parquet

ROWS_TOGETHER = 128
MAX_PARQUET = 512
"""Files that are open at once, by all ranks together."""


class ParquetFiles(Files):
    """Each row's text is a document, each row group a shard."""

    kind = "Parquet"
    suffixes = (".parquet", ".pq")
    max_streams = MAX_PARQUET
    max_parts = 16  # for each, the rows before it are unpacked again

    def _look(self, root: Path) -> None:
        with ThreadPoolExecutor() as pool:
            row_groups = list(pool.map(self._find_row_groups, range(len(self._files))))
        self._shards = [(index, group) for index, groups in enumerate(row_groups) for group in groups]
        if not self._shards:
            raise DatasetError(f"{root} is empty: its Parquet files hold no row")

    def __len__(self) -> int:
        return len(self._shards)

    def _find_index(self, shard: int) -> int:
        return self._shards[shard][0]

    def read(self, shard: int, part: int = 0, num_parts: int = 1) -> Iterator[str]:
        index, group = self._shards[shard]
        for number, row in self._read_rows(index, group, part, num_parts):
            try:
                document = get_text(row, self.text)
            except ValueError as error:
                place = f"{self._files[index]}, row {number} of row group {group}"
                self.bad_rows.meet(f"{place}: {error}")
                continue
            if document:
                yield document

    def _read_rows(self, index: int, group: int, part: int, num_parts: int) -> Iterator[tuple[int, Any]]:
        """Rows with their numbers, some at a time."""
        with self._open_parquet(index) as file:
            num_rows = file.metadata.row_group(group).num_rows
            first, end = num_rows * part // num_parts, num_rows * (part + 1) // num_parts
            number = 0
            columns = [self.text] if isinstance(self.text, str) else None
            for batch in file.iter_batches(ROWS_TOGETHER, row_groups=[group], columns=columns):
                if number + len(batch) > first:
                    rows = batch.slice(max(0, first - number), end - max(first, number)).to_pylist()
                    yield from enumerate(rows, start=max(first, number) + 1)
                number += len(batch)
                if number >= end:
                    return

    def _find_row_groups(self, index: int) -> list[int]:
        with self._open_parquet(index) as file:
            names = file.schema_arrow.names
            if isinstance(self.text, str) and self.text not in names:
                raise DatasetError(f"{self._files[index]} has no column {self.text!r}, but {', '.join(names)}")
            return [group for group in range(file.num_row_groups) if file.metadata.row_group(group).num_rows > 0]

    @contextmanager
    def _open_parquet(self, index: int) -> Iterator["pyarrow.parquet.ParquetFile"]:
        import pyarrow.parquet  # here, because it takes a quarter of a second

        with self._open(index):
            try:
                with pyarrow.parquet.ParquetFile(
                    self._files[index], buffer_size=UNPACKED_BYTES, pre_buffer=False
                ) as file:
                    yield file
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise DatasetError(f"{self._files[index]} is damaged or not Parquet: {error}") from error
