"""Token files: the ids that are in them, of each format; what does not fit is told."""

import json
import os
import pickle
import struct
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from torchtitan.cli.main import main
from torchtitan.components.dataloader import TrainingDataLoader, build_dataloader
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import DatasetError
from torchtitan.config.sections import Training
from torchtitan.datasets import (
    Division,
    DocumentStreams,
    Place,
    SequenceReader,
    SourcePlace,
    choose_dealing,
    open_dataset,
    open_path,
)
from torchtitan.datasets.documents import ALL_WINDOWS_CHARS
from torchtitan.datasets.tokens import TokenFiles

TOKENIZER = build_tokenizer("tests/assets/tokenizer")
IDS = np.random.default_rng(0).integers(2000, size=1000)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.tokens.PIECE_TOKENS", 64)


def read_all(source, num_parts=1) -> list[list[int]]:
    shards = [(shard, part) for shard in range(len(source)) for part in range(num_parts)]
    return [document.tolist() for shard, part in shards for document in source.read(shard, part, num_parts)]


def build(path: Path, *, dp_rank: int = 0, dp_world_size: int = 1) -> TrainingDataLoader:
    return build_dataloader(
        training=Training(dataset_path=str(path)), tokenizer=TOKENIZER, dp_rank=dp_rank, dp_world_size=dp_world_size,
        batch_size=4 // dp_world_size, global_batch_size=4, seq_len=16, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("kind", ["uint16.npy", "uint32.npy", "nanogpt.bin", "llm_c.bin", "llm_c_4.bin"])
def test_ids_are_read_from_any_place(kind, num_parts, tmp_path):
    path = tmp_path / kind
    match kind:
        case "uint16.npy" | "uint32.npy":
            np.save(path, IDS.astype(kind.removesuffix(".npy")))
        case "nanogpt.bin":
            IDS.astype("<u2").tofile(path)
        case "llm_c.bin":
            path.write_bytes(struct.pack("<256i", 20240520, 1, len(IDS), *[0] * 253) + IDS.astype("<u2").tobytes())
        case "llm_c_4.bin":
            path.write_bytes(struct.pack("<256i", 20240801, 7, len(IDS), *[0] * 253) + IDS.astype("<u4").tobytes())
    source = open_path(path, "text")
    assert isinstance(source, TokenFiles)
    assert [i for document in read_all(source, num_parts) for i in document] == IDS.tolist()
    again = pickle.loads(pickle.dumps(source))  # as one rank sends it to the others
    assert read_all(again) == read_all(source)


def write_megatron(path: Path, lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths, as Megatron's preprocess_data.py lays them down, in int32."""
    starts = np.cumsum([0, *lengths])
    IDS[: starts[-1]].astype("<i4").tofile(path.with_suffix(".bin"))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
    sizes, pointers = np.array(lengths, "<i4"), (starts[:-1] * 4).astype("<i8")
    of_documents = np.arange(len(lengths) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + of_documents.tobytes())
    return [IDS[a : a + n].tolist() for a, n in zip(starts, lengths, strict=False)]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_documents_of_megatron_are_whole(num_parts, tmp_path):
    documents = write_megatron(tmp_path / "a", [5, 64, 1, 200, 30, 33, 7, 128, 3])
    assert read_all(open_path(tmp_path, "text"), num_parts) == documents
    (tmp_path / "a.idx").write_bytes(b"other")
    with pytest.raises(DatasetError, match="a.idx is not an index of Megatron's, version 1"):
        open_path(tmp_path, "text")


def test_a_run_reads_what_it_would_tokenise(tmp_path, capsys):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "tokens"
    words = [
        "tokenize",
        "--dataset_path",
        f"{tmp_path}/a.jsonl",
        "--tokenizer_path",
        "tests/assets/tokenizer",
        "--output",
        str(out),
    ]
    assert main(words) == 0
    expected = sorted(TOKENIZER.encode(text, add_bos=True, add_eos=True) for text in texts)
    ids = np.load(out / "tokens-00000.npy")
    assert capsys.readouterr().out.startswith(f"{out}: {len(ids):,} tokens in 1 files, ")
    ends = np.flatnonzero(ids == TOKENIZER.eos_id) + 1
    assert sorted(document.tolist() for document in np.split(ids, ends)[:-1]) == expected
    assert main(words) == 1
    assert "is not empty" in capsys.readouterr().err

    loader = build(out)
    undisturbed = [batch.tokens.tolist() for batch in islice(loader, 8)]
    pairs = set(zip(ids.tolist(), ids[1:].tolist(), strict=False))
    read = [pair for step in undisturbed for row in step for pair in pairwise(row)]
    assert sum(pair not in pairs for pair in read) < len(read) / 20  # where pieces meet
    loader.close()
    ranks = [build(out, dp_rank=rank, dp_world_size=2) for rank in range(2)]
    both = [[batch.tokens.tolist() for batch in islice(rank, 8)] for rank in ranks]
    assert [a + b for a, b in zip(*both, strict=True)] == undisturbed
    for rank in ranks:
        rank.close()

    (out / "tokens.meta").write_text(json.dumps({"tokenizer": "other"}))
    with pytest.raises(DatasetError, match="it was tokenised with another tokenizer than this run's; set"):
        build(out)


def test_the_first_batch_costs_the_same_at_any_size(tmp_path, monkeypatch):
    """How much is read until there is one of 8 sequences; `pytest -s` prints times and tokens/s, and text's."""
    monkeypatch.setattr("torchtitan.datasets.tokens.PIECE_TOKENS", 2**16)
    from_file, read = np.fromfile, []
    monkeypatch.setattr(np, "fromfile", lambda file, dtype, n: read.append(n) or from_file(file, dtype, n))
    paths = {}
    for name, size in (("1 MB", 10**6), ("10 GB", 10**10)):
        paths[name] = tmp_path / f"{size}.bin"
        paths[name].touch()
        os.truncate(paths[name], size)  # sparse
    for name, path in {"text": None, **paths}.items():
        read.clear()
        start = time.process_time()
        source = open_dataset("python_stdlib") if path is None else open_path(path, "text")
        dealing = choose_dealing(source, 8)
        streams = DocumentStreams(source, seed=0, infinite=True, dealing=dealing)
        place, division = Place([SourcePlace(dealing)]), Division(0, 1, 8, 8, 2048)
        batches = SequenceReader([streams], [1.0], TOKENIZER, division, place).read()
        next(batches)
        first = time.process_time() - start
        assert 4 * sum(read) <= ALL_WINDOWS_CHARS + dealing.streams * 4 * 2**16
        n = sum(rows.shape[0] * 2048 for rows, *_ in islice(batches, 12))
        print(f"{name}: {first:.2f} s to the first batch, {n / (time.process_time() - start - first):,.0f} tokens/s")


def test_files_that_do_not_fit_are_named(tmp_path):
    np.save(tmp_path / "a.npy", IDS.astype("uint16") + 1500)
    loader = build(tmp_path / "a.npy")
    with pytest.raises(DatasetError, match=r"the data holds the token id \d+, and the tokenizer has 2000 ids"):
        next(iter(loader))
    loader.close()
    for name, content, told in (
        ("float.npy", np.zeros(5), "holds float64 of shape \\(5,\\), not one row of token ids"),
        ("matrix.npy", np.zeros((5, 2), "u2"), "holds uint16 of shape \\(5, 2\\), not one row"),
        ("none.npy", np.zeros(0, "u2"), "is empty: its files hold no token"),
    ):
        np.save(tmp_path / name, content)
        with pytest.raises(DatasetError, match=told):
            open_path(tmp_path / name, "text")
    (tmp_path / "text.npy").write_text("text")
    with pytest.raises(DatasetError, match="text.npy is not what numpy.save writes"):
        open_path(tmp_path / "text.npy", "text")
    cut = tmp_path / "cut.npy"
    cut.write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    with pytest.raises(DatasetError, match="cut.npy has 2,118 bytes, too few for the 1,000 tokens"):
        open_path(cut, "text")
