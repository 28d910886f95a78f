"""Real processes for tests: a function runs on every rank of a gloo group, and what the ranks return comes back."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import FORKED


def run_processes(worker: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What worker(*args) returned, by rank. `worker` is a module's function; its failure fails the call."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (worker, world_size, folder, args)
        mp.start_processes(_run, arguments, world_size, start_method=FORKED.get_start_method())
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _run(rank: int, worker: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    torch.save(worker(*args), Path(folder) / f"result-{rank}")
    dist.barrier()
    dist.destroy_process_group()
