"""A request to stop is answered after the step in whose backward it comes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integration_tests.lives import OPTIONS, REPO, TIMEOUT_S, checkpoints, write_data
from torchtitan.components.run_guard import RunGuard
from torchtitan.config.errors import NonFiniteError
from torchtitan.train import EXIT_PREEMPTED


@pytest.fixture
def guard() -> Iterator[RunGuard]:
    before = signal.getsignal(signal.SIGTERM)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = RunGuard(torch.device("cpu"))
    made.heed_sigterm()
    yield made
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def test_a_request_amid_a_step_is_heard_before_the_next_one_begins(guard: RunGuard) -> None:
    assert not guard.stops_after(0)
    assert guard.sum_tokens(7, no_data=False).item() == 7
    guard.must_skip(torch.ones(()))
    assert not guard.stops_after(1)
    guard.sum_tokens(7, no_data=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not guard.must_skip(torch.ones(()))
    assert not guard.lacks_data()
    assert guard.stops_after(2)


def test_what_is_not_finite_is_left_out_and_heard_of_unless_there_was_no_data(guard: RunGuard) -> None:
    guard.sum_tokens(7, no_data=True)
    assert guard.must_skip(torch.tensor(torch.nan))
    assert guard.lacks_data()
    assert not guard.stops_after(1)
    for norm in (torch.inf, 1.0):
        guard.sum_tokens(7, no_data=False)
        assert guard.must_skip(torch.tensor(norm))
        with pytest.raises(NonFiniteError, match="inf or nan"):
            guard.stops_after(2)


# Step 5 takes a second and more of the device, amid which the host, which waits, is asked to stop.
LONG_STEP = """
import os, signal, torch
import tests.integration_tests.tiny_llama3
import __main__ as train  # python -m torchtitan.train

forward_backward = train.Trainer._forward_backward

def take_long(self, microbatches, scale):
    loss = forward_backward(self, microbatches, scale)
    if self.step == 5:
        began = torch.cuda.current_stream().record_event()
        torch.cuda._sleep(3 * 10**9)
        ended = torch.cuda.current_stream().record_event()

        def ask(signum, frame):
            assert began.query() and not ended.query() and frame.f_code.co_name == "read"
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGALRM, ask)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    return loss

train.Trainer._forward_backward = take_long
"""


@pytest.mark.gpu
def test_a_step_that_a_gpu_is_amid_when_the_request_comes_is_the_last_one(tmp_path: Path) -> None:
    write_data(tmp_path / "data.jsonl")
    (tmp_path / "long_step.py").write_text(LONG_STEP)
    options = f"{OPTIONS} --training.steps 20 --metrics.log_freq 100 --checkpoint.enable_checkpoint"
    options += f" --training.dataset_path {tmp_path}/data.jsonl --job.dump_folder {tmp_path}/run"
    result = subprocess.run(
        [sys.executable, "-m", "torchtitan.train", *options.split(), "--experimental.custom_import", "long_step"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == EXIT_PREEMPTED, result.stdout + result.stderr
    assert "Stopped by SIGTERM after step 5; it is saved" in result.stdout + result.stderr
    assert checkpoints(tmp_path / "run") == ["step-5"]
