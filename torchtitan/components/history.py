"""What a run was and what happened to it beside its steps: history.jsonl in its output folder, for `torchtitan report`.

One line for each event, with its step and time. A start says on what the run is; a stop (SIGTERM) or an end how it
ended. A start with neither before it went on from a run that was killed. Steps are in metrics.jsonl (metrics.py).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from torchtitan import __version__
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.manager import REPOSITORY
from torchtitan.tools.device import get_device_name
from torchtitan.tools.logging import logger


class History:
    """Appends events to a file. A full disk is logged and does not stop training."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_open = False

    def note(self, event: str, step: int, **facts: object) -> None:
        """Write an event. There is one end, and none of a run that was stopped or whose start was refused."""
        if event in ("stop", "end") and not self._is_open:
            return
        self._is_open = event not in ("stop", "end")
        append_line(self._path, {"event": event, "step": step, "time": time.time(), **facts}, what=f"The {event}")


def append_line(path: Path, record: Mapping[str, object], *, what: str) -> None:
    """Append one line of JSON; where that fails, say that `what` is missing there."""
    line = json.dumps(record) + "\n"
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    line = "\n" + line  # the last one was cut by a kill or a full disk
            file.write(line.encode())
    except OSError as error:
        verb = "are" if what.endswith("s") else "is"
        logger.warning(f"{what} of step {record['step']} {verb} not in {path}: {error.strerror}")


def get_environment(dims: ParallelDims, device: torch.device) -> dict[str, object]:
    """What a start notes: the software, the machine and the layout."""
    axes = {name: size for name, size in vars(dims).items() if size > 1}
    return {
        "processes": dims.world_size,
        "layout": ", ".join(f"{name} {size}" for name, size in axes.items()) or "one process",
        "device": get_device_name(device),
        "host": platform.node(),
        "torchtitan": __version__,
        "commit": get_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def get_commit() -> str | None:
    """That of the checkout whose code this is, with a + where files differ from it; None for an installed package."""
    if not (REPOSITORY / ".git").exists():
        return None
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + "+" * bool(changes)


def get_report_command(folder: str) -> str:
    """What draws the run in `folder`, as it is typed here."""
    program = Path(sys.executable).with_name("torchtitan")
    on_path = shutil.which("torchtitan")
    is_ours = on_path is not None and Path(on_path).resolve() == program.resolve()
    return f"{'torchtitan' if is_ours else f'{sys.executable} -m torchtitan'} report {folder}"
