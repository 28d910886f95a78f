"""Facts about the device that a process runs on: its kind, its peak arithmetic, the memory in use."""

import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

_GIB = 1024**3

# Dense bf16 FLOP/s by the vendors' data sheets. The first name that a device's name contains counts, as a whole number:
# an RTX A1000 is no A100.
_PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "A100": 312e12,
}


def get_device_type() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def get_peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s of a GPU, for MFU; None for a device that the table does not have, whose MFU is then not known.

    Nor is that of a MIG slice, a part of a GPU.
    """
    if " MIG " in device_name:
        return None
    return next((flops for name, flops in _PEAK_FLOPS.items() if re.search(rf"{name}(?!\d)", device_name)), None)


def get_memory_held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that torch's allocator in this process does not have: other processes', and its own context's."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


class MemoryStats(NamedTuple):
    """Peak memory since the last reset, and what happened since the start.

    On a CPU active and reserved are both the process's resident memory.
    """

    max_active_gib: float
    max_active_pct: float
    max_reserved_gib: float
    max_reserved_pct: float
    num_alloc_retries: float
    num_ooms: float


class DeviceMemoryMonitor:
    """Peak memory of this process on its device, from counters on the host: reading them synchronises nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = get_device_name(device)
        on_gpu = device.type == "cuda"
        self.capacity = torch.cuda.get_device_properties(device).total_memory if on_gpu else get_host_memory()
        self.reset_peak()

    def get_peak(self) -> MemoryStats:
        if self._device.type == "cuda":
            stats = torch.cuda.memory_stats(self._device)
            active, reserved = stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"]
            retries, ooms = stats["num_alloc_retries"], stats["num_ooms"]
        else:
            active = reserved = _peak_resident_memory()
            retries = ooms = 0
        active_pct, reserved_pct = 100 * active / self.capacity, 100 * reserved / self.capacity
        return MemoryStats(active / _GIB, active_pct, reserved / _GIB, reserved_pct, retries, ooms)

    def reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):  # where the kernel cannot do it, the peak is that since the process's start
                Path("/proc/self/clear_refs").write_text("5")


def get_host_memory() -> int:
    """Bytes that this process may use: the machine's memory, or its control group's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or the limit "max"
        return total


def _peak_resident_memory() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    # Not every kernel tells it there, and what it tells otherwise is not reset.
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
