from pathlib import Path

import pytest
import torch

from torchtitan.tools.device import DeviceMemoryMonitor, get_device_name, get_peak_flops


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("CPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_by_name(name: str, flops: float | None) -> None:
    assert get_peak_flops(name) == flops


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel cannot reset a process's peak")
def test_cpu_peak_is_that_since_the_reset() -> None:
    monitor = DeviceMemoryMonitor(torch.device("cpu"))
    assert monitor.name == "CPU"
    before = monitor.get_peak().max_active_gib
    block = torch.ones(64, 2**20, dtype=torch.float32)  # 256 MiB
    del block
    during = monitor.get_peak()
    monitor.reset_peak()
    after = monitor.get_peak().max_active_gib
    assert before + 0.2 < during.max_active_gib
    assert after < during.max_active_gib - 0.2
    assert during.max_reserved_pct == pytest.approx(100 * during.max_reserved_gib * 2**30 / monitor.capacity)


@pytest.mark.gpu
def test_cuda_peak_is_that_since_the_reset() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    monitor = DeviceMemoryMonitor(device)
    assert monitor.name == get_device_name(device) == torch.cuda.get_device_name()
    block = torch.ones(2**26, device=device)
    assert monitor.get_peak().max_active_gib >= 0.25
    del block
    monitor.reset_peak()
    assert monitor.get_peak().max_active_gib < 0.25
