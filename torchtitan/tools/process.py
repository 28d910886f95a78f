"""What the processes of a run arrange with the operating system."""

import ctypes
import resource
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> None:
    """Under torchrun, have the kernel kill this worker when its launcher is gone without having stopped it.

    A launcher that was killed itself can stop nobody, and workers without one would hold their GPUs and go on
    writing into a folder that the next start of the run uses. Linux only; elsewhere nothing happens.
    """
    import torch.distributed as dist  # not at the top: the launcher, which starts before torch, imports this file

    if sys.platform == "linux" and dist.is_torchelastic_launched():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def raise_file_limit() -> int:
    """Let this process and its children open as many files, sockets among them, as the system allows; how many.

    The soft limit is often 1,024, which the machine where a thousand processes meet passes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a Mac says that there is no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
