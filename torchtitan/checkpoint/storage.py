"""The files of a checkpoint, read: by torch's reader, with checks, and without running code.

`.metadata` says what is where; `__<rank>_0.distcp` are the ranks' data, each entry as torch.save writes it, with
checksums (write.py). Nothing here communicates.
"""

import hashlib
import io
import os
import pathlib
import pickle
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from torchtitan.checkpoint.upstream import with_our_keys
from torchtitan.config.errors import CheckpointError

# What a checkpoint holds besides the weights: the first part of a key names it. Weights stand under their own names.
STATES = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng")

METADATA = ".metadata"
DIGEST = ".metadata.sha256"
"""A flipped bit in .metadata could otherwise load wrong values: only the data files have checksums of their own."""


class UnusableCheckpointError(CheckpointError):
    """One that is damaged or does not hold all that is needed: an older one may be usable."""


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# .metadata

_KNOWN = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,  # of Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that torch writes into .metadata, and none that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code and is part of no checkpoint")
        return _KNOWN[module, name]


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint at `path` holds, under our keys, also where upstream wrote it.

    UnusableCheckpointError names a file that is missing, cut or unreadable.
    """
    found = parse_metadata(path, read_metadata_file(path))
    check_files(path, found)
    return found


def read_metadata_file(path: Path) -> bytes:
    file, digest = path / METADATA, path / DIGEST
    if not path.is_dir():
        raise UnusableCheckpointError(f"there is no checkpoint at {path}")
    try:
        content = file.read_bytes()
        if digest.exists() and digest.read_text() != hashlib.sha256(content).hexdigest():  # others' have none
            raise UnusableCheckpointError(f"{file} is damaged (a checksum does not match)")
    except OSError as error:
        raise UnusableCheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise UnusableCheckpointError(f"{digest} is damaged ({reason(error)})") from error
    return content


def parse_metadata(path: Path, content: bytes) -> Metadata:
    """Of the .metadata at `path` what it says."""
    try:
        found = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(found, Metadata):
            raise CheckpointError(f"it holds a {type(found).__name__}")
    except Exception as error:  # a damaged pickle may raise anything
        raise UnusableCheckpointError(f"{path / METADATA} is damaged ({reason(error)})") from error
    return with_our_keys(found)


def check_files(path: Path, metadata: Metadata) -> None:
    """Raise UnusableCheckpointError where a file that .metadata names is missing or cut."""
    num_bytes: dict[str, int] = defaultdict(int)
    for entry in metadata.storage_data.values():
        num_bytes[entry.relative_path] = max(num_bytes[entry.relative_path], entry.offset + entry.length)
    check_sizes(path, num_bytes)


def check_sizes(path: Path, num_bytes: Mapping[str, int]) -> None:
    """Raise UnusableCheckpointError where one of the files is missing, or has fewer bytes."""
    for name, expected in sorted(num_bytes.items()):
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise UnusableCheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        if found < expected:
            raise UnusableCheckpointError(f"{path / name} is cut: {found:,} bytes of at least {expected:,}")


def find_weights(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.split(".")[0] not in STATES
    }


def check_weights(path: Path, metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the checkpoint holds a model with these parameters, no more and no fewer."""
    saved = {name: tuple(entry.size) for name, entry in find_weights(metadata).items()}
    problems = [
        f"{name} is {saved[name]} in the checkpoint and {shapes[name]} here"
        for name in sorted(shapes.keys() & saved.keys())
        if shapes[name] != saved[name]
    ]
    problems += [f"{name} is not in the checkpoint" for name in sorted(shapes.keys() - saved.keys())]
    problems += [f"{name} is only in the checkpoint" for name in sorted(saved.keys() - shapes.keys())]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path} holds another model than this one: {problems[0]}{more}")


# Data


class _CheckpointReader(FileSystemReader):
    """torch's reader, with errors that name the file; it compares the checksums, which torch writes and never reads."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            file = Path(self.path) / name
            try:
                super().read_data(replace(plan, items=items), planner)
            except OSError as error:
                raise UnusableCheckpointError(f"{file} cannot be read: {error.strerror}") from error
            except Exception as error:
                raise UnusableCheckpointError(f"{file} is damaged ({reason(error)})") from error
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        """An entry's bytes, read once: for the checksums, and for the tensor that torch makes of them."""
        file.seek(sinfo.offset)
        content = io.BytesIO(file.read(sinfo.length))
        with zipfile.ZipFile(content) as archive:  # torch.save's format
            if archive.testzip() is not None:
                raise CheckpointError("a checksum does not match")
        content.seek(0)
        return content


class _LoadPlanner(DefaultLoadPlanner):
    """torch's planner, for flat keys, which unpickles nothing but plain values."""

    def __init__(self, on_read: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_read = on_read

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._on_read(tensor.nbytes)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def load_alone(
    path: Path,
    state: dict[str, Any],
    metadata: Metadata | None = None,
    *,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Fill `state` from the checkpoint at `path`: each rank reads for itself, and none tells another what.

    on_read: told of the bytes of each part of a tensor that has been filled.
    """
    reader = _CheckpointReader(path, metadata or read_metadata(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it was asked to be
            load(state, storage_reader=reader, planner=_LoadPlanner(on_read), no_dist=True)
    except CheckpointException as error:
        raise UnusableCheckpointError(f"{path} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line for a log. Raises what it is given if that is meant to end the process."""
    if isinstance(error, CheckpointException):
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        if len(failures) == 1 and 0 in failures:
            return reason(failures[0])
        return "; ".join(f"rank {rank}: {reason(failure)}" for rank, failure in failures.items())
    if not isinstance(error, Exception):
        raise error  # KeyboardInterrupt, which torch collects too
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    first_line = str(error).strip().partition("\n")[0]
    return first_line if isinstance(error, CheckpointError) else f"{type(error).__name__}: {first_line}"
