"""Local files: every document once and whole, and each fault of a file in one message."""

import gzip
import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.files import TEXT_PIECE_BYTES, CompressedJsonLinesFiles, JsonLinesFiles, TextFiles
from torchtitan.datasets.local import open_path
from torchtitan.datasets.parquet import ParquetFiles
from torchtitan.datasets.source import Source


def read_all(source: Source) -> list[str]:
    return [document for shard in range(len(source)) for document in source.read(shard, 0, 1)]


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "jsonl.gz", "jsonl.zst"])
def test_every_document_is_read_once(kind, write, documents):
    source = open_path(write(kind, documents), "text")
    assert sorted(read_all(source)) == sorted(documents)
    assert read_all(source) == read_all(source)


@pytest.mark.parametrize(
    "text",
    ["a line\n" * 300, "a word " * 300, "例" * 900, "例" * 22, "é" * 32 + "x", "\n" * 1000, "x" * 64, "é\n例 🌍" * 200],
)
def test_long_text_is_cut_without_loss(text, tmp_path, monkeypatch):
    monkeypatch.setattr(TextFiles, "piece_bytes", 64)
    monkeypatch.setattr("torchtitan.datasets.files.CUT_SEARCH_BYTES", 32)
    (tmp_path / "a.txt").write_text(text)
    source = open_path(tmp_path, "text")
    pieces = read_all(source)
    assert "".join(pieces) == text
    assert len(source) == -(-len(text.encode()) // 64)
    assert max(len(piece.encode()) for piece in pieces) <= 64 + 32


def test_text_is_cut_at_line_ends_first(tmp_path, monkeypatch):
    monkeypatch.setattr(TextFiles, "piece_bytes", 64)
    (tmp_path / "a.txt").write_text("some words in a line\n" * 20)
    assert all(piece.endswith("line\n") for piece in read_all(open_path(tmp_path, "text")))


def test_text_that_is_not_utf8_is_read(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read_all(open_path(tmp_path, "text")) == ["text", "caf\ufffd"]


@pytest.mark.parametrize("num_lines", [1, 3])
def test_a_line_of_many_pieces_is_searched_for_its_end_once(num_lines, tmp_path, monkeypatch):
    """Not once for each of its pieces."""
    monkeypatch.setattr(JsonLinesFiles, "piece_bytes", 64)
    monkeypatch.setattr("torchtitan.datasets.files.CUT_SEARCH_BYTES", 32)
    rows = [{"text": f"{line} " * 10_000} for line in range(num_lines)]
    path = write_rows(tmp_path / "a.jsonl", [{"text": "short"}, *rows, {"text": "short"}])
    num_read = 0

    class Counting(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            nonlocal num_read
            data = super().read(size)
            num_read += len(data)
            return data

    monkeypatch.setattr(Path, "open", lambda self, mode: Counting(io.FileIO(self)))
    source = open_path(path, "text")
    assert sorted(read_all(source)) == sorted(["short", "short", *(row["text"] for row in rows)])
    assert num_read < 5 * path.stat().st_size  # the check at the start and the documents, and each of them a search


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000, 2**20])
def test_json_lines_in_pieces_of_any_size_are_the_same_rows(piece_bytes, tmp_path, documents, monkeypatch):
    monkeypatch.setattr(JsonLinesFiles, "piece_bytes", piece_bytes)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    lines[7:7] = ["", "   ", '{"text": ""}', '{"text": null}']  # no documents
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # without a last line end
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "with a BOM"}\r\n{"text": "and CRLF"}\r\n')
    assert read_all(open_path(tmp_path, "text")) == [*documents, "with a BOM", "and CRLF"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", r"is not JSON: Expecting value at character 1"),
        ('{"text": "cut of', r"is not JSON: Unterminated string"),
        ('{"text": ' + "[" * 100_000, r"is JSON that is nested too deep to be read"),
        ('"only a text"', r"is a text, not an object with the text in 'text'"),
        ('[{"text": "a"}]', r"is an array, not an object"),
        ("3", r"is a number, not an object"),
        ('{"body": "a", "id": 3}', r"has no field 'text' \(it has 'body', 'id'\)"),
        ('{"text": false}', r"holds a boolean in 'text', not a text"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_line_is_named(kind, line, problem, tmp_path, compress, monkeypatch):
    monkeypatch.setattr(JsonLinesFiles, "piece_bytes", 100)
    path = tmp_path / f"a.{kind}"
    fine = '{"text": "fine"}\n'
    path.write_bytes(compress(f"{fine * 30}\n{line}\n{fine}".encode(), kind))
    where = (
        rf"^{re.escape(str(path))}, line 32: {problem}.*\. Each line must be an object such as {{\"text\": \"...\"}}$"
    )
    with pytest.raises(DatasetError, match=where):
        open_path(path, "text")


def test_bad_bytes_in_json_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DatasetError, match=r"a.jsonl, line 2: 'utf-8' codec can't decode byte 0xe9"):
        open_path(tmp_path, "text")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_line_far_down_is_found_when_it_is_read(kind, tmp_path, compress, monkeypatch):
    monkeypatch.setattr(JsonLinesFiles, "piece_bytes", 100)
    monkeypatch.setattr("torchtitan.datasets.files.CHECKED_BYTES", 200)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(compress(b'{"text": "fine"}\n' * 100 + b"3\n", kind))
    source = open_path(path, "text")
    with pytest.raises(DatasetError, match=rf"a\.{kind}, line 101: is a number"):
        read_all(source)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_compressed_file_is_unpacked_as_it_is_read_and_its_damage_named(kind, tmp_path, compress, monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.files.CHECKED_BYTES", 100)
    noise = np.random.default_rng(0).bytes(2**18).hex()
    rows = [{"text": noise[i : i + 64]} for i in range(0, len(noise), 64)]
    packed = compress(write_rows(tmp_path / "rows", rows).read_bytes(), kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed[:-9])
    source = open_path(path, "text")
    assert list(islice(source.read(0), 2000)) == [row["text"] for row in rows[:2000]]
    advice = "the file is damaged or not whole: get it anew"
    for damaged in (packed[:-9], packed[: len(packed) // 2], packed + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=rf"/a\.{kind}, after line [1-9]\d+: cannot be unpacked: .*; {advice}$"):
            read_all(open_path(path, "text"))
    path.write_bytes(b"of no such format")
    with pytest.raises(DatasetError, match=rf"/a\.{kind}, after line 0: cannot be unpacked: .*; {advice}$"):
        open_path(path, "text")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_compressed_file_may_have_several_parts_and_none(kind, tmp_path, compress):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"".join(compress(part, kind) for part in (b'{"text": "a"}\n{"te', b"", b'xt": "b"}\n\n')))
    (tmp_path / f"b.{kind}").write_bytes(compress(b"", kind))
    assert read_all(open_path(tmp_path, "text")) == ["a", "b"]
    assert read_all(open_path(tmp_path / f"b.{kind}", "text")) == []  # which documents.py reports


def test_text_can_be_another_field_or_a_function(tmp_path, write_parquet):
    rows = [{"q": "why", "a": "because"}, {"q": "how", "a": "so"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert read_all(open_path(path, "a")) == ["because", "so"]
    assert read_all(open_path(path, lambda row: row["q"] + "? " + row["a"])) == ["why? because", "how? so"]
    write_parquet(tmp_path / "a.parquet", ["one", "two"], column="body")
    assert read_all(open_path(tmp_path / "a.parquet", "body")) == ["one", "two"]
    assert read_all(open_path(tmp_path / "a.parquet", lambda row: f"{row['id']} {row['body']}")) == ["0 one", "1 two"]


def test_null_in_parquet_is_no_document(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", ["a", None, "", *"bcdef", None])
    assert read_all(open_path(tmp_path, "text")) == list("abcdef")


def test_parquet_faults_are_named(tmp_path, write_parquet):
    write_parquet(tmp_path / "other.parquet", ["a"], column="body")
    with pytest.raises(DatasetError, match=r"other.parquet has no column 'text', but body, id$"):
        open_path(tmp_path / "other.parquet", "text")
    (tmp_path / "damaged.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"damaged.parquet is damaged or not Parquet: "):
        open_path(tmp_path / "damaged.parquet", "text")
    with pytest.raises(DatasetError, match=r"other.parquet, row 1 of row group 0: holds a number as its text"):
        read_all(open_path(tmp_path / "other.parquet", lambda row: row["id"]))
    write_parquet(tmp_path / "none.parquet", [])
    with pytest.raises(DatasetError, match=r"none.parquet is empty: its Parquet files hold no row"):
        open_path(tmp_path / "none.parquet", "text")


def test_parquet_that_is_not_utf8_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    text = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "latin.parquet")
    documents = open_path(tmp_path / "latin.parquet", "text")
    with pytest.raises(DatasetError, match=r"latin.parquet is damaged or not Parquet: 'utf-8' codec can't decode"):
        read_all(documents)


def test_path_faults_are_named(tmp_path, write_parquet):
    def error(path: Path | str) -> str:
        with pytest.raises(DatasetError) as caught:
            open_path(path, "text")
        return str(caught.value)

    assert error("") == "an empty dataset_path names no file or folder; leave it out for the dataset itself"
    assert error(tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere does not exist")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".a.jsonl").write_text('{"text": "a"}')
    assert error(folder) == f"{folder} is empty; hidden files are passed over"
    os.mkfifo(tmp_path / "pipe")
    assert error(tmp_path / "pipe") == (
        f"{tmp_path}/pipe is neither a file nor a folder: data is read more than once, as a pipe or a device cannot be;"
        " write it to a file"
    )
    (folder / "a.zip").write_text("a")
    assert error(folder).startswith(f"{folder} holds no file of a known kind, but .zip; dataset_path takes text")
    assert error(folder / "a.zip").startswith(f"{folder}/a.zip holds no file of a known kind, but .zip")
    (folder / "a.jsonl").write_text("")
    assert error(folder / "a.jsonl") == f"{folder}/a.jsonl is empty"
    assert error(folder) == f"{folder} is empty: there is no byte in 1 file of JSON lines"
    (folder / "a.jsonl").write_text('{"text": "a"}')
    write_parquet(folder / "a.parquet", ["a"])
    assert re.search(
        "holds both (Parquet and JSON lines|JSON lines and Parquet); give a folder with one", error(folder)
    )


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "folder"
    (data / "deep").mkdir(parents=True)
    folder.mkdir()
    write_rows(data / "a.jsonl", [{"text": "a"}])
    write_rows(data / "deep" / "b.jsonl", [{"text": "b"}])
    (folder / "to_data").symlink_to(data)
    (folder / "to_file.jsonl").symlink_to(write_rows(tmp_path / "c.jsonl", [{"text": "c"}]))
    assert read_all(open_path(folder, "text")) == ["a", "b", "c"]
    (folder / "to_nothing.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="to_nothing.jsonl is a link to nothing; mend it or remove it"):
        open_path(folder, "text")
    (folder / "to_nothing.jsonl").unlink()
    (data / "deep" / "back").symlink_to(folder)
    (data / "deep" / "self").symlink_to(".")
    (folder / "to_data_again").symlink_to(data)
    assert read_all(open_path(folder, "text")) == ["a", "b", "c"]
    root = tmp_path / "root"
    root.symlink_to(data / "deep")
    (data / "deep" / "up").symlink_to(data)  # which would bring in what is beside the root
    (data / "deep" / "back").unlink()
    assert read_all(open_path(root, "text")) == ["b"]


def test_nothing_is_left_out_in_silence(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    for name in ("c.csv", "d.jsonl.bz2", "LICENSE"):
        (folder / name).write_text("x")
    assert read_all(open_path(folder, "text")) == ["a"]
    assert caplog.messages == [
        f"{folder}: left out: 1 file that links lead to twice ({folder}/b.txt is {folder}/a.txt)",
        f"{folder}: left out: 3 files of kinds that are not read (.csv, .jsonl.bz2, LICENSE)",
    ]

    def error() -> str:
        with pytest.raises(DatasetError) as caught:
            open_path(folder, "text")
        return str(caught.value)

    (folder / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert error() == f"{folder}/a.txt is a pointer of Git LFS, not the data; fetch it: git lfs pull"
    (folder / "a.txt").write_text("a b", encoding="utf-16")
    assert error().startswith(f"{folder}/a.txt is UTF-16, and text is read as UTF-8; convert it: iconv")
    (folder / "a.txt").write_bytes(b"a\0b")
    assert error() == f"{folder}/a.txt is no text: it holds bytes of 0; convert it to UTF-8, or take it out"
    (folder / "a.txt").write_bytes(b"a" * TEXT_PIECE_BYTES + b"\n\0")
    with pytest.raises(DatasetError, match="holds bytes of 0"):
        read_all(open_path(folder, "text"))
    caplog.clear()
    (folder / "a.txt").write_text("é et ça", encoding="latin-1")
    open_path(folder, "text")
    assert caplog.messages[-1].startswith(f"{folder}/a.txt: 29% of its characters are not UTF-8 and become U+FFFD")
    for name in ("data.arrow", "state.json"):
        (folder / name).write_text("{}")
    assert error().startswith(f"{folder} is written by save_to_disk of Hugging Face datasets")
    (folder / "state.json").unlink()
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text("{}")
    told = f"{folder} is a DatasetDict of test, train, written by save_to_disk"
    assert error().startswith(told) and '["train"].to_parquet("data.parquet")' in error()


def test_a_folder_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    def walk(root, *, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", f"{root}/closed"))

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("torchtitan.datasets.local.os.walk", walk)
    with pytest.raises(DatasetError, match="closed cannot be read: Permission denied; check its permissions"):
        open_path(tmp_path, "text")


def test_a_long_window_of_zstandard_is_no_damage(tmp_path):
    pytest.importorskip("pyarrow")
    line = b'{"text": "a"}\n'
    window = 21 << 3  # 2 GiB
    block = (len(line) << 3 | 1).to_bytes(3, "little") + line
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([window]) + block)
    with pytest.raises(DatasetError, match=r"its window is too long \(zstd --long\): pack it anew without"):
        open_path(tmp_path, "text")


def test_larger_of_rows_and_text_is_the_data(tmp_path, caplog):
    (tmp_path / "README.md").write_text("what this is")
    write_rows(tmp_path / "data.jsonl", [{"text": "row"}] * 3)
    (tmp_path / ".hidden.jsonl").write_text("not JSON")
    assert read_all(open_path(tmp_path, "text")) == ["row"] * 3
    assert caplog.messages == [f"{tmp_path} is read as JSON lines; left out: 1 file of text"]
    (tmp_path / "main.py").write_text("code\n" * 100)
    assert read_all(open_path(tmp_path, "text")) == ["what this is", "code\n" * 100]


def test_file_without_suffix_is_text(tmp_path):
    (tmp_path / "enwik8").write_text("text")
    assert read_all(open_path(tmp_path / "enwik8", "text")) == ["text"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "jsonl.gz"])
def test_file_that_disappears_or_is_cut_is_named(kind, write, documents):
    folder = write(kind, documents)
    source = open_path(folder, "text")
    path = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    size = path.stat().st_size
    advice = "put it back and start again: the run goes on from its last checkpoint"
    with path.open("r+b") as file:
        file.truncate(size - 5)
    message = f"{path} was cut while in use, from {size} to {size - 5} bytes; {advice}"
    with pytest.raises(DatasetError, match=re.escape(message)):
        read_all(source)
    path.unlink()
    with pytest.raises(DatasetError, match=re.escape(f"{path} has disappeared while in use; {advice}")):
        read_all(source)


def test_what_is_appended_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonLinesFiles, "piece_bytes", 16)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "old"}] * 9)
    source = open_path(path, "text")
    with path.open("a") as file:
        file.write('{"text": "new"}\n')
    assert read_all(source) == ["old"] * 9


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_fingerprint_tells_other_data(kind, write, documents, tmp_path):
    folder = write(kind, documents)
    before = open_path(folder, "text").fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert open_path(moved, "text").fingerprint == before
    renamed = (moved / f"0.{kind}").rename(moved / f"4.{kind}")
    assert open_path(moved, "text").fingerprint != before
    renamed.rename(moved / f"0.{kind}")
    with (gzip.open if kind == "jsonl.gz" else open)(moved / f"0.{kind}", "at") as file:
        file.write('{"text": "more"}\n')
    assert open_path(moved, "text").fingerprint != before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_no_source_keeps_files_open(write, documents):
    """A run may read 100,000 files."""
    kinds = {
        "text": TextFiles,
        "jsonl": JsonLinesFiles,
        "jsonl.gz": CompressedJsonLinesFiles,
        "jsonl.zst": CompressedJsonLinesFiles,
        "parquet": ParquetFiles,
    }
    for kind, cls in kinds.items():
        folder = write(kind, documents)
        source = open_path(folder, "text")
        assert isinstance(source, cls)
        read_all(source)
        next(source.read(0))
        assert [path for path in open_files() if path.is_relative_to(folder)] == []


def open_files() -> Iterator[Path]:
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since, as the folder itself is
            yield file.readlink()


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet"])
def test_what_one_rank_has_found_another_reads_without_looking(kind, write, documents, monkeypatch):
    folder = write(kind, documents)
    found = open_path(folder, "text")
    monkeypatch.setattr(type(found), "check", lambda _: pytest.fail("checked"))
    monkeypatch.setattr(Path, "iterdir", lambda _: pytest.fail("listed"))
    source = pickle.loads(pickle.dumps(found))
    source.text = "text"
    assert (source.name, source.fingerprint) == (found.name, found.fingerprint)
    assert read_all(source) == read_all(found)
    assert source.find_other_size() is None
    first = source._files[0]
    with first.open("ab") as file:
        file.write(b"\n")
    size = first.stat().st_size
    assert source.find_other_size() == f"{first} has {size:,} bytes, not {size - 1:,}"
    first.unlink()
    assert source.find_other_size() == f"{first}: No such file or directory"


def test_rows_of_a_part_of_a_row_group_are_those_of_the_whole(tmp_path, write_parquet, monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.parquet.ROWS_TOGETHER", 2)
    write_parquet(tmp_path / "a.parquet", list("abcdefghijk"))
    source = open_path(tmp_path, "text")
    for num_parts in (1, 2, 3, 5, 16):
        parts = [list(source.read(0, part, num_parts)) for part in range(num_parts)]
        assert [text for part in parts for text in part] == list("abcdef")
