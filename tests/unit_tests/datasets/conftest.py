"""Small data sets of every kind, with known documents."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, list[str]], Path]


def make_documents(n: int) -> list[str]:
    """Distinct, of different lengths, with characters of one to four bytes."""
    return [f"document {i}: " + "naïve 例 🌍 x\n" * (i % 7) + f"end {i}" for i in range(n)]


@pytest.fixture
def documents() -> list[str]:
    return make_documents(60)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(kind, documents) -> a folder of that kind of file, in three files."""

    def write(kind: str, documents: list[str]) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        for i in range(3):
            part = documents[i::3]
            lines = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(part))
            match kind:
                case "text":
                    for n, text in enumerate(part):
                        (folder / f"{i}-{n:03}.txt").write_text(text)
                case "jsonl":
                    (folder / f"{i}.jsonl").write_text(lines)
                case "parquet":
                    write_parquet(folder / f"{i}.parquet", part)
                case "jsonl.gz" | "jsonl.zst":
                    (folder / f"{i}.{kind}").write_bytes(compress(lines.encode(), kind))
        return folder

    return write


@pytest.fixture(name="compress")
def _compress() -> Callable[[bytes, str], bytes]:
    return compress


def compress(data: bytes, kind: str) -> bytes:
    """As the suffix `kind` says; as it is, where that is no compressed one."""
    if kind.endswith(".gz"):
        return gzip.compress(data)
    if kind.endswith(".zst"):
        pa = pytest.importorskip("pyarrow")
        packed = pa.BufferOutputStream()
        with pa.CompressedOutputStream(packed, "zstd") as file:
            file.write(data)
        return packed.getvalue().to_pybytes()
    return data


@pytest.fixture(name="write_parquet")
def _write_parquet() -> Callable[..., None]:
    return write_parquet


def write_parquet(path: Path, documents: list[str | None], column: str = "text") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({column: documents, "id": range(len(documents))}), path, row_group_size=6)
