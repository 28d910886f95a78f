"""What several test files of this folder share."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.processes import FORKED
from torchtitan.checkpoint import background


@pytest.fixture
def quick_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that writes beside training does not import torch anew; in test_background.py it does."""
    monkeypatch.setattr(background, "START_METHOD", FORKED.get_start_method())


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """This process alone; tests that need more ranks start them."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
