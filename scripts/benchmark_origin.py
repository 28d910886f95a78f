"""Where a benchmark's figures come from; part of each of its rows."""

from functools import cache

import torch

from torchtitan.components import history
from torchtitan.tools.device import get_device_name


def get_origin(device: torch.device) -> dict[str, str]:
    """The device, torch's version and the commit of the code: a + where a file was changed since."""
    name = get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "commit": get_commit()}


@cache
def get_commit() -> str:
    """Of this checkout, as runs note it; "unknown" outside of git."""
    return history.get_commit() or "unknown"
