"""What every test shares: the GPU marker, one CPU thread, Ctrl-C, a logger that pytest can capture."""

import logging
import os
import signal
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on a CPU
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast may fail in a container with some of a host's GPUs

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of each test that recorded numbers: how many cases there were, and the largest of each number."""
    tests: dict[str, dict[str, float]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.user_properties:
                largest = tests.setdefault(report.location[2].partition("[")[0], {})
                largest[outcome] = largest.get(outcome, 0) + 1
                for name, value in report.user_properties:
                    largest[name] = max(value, largest.get(name, value))
    for test, largest in tests.items():
        terminalreporter.write_line(f"{test}: {', '.join(f'{name} {value:.3g}' for name, value in largest.items())}")


@pytest.fixture(autouse=True)
def capturable_log() -> None:
    """Undo what a test's init_logger() did, so that caplog sees the package's records in every test."""
    log = logging.getLogger("torchtitan")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.INFO)
