"""Where a benchmark's figures come from; part of each of its rows."""

import subprocess
from functools import cache
from pathlib import Path

import torch

from torchtitan.tools.device import get_device_name


def get_origin(device: torch.device) -> dict[str, str]:
    """The device, torch's version and the commit of the code: "-dirty" where a file was changed since."""
    name = get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "commit": get_commit()}


@cache
def get_commit() -> str:
    """Of this checkout; "unknown" outside of git."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
