"""What a worker process arranges with the operating system."""

import ctypes
import signal
import sys

import torch.distributed as dist

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> None:
    """Under torchrun, have the kernel kill this worker when its launcher is gone without having stopped it.

    A launcher that was killed itself can stop nobody, and workers without one would hold their GPUs and go on
    writing into a folder that the next start of the run uses. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux" and dist.is_torchelastic_launched():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
