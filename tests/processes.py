"""Processes that a test starts, or watches from outside."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

# One process imports what most tests need, and those that tests start are forked from it: each then begins in a tenth
# of a second, where one that imports torch anew takes seconds. It has the environment of the first test that asks.
multiprocessing.set_forkserver_preload(["pytest", "torchtitan.train", "torchtitan.models.common.parallelize"])
FORKED = multiprocessing.get_context("forkserver")


def wait_until(condition: Callable[[], bool], what: str = "the condition", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting for: {what}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Zombies have ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def find_worker(launcher: int, rank: int) -> int:
    """The process id of a rank among the children of its launcher."""
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in children.read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    raise AssertionError(f"the launcher has no worker of rank {rank}")
