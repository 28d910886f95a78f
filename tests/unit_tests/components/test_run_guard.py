"""On a GPU a request to stop is told by the step that the device begins next, though the host has queued it before."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from torchtitan.components.run_guard import RunGuard


@pytest.fixture
def guard() -> Iterator[RunGuard]:
    before = signal.getsignal(signal.SIGTERM)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    made = RunGuard(torch.device("cuda"))
    made.heed_sigterm()
    for step in range(3):  # what is set up and allocated once, which may wait for the device
        made.sum_tokens(0, no_data=False)
        made.check_previous(step)
    yield made
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    dist.destroy_process_group()


@pytest.mark.gpu
def test_a_request_is_told_by_the_step_that_is_queued_when_it_comes(guard: RunGuard) -> None:
    torch.cuda._sleep(2 * 10**9)  # the step before, a second of it
    total = guard.sum_tokens(7, no_data=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not guard.stops_at_once()
    assert guard.check_previous(4) == (True, False)
    assert total.item() == 7


@pytest.mark.gpu
def test_a_request_that_comes_while_the_host_waits_is_heard_then(guard: RunGuard) -> None:
    """For the end of the step before, and not when that has come and the next one has begun."""
    torch.cuda._sleep(2 * 10**9)
    guard.sum_tokens(7, no_data=False)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    assert guard.check_previous(4) == (True, False)
