"""Batches: shifted labels, exact resuming with batches in flight, equal shares for ranks, no thread left behind."""

import gzip
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from tests.processes import wait_until
from torchtitan.components.data_state import DataloaderStateError
from torchtitan.components.dataloader import (
    PREFETCHED_BATCHES,
    Batch,
    Prefetcher,
    TrainingDataLoader,
    ValidationDataLoader,
    build_dataloader,
    build_validation_dataloader,
)
from torchtitan.components.document_mask import DocumentMarker
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import Tokenizer, build_tokenizer
from torchtitan.config.errors import ConfigError, DatasetError, TokenizerError
from torchtitan.config.sections import Training, Validation

Loader = TrainingDataLoader | ValidationDataLoader

TOKENIZER = Path("tests/assets/tokenizer")
DOCUMENTS = [f"document {i}: " + "naïve 例 🌍 x\n" * (i % 7) + f"end {i}" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TOKENIZER)


@pytest.fixture
def path(tmp_path) -> str:
    """Three files of JSON lines."""
    for i in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS[i::3]]
        (tmp_path / f"{i}.jsonl").write_text("".join(lines))
    return str(tmp_path)


def build_for_validation(
    *, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int, batch_size: int, **options: Any
) -> ValidationDataLoader:
    validation = Validation(local_batch_size=batch_size, **options)
    return build_validation_dataloader(
        validation, tokenizer, training=Training(), dp_rank=dp_rank, dp_world_size=dp_world_size
    )


@pytest.fixture
def build(tokenizer, path):
    loaders = []

    def build(*, validation=False, **overrides) -> Loader:
        arguments = {
            "dataset": "python_stdlib",
            "dataset_path": path,
            "tokenizer": tokenizer,
            "dp_rank": 0,
            "dp_world_size": 1,
            "batch_size": 2,
            "seq_len": 16,
        } | overrides
        if validation:
            loaders.append(build_for_validation(**arguments))
        else:
            names = arguments.keys() & {"dataset", "dataset_path", "datasets", "bad_rows"}
            said = {name: arguments.pop(name) for name in names}
            more = {"seed": 0, "global_batch_size": arguments["batch_size"] * arguments["dp_world_size"]}
            loaders.append(build_dataloader(training=Training(**said), **(more | arguments)))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def take(loader: Loader, n: int | None = None) -> list[tuple[list, list]]:
    return take_from(iter(loader), n)


def take_from(batches: Iterator[Batch], n: int | None = None) -> list[tuple[list, list]]:
    return [(batch.tokens.tolist(), batch.labels.tolist()) for batch in islice(batches, n)]


def test_labels_are_the_next_tokens(build):
    streams = [[], []]
    for batch in islice(build(), 20):
        assert batch.tokens.shape == batch.labels.shape == (2, 16)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.tokens.is_contiguous()
        assert batch.labels.is_contiguous()
        for tokens, labels, stream in zip(batch.tokens, batch.labels, streams, strict=True):
            assert tokens[1:].equal(labels[:-1])
            assert not stream or tokens[0] == stream[-1]  # no token between two sequences is lost
            stream += labels.tolist()


def convert(kind: str, path: str) -> str | None:
    folder = Path(path)
    match kind:
        case "text":
            for i, document in enumerate(DOCUMENTS):
                (folder / f"{i}.txt").write_text(document)
        case "parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": DOCUMENTS}), folder / "a.parquet", row_group_size=8)
        case "jsonl.gz":
            for file in folder.glob("*.jsonl"):
                Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        case "jsonl":
            return path
        case "stdlib":
            return None
    for file in folder.glob("*.jsonl"):
        file.unlink()
    return path


def merged(loaders: Iterable[Loader]) -> dict[str, str]:
    """What a checkpoint holds."""
    return pickle.loads(pickle.dumps({key: state for loader in loaders for key, state in loader.state_dict().items()}))


def get_cursors(state: dict[str, str]) -> list[list[int]]:
    return sorted(cursor for rank in state.values() for cursor in json.loads(rank)["sources"][0]["cursors"])


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet", "jsonl.gz", "stdlib"])
def test_resume_equals_the_undisturbed_run(kind, build, path, monkeypatch, caplog):
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_DOCUMENTS", 11)
    monkeypatch.setattr("torchtitan.datasets.packing.GROUP_DOCUMENTS", 3)
    arguments = {"dataset_path": convert(kind, path), "dp_world_size": 2}
    undisturbed = take(build(**arguments, dp_rank=1), 90)
    if kind != "stdlib":
        take(build(**arguments, dp_rank=0), 90)
        assert any("; epoch 1 of" in message for message in caplog.messages)
    for stop in (0, 1, 2, 7, 30, 61):
        stopped = [build(**arguments, dp_rank=rank) for rank in range(2)]
        for loader in stopped:
            batches = iter(loader)
            taken = take_from(batches, stop)
        assert taken == undisturbed[:stop]
        time.sleep(0.02)  # the thread reads ahead, which must not count
        state = merged(stopped)
        resumed = [build(**arguments, dp_rank=rank) for rank in range(2)]
        for loader in resumed:
            loader.load_state_dict(state)
        assert get_cursors(merged(resumed)) == get_cursors(state)
        assert take(resumed[1], 20) == undisturbed[stop : stop + 20]


def test_resumed_run_can_be_resumed(build):
    undisturbed = take(build(), 12)
    state = build().state_dict()
    for stop in range(0, 12, 3):
        loader = build()
        loader.load_state_dict(state)
        assert take(loader, 3) == undisturbed[stop : stop + 3]
        state = loader.state_dict()


def test_iterating_again_goes_on(build):
    undisturbed = take(build(), 9)
    loader = build()
    assert take(loader, 4) + take(loader, 5) == undisturbed


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_survives_a_distributed_checkpoint(build, tmp_path):
    import torch.distributed.checkpoint as dcp

    loader = build()
    take(loader, 5)
    saved = {f"dataloader.{key}": value for key, value in loader.state_dict().items()}
    dcp.save(dict(saved), checkpoint_id=tmp_path / "saved", no_dist=True)
    loaded = {f"dataloader.{key}": value for key, value in build().state_dict().items()}
    assert loaded != saved
    dcp.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert loaded == saved


def test_state_is_small_and_has_a_key_per_rank(build):
    """One key per rank, so that a checkpoint can hold the states of all."""
    loader = build(dp_rank=1, dp_world_size=2)
    take(loader, 40)
    (key,) = loader.state_dict()
    assert key == "dp_rank_1"
    assert len(pickle.dumps(loader.state_dict())) < 400


def test_seed_of_the_state_is_gone_on_with(build):
    """A run without training.seed draws another one after a restart."""
    first = build(seed=5)
    undisturbed = take(build(seed=5), 8)
    take(first, 4)
    resumed = build(seed=6)
    resumed.load_state_dict(first.state_dict())
    assert take(resumed, 4) == undisturbed[4:]


def test_order_depends_on_the_seed(build):
    assert take(build(seed=1), 3) == take(build(seed=1), 3) != take(build(seed=2), 3)


def test_a_missing_part_of_the_state_is_an_error(build):
    loaders = [build(dp_rank=rank, dp_world_size=2) for rank in range(2)]
    for loader in loaders:
        take(loader, 2)
    with pytest.raises(
        DataloaderStateError, match="lacks the place in 2 of 4 streams .*exclude_from_loading"
    ) as caught:
        build().load_state_dict(loaders[1].state_dict())
    assert isinstance(caught.value, ConfigError)


def test_other_data_is_an_error(build, path):
    state = build().state_dict()
    (Path(path) / "new.jsonl").write_text('{"text": "more"}\n')
    with pytest.raises(
        DataloaderStateError, match=r"not one in .*: 4 files .* of another size, .*exclude_from_loading, or give"
    ):
        build().load_state_dict(state)


def test_the_same_files_read_as_another_dataset_are_an_error(build):
    state = build().state_dict()
    with pytest.raises(
        DataloaderStateError, match=r"read as training\.dataset=python_stdlib, this run's is c4_test, .*set training"
    ):
        build(dataset="c4_test").load_state_dict(state)


def test_other_tokenizer_is_an_error(build, tokenizer, tmp_path_factory):
    """A cursor counts tokens."""
    state = build().state_dict()
    other = json.loads((TOKENIZER / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    file = tmp_path_factory.mktemp("other") / "tokenizer.json"
    file.write_text(json.dumps(other))
    one_merge_fewer = build_tokenizer(file)
    assert one_merge_fewer.vocab_size == tokenizer.vocab_size
    for changed in (one_merge_fewer, Tokenizer(tokenizer._backend, bos_id=None, eos_id=tokenizer.eos_id)):
        with pytest.raises(DataloaderStateError, match=r"another tokenizer, .*exclude_from_loading, or set model\.tok"):
            build(tokenizer=changed).load_state_dict(state)


def test_tokenizer_may_be_moved(build, tmp_path_factory):
    first = build()
    take(first, 4)
    copy = tmp_path_factory.mktemp("moved") / "tokenizer.json"
    copy.write_text(json.dumps(json.loads((TOKENIZER / "tokenizer.json").read_text()), indent=1))
    resumed = build(tokenizer=build_tokenizer(copy))
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict() == first.state_dict()


@pytest.mark.parametrize("validation", [False, True])
def test_a_document_that_cannot_be_encoded_is_named_by_its_file(build, path, tmp_path, validation):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"document": 0, "end": 1}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    loader = build(tokenizer=Tokenizer(backend, bos_id=None, eos_id=1), validation=validation)
    with pytest.raises(TokenizerError) as caught:
        take(loader, 1)
    file, document = re.match(
        rf"{path}/(\d).jsonl: the tokenizer cannot .* begins 'document (\d+): ", str(caught.value)
    ).groups()
    assert int(document) % 3 == int(file)


def test_a_mixture_names_datasets_and_paths(build, path, caplog):
    mixture = ["python_stdlib=3", f"{path}=1"]
    loader = build(dataset="c4", dataset_path=None, datasets=mixture, dp_world_size=2)
    take(loader, 5)
    assert loader.get_tokens_by_source() == {"python_stdlib": 15 * 16, path: 5 * 16}
    assert [message.split(":")[1].split("% ")[0] for message in caplog.messages[:2]] == [" 75", " 25"]
    assert loader.reading.datasets == ["python_stdlib", "c4"]
    assert build().get_tokens_by_source() == {}


def test_rows_that_cannot_be_read_are_passed_over_if_asked(build, path, caplog):
    whole = take(build(), 60)
    with (Path(path) / "0.jsonl").open("a") as file:
        file.write("{cut\n")
    with pytest.raises(DatasetError, match=r"0.jsonl, line 18: is not JSON"):
        build()
    loader = build(bad_rows="skip")
    assert len(take(loader, 60)) == len(whole)  # over several epochs
    told = [message for message in caplog.messages if "passed over" in message]
    assert len(told) == 1
    assert told[0].startswith(f"Row 1 that is passed over: {path}/0.jsonl, line 18: is not JSON")
    undisturbed = take(build(bad_rows="skip"), 40)
    resumed = build(bad_rows="skip")
    stopped = build(bad_rows="skip")
    take(stopped, 20)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 20) == undisturbed[20:]
    with (Path(path) / "1.jsonl").open("a") as file:
        file.write("3\n" * 101)
    with pytest.raises(DatasetError, match=r"training\.bad_rows=skip passes over 100 rows .* one more: mend the data"):
        build(bad_rows="skip")


def test_ranks_that_share_streams_are_told(build, path, caplog):
    convert("jsonl.gz", path)
    build(dp_world_size=4)
    assert "4 data-parallel ranks share 1 streams of it: more files would spare work" in caplog.messages


def test_reads_ahead_and_no_further(build):
    loader = build()
    batches = iter(loader)
    next(batches)
    wait_until(lambda: loader._ahead._queue.qsize() == PREFETCHED_BATCHES)
    time.sleep(0.05)
    assert loader._ahead._queue.qsize() == PREFETCHED_BATCHES


def num_threads() -> int:
    return sum(thread.name == "dataloader" for thread in threading.enumerate())


@pytest.mark.parametrize("validation", [True, False])
def test_close_ends_the_thread_at_once(validation, build, monkeypatch):
    monkeypatch.setattr("torchtitan.components.dataloader.STOP_TIMEOUT_SECONDS", 60)
    loader = build(validation=validation)
    batches = iter(loader)
    next(batches)
    assert num_threads() == 1
    begin = time.monotonic()
    loader.close()
    assert num_threads() == 0
    assert time.monotonic() - begin < 60
    assert next(batches, None) is None
    assert len(take(loader, 3)) == 3  # and it can be used again


def test_dropped_loader_ends_its_thread(tokenizer, path):
    loader = build_dataloader(
        training=Training("c4", path), tokenizer=tokenizer, dp_rank=0, dp_world_size=1, batch_size=1, seq_len=8,
        seed=0, global_batch_size=1,
    )  # fmt: skip
    next(iter(loader))
    assert num_threads() == 1
    del loader
    wait_until(lambda: num_threads() == 0, seconds=10)


def test_exit_does_not_wait_for_the_thread(path):
    code = f"""
from torchtitan.components.dataloader import build_dataloader, build_validation_dataloader
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.sections import Training, Validation
data = dict(dataset="c4", dataset_path={path!r})
arguments = dict(tokenizer=build_tokenizer("tests/assets/tokenizer"), dp_rank=0, dp_world_size=1)
validation = Validation(**data, local_batch_size=1, seq_len=8)
batch = dict(batch_size=1, global_batch_size=1, seq_len=8)
for_training = build_dataloader(training=Training(**data), **arguments, **batch, seed=0)
loaders = [for_training, build_validation_dataloader(validation, training=Training(), **arguments)]
batches = [next(iter(loader)) for loader in loaders]
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_error_is_raised_behind_the_batches_before_it(build, path, monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.packing.GROUP_DOCUMENTS", 1)
    loader = build(seq_len=32)
    batches = iter(loader)
    next(batches)
    wait_until(lambda: loader._ahead._queue.qsize() == PREFETCHED_BATCHES)
    for file in Path(path).iterdir():
        file.unlink()
    assert len(take_from(batches, PREFETCHED_BATCHES)) == PREFETCHED_BATCHES
    with pytest.raises(DatasetError, match="has disappeared while in use; put it back and start again"):
        take_from(batches)
    state = loader.state_dict()
    with pytest.raises(DatasetError, match="has disappeared"):
        next(loader._ahead)  # and again, rather than waiting for ever
    assert loader.state_dict() == state


def test_bad_line_stops_the_run_in_either_mode(build, path, monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.files.CHECKED_BYTES", 0)
    with (Path(path) / "1.jsonl").open("a") as file:
        file.write("{not JSON\n")
    for validation in (True, False):
        with pytest.raises(DatasetError, match=r"1.jsonl, line 18: is not JSON"):
            take(build(validation=validation))


def test_prefetcher_does_not_swallow_stop_iteration_from_within():
    def items():
        yield 1
        raise RuntimeError("within")

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 1
    with pytest.raises(RuntimeError, match="within"):
        next(prefetcher)
    assert list(Prefetcher(iter(range(50)))) == list(range(50))


@pytest.mark.parametrize("error", [SystemExit(3), type("PanicException", (BaseException,), {})("of a tokenizer")])
def test_errors_that_are_no_exceptions_end_the_wait_too(error):
    def items():
        yield 1
        raise error

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 1
    with pytest.raises(type(error)):
        next(prefetcher)


def test_prefetcher_that_is_asked_to_stop_takes_what_is_there_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr("torchtitan.components.dataloader.PATIENCE_SECONDS", 0.01)
    never = threading.Event()
    answers = iter([False, False, True])

    def items():
        yield 1
        never.wait()

    prefetcher = Prefetcher(items(), lambda: next(answers))
    assert next(prefetcher) == 1  # which no answer delays
    assert list(prefetcher) == []
    assert next(answers, None) is None
    never.set()
    prefetcher.close()


def test_what_stands_in_for_data_that_do_not_come_has_labels_everywhere(build, tokenizer, monkeypatch):
    """Of which agree_on_ignored leaves those that count where a tensor-parallel rank has the data."""
    monkeypatch.setattr("torchtitan.components.dataloader.PATIENCE_SECONDS", 0.01)
    never = threading.Event()
    monkeypatch.setattr("torchtitan.components.dataloader.SequenceReader.read", lambda _: iter(never.wait, True))
    loader = build()
    loader.asked_to_stop = lambda: True
    batch = next(iter(loader))
    never.set()
    assert loader.gave_up
    batch = DocumentMarker(tokenizer.bos_id, tokenizer.eos_id, keeps_labels=False)(batch)
    assert batch.tokens.shape == batch.labels.shape == (2, 16)
    assert batch.labels.ge(0).all()


def labelled(batches: list) -> list[tuple[tuple, tuple]]:
    """The sequences that have labels."""
    rows = [row for tokens, labels in batches for row in zip(map(tuple, tokens), map(tuple, labels), strict=True)]
    return [row for row in rows if set(row[1]) != {IGNORE_INDEX}]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 4), (2, 3), (5, 2), (7, 64)])
def test_validation_is_the_same_for_every_layout(world_size, batch_size, build):
    whole = labelled(take(build(validation=True, batch_size=1)))
    ranks = [
        take(build(validation=True, dp_rank=rank, dp_world_size=world_size, batch_size=batch_size))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {-(-len(whole) // (world_size * batch_size))}
    assert sorted(row for rank in ranks for row in labelled(rank)) == sorted(whole)
    for step in range(len(ranks[0])):  # rank by rank the same order too, so a run of some steps is comparable
        begin = step * world_size * batch_size
        of_step = [row for rank in ranks for row in labelled([rank[step]])]
        assert of_step == whole[begin : begin + world_size * batch_size]


def test_validation_drops_no_token(build, tokenizer):
    labels = torch.cat([batch.labels.flatten() for batch in build(validation=True)])
    total = sum(len(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in DOCUMENTS)
    assert (labels != IGNORE_INDEX).sum() == total - 1
    tokens = torch.cat([batch.tokens.flatten() for batch in build(validation=True)])
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.vocab_size


def test_validation_begins_anew_each_time(build):
    loader = build(validation=True)
    whole = take(build(validation=True))
    assert take(loader, 3) == whole[:3]  # broken off, as validation.steps does
    assert take(loader, 2) == whole[:2]
    assert take(loader) == whole
    assert take(loader) == whole
    assert num_threads() == 0  # all is read


@pytest.mark.gpu
def test_batches_are_pinned(build):
    batch = next(iter(build()))
    assert batch.tokens.is_pinned()
    assert batch.labels.is_pinned()
