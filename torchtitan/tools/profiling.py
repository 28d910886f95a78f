"""Traces of where the time of a step goes, and snapshots of what the CUDA allocator holds, at a frequency.

<dump_folder>/<save_traces_folder>/step_20/rank0_trace.json.gz                   for chrome://tracing or Perfetto
<dump_folder>/<save_memory_snapshot_folder>/step_20/rank0_memory_snapshot.pickle for pytorch.org/memory_viz
"""

import gzip
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from torchtitan.config.sections import Profiling
from torchtitan.tools.logging import logger

# The first steps under the profiler are slower than the rest.
_MAX_WARMUP_STEPS = 3

_MAX_SNAPSHOT_EVENTS = 100_000


@contextmanager
def maybe_profile(
    profiling: Profiling, dump_folder: str, *, device: torch.device, rank: int, start_step: int
) -> Iterator[Callable[[], None]]:
    """Profile the steps inside as the section says. Call what it yields at the end of every step.

    `start_step` is the number of steps already done. An out-of-memory error that passes through leaves a snapshot.
    """
    with ExitStack() as stack:
        after_step: list[Callable[[], None]] = []
        if profiling.enable_profiling and rank in profiling.ranks:
            folder = Path(dump_folder, profiling.save_traces_folder)
            after_step.append(stack.enter_context(_traces(folder, profiling.profile_freq, device, rank, start_step)))
        if profiling.enable_memory_snapshot and device.type != "cuda":
            logger.warning("profiling.enable_memory_snapshot: there is no CUDA allocator here, no snapshot is written")
        elif profiling.enable_memory_snapshot:
            folder = Path(dump_folder, profiling.save_memory_snapshot_folder)
            after_step.append(stack.enter_context(_snapshots(folder, profiling.profile_freq, rank, start_step)))

        def step_done() -> None:
            for step in after_step:
                step()

        yield step_done


@contextmanager
def _traces(folder: Path, freq: int, device: torch.device, rank: int, start_step: int) -> Iterator[Callable[[], None]]:
    """Trace every `freq`-th step of the run, also where this start begins between two of them."""
    saved = 0

    def save(profiler: profile) -> None:
        nonlocal saved
        if (start_step + profiler.step_num) % freq or profiler.step_num == saved:
            return  # the run ended before the step that was to be traced
        saved = profiler.step_num
        path = folder / f"step_{start_step + profiler.step_num}" / f"rank{rank}_trace.json.gz"
        plain = path.with_suffix("")
        with _writing("profile", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(plain))
            if not _ends_with(plain, b"}"):  # the profiler says nothing of it
                raise OSError("it is missing or cut; is the disk full?")
            with plain.open("rb") as trace, gzip.open(path, "wb", compresslevel=1) as packed:  # torch's own is at 9
                shutil.copyfileobj(trace, packed)
            plain.unlink()

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    warmup = min(_MAX_WARMUP_STEPS, freq - 1)
    logger.info(f"Profiling one step of every {freq}; the traces go to {folder}")
    with warnings.catch_warnings():
        # It warns that each trace holds one cycle only and, at a frequency of 1, that there is no warm-up: both meant.
        warnings.filterwarnings("ignore", message=".*Profiler", category=UserWarning)
        cycle = schedule(wait=freq - 1 - warmup, warmup=warmup, active=1)
        with profile(
            activities=activities,
            schedule=lambda step: cycle(start_step % freq + step),
            on_trace_ready=save,
            record_shapes=True,
        ) as profiler:
            yield profiler.step


@contextmanager
def _snapshots(folder: Path, freq: int, rank: int, start_step: int) -> Iterator[Callable[[], None]]:
    """Write what the allocator did up to every `freq`-th step, and up to an out-of-memory error."""
    step = start_step

    def save(name: str) -> None:
        path = folder / name / f"rank{rank}_memory_snapshot.pickle"
        with _writing("memory snapshot", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))

    def after_step() -> None:
        nonlocal step
        step += 1
        if step % freq == 0:
            save(f"step_{step}")

    torch.cuda.memory._record_memory_history(max_entries=_MAX_SNAPSHOT_EVENTS)
    logger.info(f"Recording the CUDA allocator; a snapshot every {freq} steps goes to {folder}")
    try:
        yield after_step
    except torch.OutOfMemoryError:
        save(f"step_{step + 1}_out_of_memory")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _writing(what: str, path: Path) -> Iterator[None]:
    """Say whether `path` was written. A full disk is no reason to stop training, nor to hide an out-of-memory error."""
    begin = time.perf_counter()
    try:
        yield
    except OSError as error:
        logger.warning(f"The {what} {path} was not written: {error.strerror or error}")
    else:
        logger.info(f"Wrote the {what} {path} in {time.perf_counter() - begin:.1f}s")


def _ends_with(path: Path, end: bytes) -> bool:
    if not path.exists() or path.stat().st_size < len(end):
        return False
    with path.open("rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end
