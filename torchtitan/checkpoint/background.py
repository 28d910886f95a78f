"""Saving beside the training: a thread copies the state to CPU memory, another process writes the copy.

The thread plans the checkpoint with the other ranks; the process sees the copy in memory that both share, writes its
rank's file and answers with what is where in it. It communicates with nobody else: when it dies, the save fails on
this rank, all ranks hear of it from torch.distributed.checkpoint, and the next save starts another process.
docs/checkpoint.md says what it costs, and why it is neither a thread nor torch's own process.
"""

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.storage import CheckpointWriter
from torchtitan.tools.logging import logger

# Where a tensor begins in the buffer of copies: a multiple of every dtype's size.
ALIGNMENT = 64
# For torch's writer: copy nothing ahead from a GPU. All is copied, and the writing process must not open one.
NO_GPU = 0


class Place(NamedTuple):
    """Of a tensor in a buffer of bytes."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class BackgroundSaver:
    """At most one save is in flight."""

    def __init__(self, *, pinned: bool):
        self._copier = Copier(pinned=pinned and torch.cuda.is_available())
        self._process = WriterProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copying: Future[dict[str, Place]] | None = None
        self._saving: Future[None] | None = None

    def start(self, save: Callable[[Callable[[Path], StorageWriter]], None], state: dict[str, Any]) -> None:
        """Have the thread copy the tensors in `state`, then call `save` with what makes a writer of the copies."""
        assert self._saving is None, "wait() for the save in flight first"
        written = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._copying = copying = self._thread.submit(self._copier.copy, state, written)
        write = partial(_ProcessWriter, process=self._process, copier=self._copier, copying=copying)
        self._saving = self._thread.submit(save, write)

    def wait_for_copy(self) -> None:
        if self._copying is not None:
            self._copying.exception()  # of which the save tells

    def wait(self) -> None:
        """For the save in flight, if there is one."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._copier.close()
        self._process.close()


class Copier:
    """Copies a rank's shards into one buffer of shared CPU memory, which is kept from one save to the next."""

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._file: int | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @property
    def memory(self) -> str:
        """The buffer as a file that this user's processes can open."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @torch.no_grad()
    def copy(self, state: dict[str, Any], after: torch.cuda.Event | None) -> dict[str, Place]:
        """Where the copy of each tensor in `state` is, once the GPU has come to the event `after`."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # each thread has a current device of its own
        shards = {key: _shard(value) for key, value in state.items() if isinstance(value, Tensor)}
        places, end = {}, 0
        for key, shard in shards.items():
            places[key] = Place(end, shard.nbytes, shard.dtype, shard.shape)
            end += -(-shard.nbytes // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() != end:
            self._allocate(end)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            for key, shard in shards.items():
                places[key].of(self._buffer).copy_(shard, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return places

    def close(self) -> None:
        if self._file is None:
            return
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer = torch.empty(0, dtype=torch.uint8)
        os.close(self._file)
        self._file = None

    def _allocate(self, num_bytes: int) -> None:
        self.close()  # the old buffer is freed before there is a new one
        self._file = os.memfd_create("checkpoint")  # unlike /dev/shm, only memory itself limits its size
        self._buffer = torch.from_file(self.memory, shared=True, size=num_bytes, dtype=torch.uint8)
        if self._pinned:
            error = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), num_bytes, 1)
            if int(error) != 0:
                logger.warning(f"{num_bytes:,} bytes for checkpoints could not be pinned ({error}): copies are slower")
                self._pinned = False


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _ProcessWriter(CheckpointWriter):
    """Plans as torch's writer does, and leaves the writing to a WriterProcess."""

    def __init__(self, path: Path, *, process: "WriterProcess", copier: Copier, copying: Future[dict[str, Place]]):
        super().__init__(path)
        self._process = process
        self._copier = copier
        self._copying = copying

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        places = self._copying.result()  # raises the copy's error here, where the other ranks get to know of it
        data = {item.index: places.get(item.index.fqn) or planner.resolve_data(item) for item in plan.items}
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(self._process.write(Path(self.path), plan, self._copier.memory, data))
        return written


class WriterProcess:
    """Started at the first write, and again at the next one where it has died."""

    def __init__(self) -> None:
        self._pool = self._new_pool()

    def write(self, path: Path, plan: SavePlan, memory: str, data: dict[MetadataIndex, Any]) -> list[WriteResult]:
        try:
            writing = self._pool.submit(_write, path, plan, memory, data)
        except BrokenProcessPool:  # since the last write
            self._pool = self._new_pool()
            writing = self._pool.submit(_write, path, plan, memory, data)
        try:
            return writing.result()
        except BrokenProcessPool:
            raise RuntimeError("the process that writes checkpoints died; was it killed for want of memory?") from None

    def close(self) -> None:
        self._pool.shutdown()

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_live_as_long_as_the_trainer)


def _live_as_long_as_the_trainer() -> None:
    # What asks a run to stop is sent to all its processes: this one still finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def end_with_it() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _write(path: Path, plan: SavePlan, memory: str, data: dict[MetadataIndex, Place | io.BytesIO]) -> list[WriteResult]:
    """In the writing process: a rank's file."""
    buffer = torch.from_file(memory, shared=True, size=Path(memory).stat().st_size, dtype=torch.uint8)

    def resolve(item: WriteItem) -> Tensor | io.BytesIO:
        value = data[item.index]
        return value.of(buffer) if isinstance(value, Place) else value

    planner: Any = SimpleNamespace(resolve_data=resolve)  # of which torch's writer asks nothing else
    return CheckpointWriter(path, per_thread_copy_ahead=NO_GPU).write_data(plan, planner).value()


__all__ = ["BackgroundSaver"]
