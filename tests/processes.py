"""Processes that a test starts, or watches from outside."""

import multiprocessing
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# One process imports what most tests need, and those that tests start are forked from it: each then begins in a tenth
# of a second, where one that imports torch anew takes seconds. It has the environment of the first test that asks.
multiprocessing.set_forkserver_preload(["tests.preloaded"])
FORKED = multiprocessing.get_context("forkserver")


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def get_worker_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker, whose rank 0 is to serve the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def wait_until(condition: Callable[[], bool], what: str = "the condition", seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting for: {what}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Zombies have ended too."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def find_children(pid: int) -> list[int]:
    """Ids of the processes that a process has started; threads and processes may end while they are listed."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, children.read_text().split())
    return found


def find_worker(launcher: int, rank: int) -> int:
    """The process id of a rank among the children of its launcher."""
    for pid in find_children(launcher):
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
    raise AssertionError(f"the launcher has no worker of rank {rank}")
