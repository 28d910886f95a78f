"""A worker on a GPU is killed: the launcher starts all again, and the run ends as one that was left alone.

What test_faults.py shows of many faults on CPU is shown here of one with NCCL: the other workers wait in a
collective, on the device, for a rank that is no more.
"""

import os
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


@pytest.mark.parametrize(
    ("device", "world_size", "states"),
    [
        pytest.param("cpu", 2, "", id="cpu2", marks=pytest.mark.skipif(not IS_REHEARSAL, reason="only in a rehearsal")),
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

    def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        """A run by the launcher; its log is beside its folder."""
        own = f"{OPTIONS} --training.dataset_path {tmp_path}/data.jsonl --job.dump_folder {folder} {options}"
        command = ["-m", "torchtitan.launch", "--nproc_per_node", str(world_size), "--max_restarts", "1", *own.split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
        with folder.with_suffix(".log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *command, *more], cwd=REPO, env=environment, stdout=log, stderr=log
            )

    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    log = folder.with_suffix(".log")
    assert start(undisturbed, "--checkpoint.interval", "1000000").wait(TIMEOUT_S) == 0
    launcher = start(folder)
    try:
        wait_until(lambda: last_step(folder) >= KILL_AFTER or launcher.poll() is not None, seconds=TIMEOUT_S)
        assert launcher.poll() is None, log.read_text()
        # where there are others, not rank 0, which writes the metrics
        os.kill(find_worker(launcher.pid, world_size - 1), signal.SIGKILL)
        killed_at, begin = last_step(folder), time.monotonic()
        wait_until(lambda: log.read_text().count(STARTS) == 2 or launcher.poll() is not None, seconds=TIMEOUT_S)
        record_property("seconds_to_restart", time.monotonic() - begin)
        assert launcher.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        launcher.kill()  # its workers end with it
    said = log.read_text()
    continued_at = int(said.rpartition(STARTS)[2].split()[0])
    record_property("killed_after_step", killed_at)
    record_property("continued_at_step", continued_at)
    assert (continued_at - 1) % INTERVAL == 0 and 1 < continued_at <= killed_at + 2, said
    assert f"step-{STEPS}" in checkpoints(folder)

    records, expected = read_records(folder), read_steps(undisturbed)
    assert list(records) == list(expected) == list(range(1, STEPS + 1))
    pairs = [(said, expected[step]) for step, lives in records.items() for said in lives]
    record_property("loss_difference", max(abs(a.loss - b.loss) / b.loss for a, b in pairs))
    record_property("grad_norm_difference", max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in pairs))
    assert all(a == b for a, b in pairs)  # to the last bit
