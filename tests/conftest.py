"""What every test shares: the GPU marker, one CPU thread, Ctrl-C, a logger that pytest can capture."""

import logging
import os
import signal
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on a CPU

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # many small tensors on few cores: threads cost more than they give
    # A shell has its background jobs ignore SIGINT; the processes that tests start and stop would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def capturable_log() -> None:
    """Undo what a test's init_logger() did, so that caplog sees the package's records in every test."""
    log = logging.getLogger("torchtitan")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.INFO)
