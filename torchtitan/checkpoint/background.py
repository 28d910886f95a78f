"""Saving beside the training: a thread copies the state to CPU memory, another process writes the copy.

The thread agrees with the other ranks on who writes what; the process sees the copy in memory that both share, writes
its rank's file and, on the first rank, `.metadata`: serial Python for all ranks, which would hold up the trainer's. It
communicates with nobody else: when it dies, the save fails on this rank, all ranks hear of it from the thread, and the
next save starts another process. docs/checkpoint.md says what it costs, and why it is neither a thread nor torch's own
process.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchtitan.checkpoint.plan import Plan
from torchtitan.checkpoint.storage import reason
from torchtitan.checkpoint.write import CheckpointWriter, Digest, Writer, WrittenFile
from torchtitan.config.errors import CheckpointError
from torchtitan.distributed.utils import local_tensor
from torchtitan.tools.logging import logger

# Where a tensor begins in the buffer of copies: a multiple of every dtype's size.
ALIGNMENT = 64

# Of the process that writes: a fork would share the trainer's sockets and its use of a GPU, and has its threads' locks.
START_METHOD: Final = "spawn"


class Place(NamedTuple):
    """Of a tensor in a buffer of bytes."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class BackgroundSaver:
    """At most one save is in flight. Beside the training it is that save's Writer."""

    def __init__(self, *, pinned: bool):
        self._copier = Copier(pinned=pinned and torch.cuda.is_available())
        self._process = WriterProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copied = threading.Event()
        self._saving: Future[None] | None = None
        self._computed: torch.cuda.Event | None = None

    def start(self, save: Callable[[Writer], None]) -> None:
        """Have the thread call `save` with what writes copies of the tensors that it is given."""
        assert self._saving is None, "wait() for the save in flight first"
        self._computed = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._copied.clear()
        self._saving = self._thread.submit(self._save, save)

    def _save(self, save: Callable[[Writer], None]) -> None:
        try:
            save(self)
        finally:
            self._copied.set()  # also where it has not come so far

    def write_file(self, path: Path, rank: int, plan: Plan, state: Mapping[str, Any]) -> WrittenFile:
        places = self._copier.copy(plan, state, self._computed)
        self._copied.set()
        copies = Copies(self._copier.memory, places, {key: state[key] for key in plan.values})
        return self._process.call("write_file", path, rank, plan, copies)

    def write_metadata(self, path: Path, files: Sequence[Digest], tables: Sequence[bytes] | None) -> bool:
        return self._process.call("write_metadata", path, files, tables)

    def wait_for_copy(self) -> None:
        if self._saving is not None:
            self._copied.wait()

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


class Copies(NamedTuple):
    """A state for the writing process: where tensors are in the memory that it shares with the trainer, and values."""

    memory: str
    places: dict[str, Place]
    values: dict[str, Any]

    def open(self) -> dict[str, Any]:
        size = Path(self.memory).stat().st_size
        buffer = torch.from_file(self.memory, shared=True, size=size, dtype=torch.uint8)
        return {**{key: place.of(buffer) for key, place in self.places.items()}, **self.values}


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
    def copy(self, plan: Plan, state: Mapping[str, Any], after: torch.cuda.Event | None) -> dict[str, Place]:
        """Where the copy of each shard of the plan is, once the GPU has come to the event `after`."""
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # each thread has a current device of its own
        shards = {shard.key: local_tensor(state[shard.key]) for shard in plan.shards}
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


class WriterProcess:
    """Started at the first call, and again at the next one where it has died. What it knows dies with it."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Of its CheckpointWriter."""
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
        try:
            self._connection.send((method, arguments))
            outcome = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise RuntimeError("the process that writes checkpoints died; was it killed for want of memory?") from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        if self._process is not None:
            self._stop()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_write, args=(other_end,), name="checkpoint")
        self._process.start()
        other_end.close()  # so that its death ends what is read from it
        # Python waits for it at the end of a trainer that has not called close()
        self._stop = Finalize(None, _stop, (self._connection,), exitpriority=0)


def _stop(connection: Connection) -> None:
    with suppress(OSError):  # it has died
        connection.send(None)
    connection.close()


def _write(connection: Connection) -> None:
    """In the writing process: what is asked, until the trainer closes the connection."""
    # What asks a run to stop is sent to all its processes: this one still finishes its file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def end_with_it() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    writer = CheckpointWriter()
    while (call := connection.recv()) is not None:
        method, arguments = call
        try:
            outcome = getattr(writer, method)(*(x.open() if isinstance(x, Copies) else x for x in arguments))
        except Exception as error:
            outcome = CheckpointError(reason(error))
        connection.send(outcome)
