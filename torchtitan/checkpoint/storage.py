"""Where checkpoints lie: the folder with a run's checkpoints, and the files of one.

A checkpoint is written to `step-N.incomplete-<run>` and renamed to `step-N` when all of it is on the disk, so
a folder's name says whether it is whole. Nothing here communicates: one rank calls it, or each for itself.
"""

import hashlib
import io
import os
import re
import shutil
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from torchtitan.config.errors import CheckpointError

# What a checkpoint holds besides the weights: the first part of a key names it. Weights stand under their own names.
STATES = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng")


_DIGEST = ".metadata.sha256"
"""A flipped bit in .metadata could otherwise load wrong values: only the data files have checksums of their own."""


OPTIONS = "config.toml"
"""In a checkpoint: all options of its run."""
_EXCLUDED = "excluded_from_loading.txt"
"""In a checkpoint: what its run had been told to leave out of the one that it began from."""


_REPLACED = "replaced"
"""Ending of a whole checkpoint that makes room for another of the same step."""


class UnusableCheckpointError(CheckpointError):
    """One that is damaged or does not hold all that is needed: an older one may be usable."""


class CheckpointFolder:
    """The checkpoints of a run. `run` tells what this run is writing from what a killed one left."""

    def __init__(self, path: Path, run: str):
        self.path = path
        self._run = run

    def create(self) -> None:
        """Raises CheckpointError where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be saved in {self.path}: {reason(error)}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise CheckpointError(f"checkpoints cannot be saved in {self.path}: no permission to write there")
        for replaced in self.path.glob(f"step-*.incomplete-{_REPLACED}"):
            whole = replaced.with_suffix("")
            if not whole.exists():  # killed before the new one had its name
                replaced.rename(whole)

    def of(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def incomplete(self, step: int) -> Path:
        return self.path / f"step-{step}.incomplete-{self._run}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        matches = (re.fullmatch(r"step-(\d+)", name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def leftovers(self) -> list[Path]:
        """What killed runs left half-written or half-removed."""
        others = (name for name in self._names() if not name.endswith(f".incomplete-{self._run}"))
        return [self.path / name for name in sorted(others) if re.fullmatch(r"step-\d+\.incomplete-.*", name)]

    def note_options(self, path: Path, toml: str) -> None:
        """The run's options, so that whoever reads the checkpoint elsewhere or later knows which model it is."""
        if toml:
            (path / OPTIONS).write_text(toml, encoding="utf-8")

    def note_excluded(self, path: Path, names: Sequence[str]) -> None:
        if names:
            (path / _EXCLUDED).write_text("\n".join(names))

    def excluded_before(self, path: Path) -> list[str]:
        file = path / _EXCLUDED
        return file.read_text().split() if file.exists() else []

    def publish(self, source: Path, step: int) -> None:
        """Make `source` the checkpoint of `step`, now that it is written."""
        for file in source.iterdir():
            _sync(file)  # torch does it too, but before the last buffer is flushed
        _sync(source)
        replaced = self._set_aside(self.of(step), _REPLACED) if self.of(step).exists() else None
        source.rename(self.of(step))
        _sync(self.path)
        if replaced is not None:
            self.remove([replaced])

    def keep_latest(self, num_kept: int, *, up_to: int) -> None:
        """Remove the oldest of the checkpoints up to step `up_to` until `num_kept` are left; 0 keeps all."""
        steps = [step for step in self.steps() if step <= up_to]
        if num_kept:
            # renamed first: one that is half-removed must not look whole
            self.remove([self._set_aside(self.of(step), "removed") for step in steps[:-num_kept]])

    def remove(self, incomplete: Iterable[Path]) -> None:
        """What cannot be removed is left over for the next time."""
        for path in incomplete:
            if path.is_symlink():  # to other storage, where the files stay
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path, why: str) -> Path:
        aside = path.with_name(f"{path.name}.incomplete-{why}")
        if aside.exists():
            self.remove([aside])
        return path.rename(aside)

    def _names(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path) if entry.is_dir()] if self.path.is_dir() else []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint at `path` holds. UnusableCheckpointError names a file that is missing, cut or unreadable."""
    file = path / ".metadata"
    if not path.is_dir():
        raise UnusableCheckpointError(f"there is no checkpoint at {path}")
    try:
        _compare_digest(file)
        metadata = FileSystemReader(path).read_metadata()
    except OSError as error:
        raise UnusableCheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise UnusableCheckpointError(f"{file} is damaged ({reason(error)})") from error
    num_bytes: dict[str, int] = defaultdict(int)
    for entry in metadata.storage_data.values():
        num_bytes[entry.relative_path] = max(num_bytes[entry.relative_path], entry.offset + entry.length)
    for name, expected in sorted(num_bytes.items()):
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise UnusableCheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        if found < expected:
            raise UnusableCheckpointError(f"{path / name} is cut: {found:,} bytes of at least {expected:,}")
    return metadata


def _compare_digest(file: Path) -> None:
    """Raise CheckpointError where the file is not what CheckpointWriter wrote; others leave no digest."""
    digest = file.with_name(_DIGEST)
    if digest.exists() and digest.read_text() != hashlib.sha256(file.read_bytes()).hexdigest():
        raise CheckpointError("a checksum does not match")


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


class CheckpointWriter(FileSystemWriter):
    """torch's writer, whose errors tell what is wrong with the disk, and which leaves a digest of the metadata.

    Where a write to the file fails, torch's serialisation complains of its own state instead; and what another rank
    is told of an error does not include the one that led to it.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            led_to_it: BaseException | None = error
            while led_to_it is not None:
                if isinstance(led_to_it, OSError):
                    raise led_to_it from None
                led_to_it = led_to_it.__cause__ or led_to_it.__context__
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, after all have written."""
        super().finish(metadata, results)
        content = Path(self.path, ".metadata").read_bytes()
        Path(self.path, _DIGEST).write_text(hashlib.sha256(content).hexdigest())


class CheckpointReader(FileSystemReader):
    """torch's reader, with errors that name the file; it compares the checksums, which torch writes and never reads."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            try:
                self._compare_checksums(Path(self.path) / name, items)
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:
                raise UnusableCheckpointError(f"{Path(self.path) / name} is damaged ({reason(error)})") from error
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _compare_checksums(self, file: Path, items: Iterable[ReadItem]) -> None:
        with file.open("rb") as stream:
            for item in items:
                entry = self.storage_data[item.storage_index]
                stream.seek(entry.offset)
                with zipfile.ZipFile(io.BytesIO(stream.read(entry.length))) as archive:  # torch.save's format
                    if archive.testzip() is not None:
                        raise CheckpointError("a checksum does not match")


def load_alone(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` from a checkpoint in this process, with or without others: for tools, not for training."""
    with _alone(), describing(path):
        load(state, storage_reader=CheckpointReader(path), no_dist=True)


def save_alone(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint from this process, to a folder that is not there yet."""
    with _alone():
        save(state, storage_writer=CheckpointWriter(path), no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it was asked to be
        yield


@contextmanager
def describing(path: Path) -> Iterator[None]:
    """Turn the exception that torch collects from all ranks into one line."""
    try:
        yield
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


__all__ = [
    "STATES",
    "CheckpointFolder",
    "CheckpointReader",
    "CheckpointWriter",
    "UnusableCheckpointError",
    "check_weights",
    "describing",
    "find_weights",
    "load_alone",
    "read_metadata",
    "reason",
    "save_alone",
]
