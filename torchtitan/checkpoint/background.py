"""Saving beside the training: another thread copies the state to CPU memory and writes the copy.

With pinned memory the bytes are written by another process, so that the trainer's Python is not held up. The
thread plans the checkpoint with the other ranks; the process gets the copy in shared memory, writes its rank's file
and answers with what is where in it. It communicates with nobody else: when it dies, the save fails on this rank,
all ranks hear of it through the plan, and the next save starts another process.
"""

import atexit
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.storage import CheckpointWriter
from torchtitan.tools.logging import logger

State = dict[str, Any]
Request = tuple[Path, SavePlan, torch.UntypedStorage, dict[MetadataIndex, Any]]

# Where a tensor begins in the buffer of copies: a multiple of every dtype's size.
ALIGNMENT = 64
# For torch's writer: copy nothing ahead from a GPU. All is copied, and it would wait for training's kernels.
NO_GPU = 0


class BackgroundSaver:
    """At most one save is in flight."""

    def __init__(self, *, pinned: bool):
        self._copier = Copier(shared=pinned, pinned=pinned and torch.cuda.is_available())
        self._process = WriterProcess() if pinned else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._saving: Future[None] | None = None

    def start(self, save: Callable[[SavePlanner], None], state: State) -> None:
        """Have another thread copy the tensors in `state`, then call `save` with a planner for the copies."""
        assert self._saving is None, "wait() for the save in flight first"
        self._is_copied.clear()
        written = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._saving = self._thread.submit(self._copy_and_save, save, state, written)

    def writer(self, path: Path) -> StorageWriter:
        if self._process is not None:
            return ProcessWriter(path, self._process)
        return CheckpointWriter(path, per_thread_copy_ahead=NO_GPU)

    def wait_for_copy(self) -> None:
        self._is_copied.wait()

    def wait(self) -> None:
        """For the save in flight, if there is one."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._copier.close()
        if self._process is not None:
            self._process.close()

    def _copy_and_save(
        self, save: Callable[[SavePlanner], None], state: State, written: torch.cuda.Event | None
    ) -> None:
        copies: State | Exception
        try:
            copies = self._copier.copy(state, after=written)
        except Exception as error:
            copies = error
        finally:
            self._is_copied.set()
        save(CopyPlanner(state, copies))


class Copier:
    """Copies a rank's shards into one buffer in CPU memory, which is kept from one save to the next."""

    def __init__(self, *, shared: bool, pinned: bool):
        self._shared = shared
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @torch.no_grad()
    def copy(self, state: State, *, after: torch.cuda.Event | None) -> State:
        """`state` with plain tensors in place of those that are there, once the GPU has come to the event `after`."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # each thread has a current device of its own
        shards = {key: _shard(value) for key, value in state.items() if isinstance(value, Tensor)}
        num_bytes = sum(_aligned(shard.nbytes) for shard in shards.values())
        if self._buffer.numel() != num_bytes:
            self._allocate(num_bytes)
        copies = dict(state)
        start = 0
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            for key, shard in shards.items():
                copies[key] = Place(start, shard.nbytes, shard.dtype, shard.shape).of(self._buffer)
                copies[key].copy_(shard, non_blocking=True)
                start += _aligned(shard.nbytes)
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def close(self) -> None:
        self._allocate(0)

    def _allocate(self, num_bytes: int) -> None:
        if self._pinned and self._buffer.numel():
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one is freed before there is a new one
        if num_bytes:
            storage = torch.UntypedStorage._new_shared(num_bytes) if self._shared else torch.UntypedStorage(num_bytes)
            self._buffer = _as_bytes(storage)
        if self._pinned and num_bytes:
            error = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), num_bytes, 1)
            if int(error) != 0:
                logger.warning(f"{num_bytes:,} bytes for checkpoints could not be pinned ({error}): copies are slower")
                self._pinned = False


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class CopyPlanner(DefaultSavePlanner):
    """Plans from the live tensors, which say how they are sharded, and takes the data from their copies."""

    def __init__(self, state: State, copies: State | Exception):
        super().__init__()
        self._live = state
        self._copies = copies

    def set_up_planner(
        self, state_dict: State, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        if isinstance(self._copies, Exception):
            raise self._copies  # here, where the other ranks get to know of it
        super().set_up_planner(self._live, storage_meta, is_coordinator)

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert not isinstance(self._copies, Exception)
        return self._copies[index.fqn]  # a rank has one shard of a tensor


class Place(NamedTuple):
    """Of a tensor in a buffer of bytes."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class ProcessWriter(CheckpointWriter):
    """Plans as torch's writer does, and leaves the writing to a WriterProcess."""

    def __init__(self, path: Path, process: "WriterProcess"):
        super().__init__(path)
        self._process = process

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        # All tensors are in one buffer: it is sent once, as an open file, and each tensor as its place in it.
        buffer = torch.UntypedStorage()
        data: dict[MetadataIndex, Any] = {}
        for item in plan.items:
            data[item.index] = value = planner.resolve_data(item)
            if isinstance(value, Tensor):
                buffer = value.untyped_storage()
                start = int(value.storage_offset()) * value.itemsize
                data[item.index] = Place(start, value.nbytes, value.dtype, value.shape)
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(self._process.write((Path(self.path), plan, buffer, data)))
        return written


class WriterProcess:
    """Started at the first write, ended by close()."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def write(self, request: Request) -> list[WriteResult]:
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._process is not None
        assert self._connection is not None
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=1)
            raise RuntimeError(
                f"the process that writes checkpoints died (exit code {self._process.exitcode})"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process: it finds its pipe closed, after the write that it is in."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.join()
            self._process = None
            atexit.unregister(self.close)

    def _start(self) -> None:
        self.close()
        context = torch.multiprocessing.get_context("spawn")
        self._connection, its_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(its_end,), daemon=True)
        self._process.start()
        its_end.close()
        atexit.register(self.close)


class _ResolvedData:
    """Stands for the planner, of which torch's writer only asks the data of an item."""

    def __init__(self, buffer: Tensor, data: dict[MetadataIndex, Any]):
        self._buffer = buffer
        self._data = data

    def resolve_data(self, item: WriteItem) -> Any:
        value = self._data[item.index]
        return value.of(self._buffer) if isinstance(value, Place) else value


def _serve(connection: Connection) -> None:
    """The life of the writing process: a write for each message, until the trainer closes the pipe or dies."""
    # What asks a run to stop is sent to all its processes: this one still finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answer: list[WriteResult] | Exception
    while True:
        try:
            path, plan, buffer, data = connection.recv()
            writer = CheckpointWriter(path, per_thread_copy_ahead=NO_GPU)
            answer = writer.write_data(plan, _ResolvedData(_as_bytes(buffer), data)).value()  # type: ignore[arg-type]
        except (EOFError, ConnectionError):
            return
        except Exception as error:
            answer = error
        buffer = None  # unmap the shared memory
        try:
            connection.send(answer)
        except OSError:
            return


__all__ = ["BackgroundSaver"]
