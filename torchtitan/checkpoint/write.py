"""The files of a checkpoint, written: each rank's data, and `.metadata`, which says what is where in all of them.

They are those of torch.distributed.checkpoint, and its readers read them. Our own writing, because torch's plans anew
in the trainer's process: serial Python on the first rank, for all ranks, each time. Here each rank knows what it
writes (plan.py), and its table of what is where goes as bytes through the trainer to where `.metadata` is made: in
the asynchronous modes, another process. Values that are no tensors get more room than they need, so that the tables
of the next save are the same bytes; then 32 bytes of each rank say so, and the `.metadata` before is written again.
"""

import hashlib
import io
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtitan.checkpoint.plan import Plan, Planner, Shard
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import DIGEST, METADATA, check_sizes, reason
from torchtitan.config.errors import CheckpointError
from torchtitan.distributed.utils import local_tensor

_VERSION = "1.0.0"
"""Of torch.distributed.checkpoint's format."""
_PADDING = "archive/padding"
"""A file in the archive of a value, beside torch's; torch's have the same folder."""


class Digest(NamedTuple):
    """What the first rank must hear of a written file."""

    name: str
    num_bytes: int
    table: bytes
    """SHA-256."""


class WrittenFile(NamedTuple):
    digest: Digest
    table: bytes
    """Compressed: for each shard and value, what it is and where it lies."""


class Writer(Protocol):
    """What writes for one rank; its two calls raise what is wrong with the disk."""

    def write_file(self, path: Path, rank: int, plan: Plan, state: Mapping[str, Any]) -> WrittenFile: ...

    def write_metadata(self, path: Path, files: Sequence[Digest], tables: Sequence[bytes] | None) -> bool:
        """On the first rank, after all have written. False where the tables are needed, and not given."""


class CheckpointWriter:
    """One rank's, which keeps from one save to the next what has not changed."""

    def __init__(self) -> None:
        self._room: dict[str, int] = {}  # bytes for a value
        self._written: list[bytes] = []  # digests of the tables in .metadata
        self._metadata = b""

    def write_file(self, path: Path, rank: int, plan: Plan, state: Mapping[str, Any]) -> WrittenFile:
        path.mkdir(parents=True, exist_ok=True)
        file = path / f"__{rank}_0.distcp"
        table: list[tuple[Any, ...]] = []
        try:
            with file.open("wb") as stream:
                for shard in plan.shards:
                    begin = stream.tell()
                    torch.save(_to_save(shard, local_tensor(state[shard.key])), stream)
                    table.append((*shard, begin, stream.tell() - begin))
                for key in plan.values:
                    begin = stream.tell()
                    stream.write(self._serialise(key, state[key]))
                    table.append((key, begin, stream.tell() - begin))
                stream.flush()
                os.fsync(stream.fileno())
                num_bytes = stream.tell()
        except Exception as error:
            raise _first_os_error(error) or error from None
        digest, content = pack_table(table)
        return WrittenFile(Digest(file.name, num_bytes, digest), content)

    def write_metadata(self, path: Path, files: Sequence[Digest], tables: Sequence[bytes] | None) -> bool:
        digests = [file.table for file in files]
        if tables is not None:
            unpacked = [pickle.loads(zlib.decompress(table)) for table in tables]  # of our own ranks, a moment ago
            names = [file.name for file in files]
            self._metadata, self._written = pickle.dumps(make_metadata(names, unpacked)), digests
        if digests != self._written:
            return False
        # finds the files of all ranks, unless the folder is not one that all share
        check_sizes(path, {file.name: file.num_bytes for file in files})
        (path / METADATA).write_bytes(self._metadata)
        (path / DIGEST).write_text(hashlib.sha256(self._metadata).hexdigest())
        return True

    def _serialise(self, key: str, value: Any) -> bytes:
        """As torch.save writes it, with as much room for the next one as this one may need."""
        needed = len(_archive(value, 0))
        if needed > self._room.get(key, 0):
            self._room[key] = -(-needed * 5 // 4 // 512) * 512
        return _archive(value, self._room[key] - needed)


def pack_table(table: Sequence[tuple[Any, ...]]) -> tuple[bytes, bytes]:
    """Its digest, and the table as it is sent."""
    content = zlib.compress(pickle.dumps(table), 1)
    return hashlib.sha256(content).digest(), content


def make_metadata(names: Sequence[str], tables: Sequence[Sequence[tuple[Any, ...]]]) -> Metadata:
    """What lies where in the ranks' files. Tensors that are divided alike share their list of shards, also in a pickle.

    Raises CheckpointError where a tensor's shards do not fill it.
    """
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    boxes: dict[str, list[tuple[Any, Any]]] = {}
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    # one object for what is equal: pickled once
    keys: dict[str, str] = {}
    sizes: dict[tuple[int, ...], torch.Size] = {}
    for name, table in zip(names, tables, strict=True):
        for row in table:
            *shard, offset, length = row
            key = keys.setdefault(shard[0], shard[0])
            if len(shard) == 1:
                index = MetadataIndex(key)
                described[key] = BytesStorageMetadata()
            else:
                _, dtype, size, corner, extent = shard
                kinds.setdefault(key, (dtype, size))
                others = boxes.setdefault(key, [])
                index = MetadataIndex(key, sizes.setdefault(corner, torch.Size(corner)), len(others))
                others.append((corner, extent))
            places[index] = _StorageInfo(name, offset, length)
    chunks: dict[Any, list[ChunkStorageMetadata]] = {}
    chunk = {box: ChunkStorageMetadata(*map(torch.Size, box)) for of_key in boxes.values() for box in of_key}
    for key, of_key in boxes.items():
        dtype, size = kinds[key]
        division = (size, tuple(of_key))
        if division not in chunks:
            if sum(math.prod(extent) for _, extent in of_key) != math.prod(size) or len(set(of_key)) < len(of_key):
                raise CheckpointError(f"the ranks' shards of {key} do not fill it: {tuple(size)} of {of_key[:9]}")
            chunks[division] = [chunk[box] for box in of_key]
        described[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), chunks[division])
    paths = {key: (key,) for key in described}  # in a nested state, which ours is not
    return Metadata(described, planner_data=paths, storage_data=places, version=_VERSION)


def save(path: Path, state: Mapping[str, Any], *, planner: Planner, writer: Writer | None = None) -> None:
    """Write a checkpoint: a collective call. Where a rank fails, all raise the same CheckpointError."""
    writer, ranks = writer or CheckpointWriter(), planner.ranks
    plan = planner.plan(state)
    outcome: Digest | str
    try:
        outcome, table = writer.write_file(path, ranks.rank, plan, state)
    except Exception as error:
        outcome, table = reason(error), b""
    outcomes = ranks.gather_first(outcome)

    def finish(tables: list[bytes] | None) -> bool:
        assert outcomes is not None, "asked of the first rank"
        failures = {rank: why for rank, why in enumerate(outcomes) if isinstance(why, str)}
        if failures:
            alone = failures.keys() == {0}
            raise CheckpointError("; ".join(why if alone else f"rank {rank}: {why}" for rank, why in failures.items()))
        try:
            return writer.write_metadata(path, [each for each in outcomes if isinstance(each, Digest)], tables)
        except Exception as error:
            raise CheckpointError(reason(error)) from error

    if not ranks.ask_first(lambda: finish(None)):
        tables = ranks.gather_first(table)
        ranks.ask_first(lambda: finish(tables))


def save_alone(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint from this process, to a folder that is not there yet."""
    save(path, state, planner=Planner(Ranks(alone=True)))


@torch.no_grad()
def _to_save(shard: Shard, local: Tensor) -> Tensor:
    assert tuple(local.shape) == shard.sizes, f"{shard.key}: {tuple(local.shape)} held, {shard.sizes} planned"
    local = local.detach().cpu()
    # torch.save writes a tensor's whole storage
    return local.clone() if local.untyped_storage().nbytes() != local.nbytes else local


def _archive(value: Any, num_more: int) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(zipfile.ZipInfo(_PADDING), bytes(num_more))
    return content.getvalue()


def _first_os_error(error: BaseException) -> OSError | None:
    """Where a write to the file fails, torch's serialisation complains of its own state instead."""
    led_to_it: BaseException | None = error
    while led_to_it is not None:
        if isinstance(led_to_it, OSError):
            return led_to_it
        led_to_it = led_to_it.__cause__ or led_to_it.__context__
    return None
