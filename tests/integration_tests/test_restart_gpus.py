"""A worker on a GPU is killed, and its run ends as one that was left alone; a run goes on with half of its GPUs.

What test_faults.py shows of many faults on CPU is shown here of one with NCCL: the other workers wait in a
collective, on the device, for a rank that is no more. What test_resume.py shows of other numbers of ranks is shown here
of a sharded run over NCCL.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integration_tests.lives import (
    OPTIONS,
    REPO,
    TIMEOUT_S,
    checkpoints,
    last_step,
    read_records,
    read_steps,
    write_data,
)
from tests.processes import find_worker, wait_until

STEPS, INTERVAL, KILL_AFTER = 60, 5, 17
SAVING = f"--training.steps {STEPS} --checkpoint.enable_checkpoint --checkpoint.interval {INTERVAL}"
# Ranks that wait on a GPU for a dead one learn of it when a collective's time is out.
OTHERS = "--liger_kernel.enable_fused_linear_cross_entropy --comm.train_timeout_seconds 10"
COMPACT = "--optimizer.state_precision compact --training.mixed_precision_param bfloat16"
STARTS = "Training starts at step "


# For scripts/benchmark_parallel.py --device cpu; otherwise test_faults.py has the same on CPU.
IS_REHEARSAL = "REHEARSAL" in os.environ


def needs(num_gpus: int) -> list[pytest.MarkDecorator]:
    few = torch.cuda.device_count() < num_gpus
    return [pytest.mark.gpu, pytest.mark.skipif(few, reason=f"needs {num_gpus} GPUs")]


def start(folder: Path, device: str, world_size: int, options: str) -> subprocess.Popen[bytes]:
    """A run by the launcher, of data beside its folder; its log is beside it too."""
    own = f"{OPTIONS} --training.dataset_path {folder.parent}/data.jsonl --job.dump_folder {folder} {options}"
    command = ["-m", "torchtitan.launch", "--nproc_per_node", str(world_size), "--max_restarts", "1", *own.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen([sys.executable, *command], cwd=REPO, env=environment, stdout=log, stderr=log)


REHEARSAL = pytest.mark.skipif(not IS_REHEARSAL, reason="only in a rehearsal")


@pytest.mark.parametrize(
    ("device", "world_size", "states"),
    [
        pytest.param("cpu", 2, "", id="cpu2", marks=REHEARSAL),
        pytest.param("cuda", 1, COMPACT, id="cuda1-compact", marks=needs(1)),
        *(pytest.param("cuda", size, "", id=f"cuda{size}", marks=needs(size)) for size in (2, 4, 8)),
        pytest.param("cuda", 2, COMPACT, id="cuda2-compact", marks=needs(2)),
    ],
)
def test_after_a_kill_the_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, device: str, world_size: int, states: str, record_property: Callable[[str, object], None]
) -> None:
    options = f"{SAVING} {OTHERS} {states} --parallelism.data_parallel_shard_degree {world_size}"
    write_data(tmp_path / "data.jsonl")

    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    log = folder.with_suffix(".log")
    alone = start(undisturbed, device, world_size, f"{options} --checkpoint.interval 1000000")
    launcher = start(folder, device, world_size, options)
    try:
        wait_until(lambda: last_step(folder) >= KILL_AFTER or launcher.poll() is not None, seconds=TIMEOUT_S)
        assert launcher.poll() is None, log.read_text()
        # where there are others, not rank 0, which writes the metrics
        os.kill(find_worker(launcher.pid, world_size - 1), signal.SIGKILL)
        killed_at, begin = last_step(folder), time.monotonic()
        wait_until(lambda: log.read_text().count(STARTS) == 2 or launcher.poll() is not None, seconds=TIMEOUT_S)
        record_property("seconds_to_restart", time.monotonic() - begin)
        assert launcher.wait(TIMEOUT_S) == 0, log.read_text()
        assert alone.wait(TIMEOUT_S) == 0, undisturbed.with_suffix(".log").read_text()
    finally:
        for run in (launcher, alone):
            run.kill()  # its workers end with it
    said = log.read_text()
    continued_at = int(said.rpartition(STARTS)[2].split()[0])
    record_property("killed_after_step", killed_at)
    record_property("continued_at_step", continued_at)
    assert (continued_at - 1) % INTERVAL == 0 and 1 < continued_at <= killed_at + 2, said
    assert f"step-{STEPS}" in checkpoints(folder)

    records, expected = read_records(folder), read_steps(undisturbed)
    assert list(records) == list(expected) == list(range(1, STEPS + 1))
    pairs = [(step, said, expected[step]) for step, lives in records.items() for said in lives]
    for name in ("loss", "grad_norm"):
        largest = max(abs(getattr(a, name) - getattr(b, name)) / getattr(b, name) for _, a, b in pairs)
        record_property(f"{name}_difference", largest)
    unlike = [step for step, said, correct in pairs if said != correct]
    assert not unlike, f"steps {unlike} are unlike, and {continued_at} is the first after it"  # to the last bit


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        pytest.param("cpu", 2, 1, id="cpu2to1", marks=REHEARSAL),
        *(pytest.param("cuda", n, n // 2, id=f"cuda{n}to{n // 2}", marks=needs(n)) for n in (2, 4, 8)),
    ],
)
def test_half_of_the_gpus_go_on_with_a_run_as_all_of_them_would(
    tmp_path: Path, device: str, before: int, after: int, record_property: Callable[[str, object], None]
) -> None:
    """All train the whole run; half of them its second part, from the checkpoint of its middle."""
    write_data(tmp_path / "data.jsonl")
    middle = STEPS // 2
    options = f"{SAVING} {OTHERS} --checkpoint.interval {middle} --training.global_batch_size {2 * before}"
    folders = whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder, world_size in zip(folders, (before, after), strict=True):
        run = start(folder, device, world_size, options)
        assert run.wait(TIMEOUT_S) == 0, folder.with_suffix(".log").read_text()
        if folder == whole:
            shutil.copytree(whole / f"checkpoint/step-{middle}", resumed / f"checkpoint/step-{middle}")
    steps, expected = read_steps(resumed), read_steps(whole)
    assert list(steps) == list(range(middle + 1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        pairs = [(getattr(said, name), getattr(expected[step], name)) for step, said in steps.items()]
        largest = max(abs(a - b) / b for a, b in pairs)
        record_property(f"{name}_difference", largest)
        assert largest < 1e-4  # float32, whose sums over ranks and microbatches are added in another order
