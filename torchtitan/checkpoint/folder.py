"""The folder with a run's checkpoints: which there are, how one becomes visible, which go.

A checkpoint is written to `step-N.incomplete-<run>` and renamed to `step-N` when all of it is on the disk, so
a folder's name says whether it is whole. Nothing here communicates: one rank calls it.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.storage import reason, sync
from torchtitan.config.errors import CheckpointError
from torchtitan.tools.logging import logger
from torchtitan.tools.owner import read_owner

OPTIONS = "config.toml"
"""In a checkpoint: all options of its run."""
_EXCLUDED = "excluded_from_loading.txt"
"""In a checkpoint: what its run had been told to leave out of the one that it began from."""
_REPLACED = "replaced"
"""Ending of a whole checkpoint that makes room for another of the same step."""


class CheckpointFolder:
    """The checkpoints of a run. `run` tells what this run is writing from what a killed one left.

    From create() on nothing is replaced or removed where another run has taken over `outputs`, a run's output folder,
    nor a checkpoint that was not there then and that this run has not written.
    """

    def __init__(self, path: Path, run: str, *, outputs: Path | None = None):
        self.path = path
        self._run = run
        self._outputs = outputs
        self._owner: dict[str, Any] | None = None
        self._known: set[int] = set()
        self._can_sync = True

    def create(self) -> None:
        """Raises CheckpointError where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoints cannot be saved in {self.path}: {reason(error)}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise CheckpointError(f"checkpoints cannot be saved in {self.path}: no permission to write there")
        for replaced in self.path.glob(f"step-*.incomplete-{_REPLACED}"):
            whole = replaced.with_suffix("")
            if not whole.exists():  # killed before the new one had its name
                replaced.rename(whole)
        self._known = {*self.steps()}
        self._owner = read_owner(self._outputs) if self._outputs is not None else None

    def of(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def incomplete(self, step: int) -> Path:
        return self.path / f"step-{step}.incomplete-{self._run}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        matches = (re.fullmatch(r"step-(\d+)", name) for name in self._names())
        return sorted(int(match[1]) for match in matches if match)

    def leftovers(self) -> list[Path]:
        """What killed runs left half-written or half-removed."""
        others = (name for name in self._names() if not name.endswith(f".incomplete-{self._run}"))
        return [self.path / name for name in sorted(others) if re.fullmatch(r"step-\d+\.incomplete-.*", name)]

    def note_options(self, path: Path, toml: str) -> None:
        """The run's options, so that whoever reads the checkpoint elsewhere or later knows which model it is."""
        if not toml:
            return
        try:
            (path / OPTIONS).write_text(toml, encoding="utf-8")
        except (OSError, UnicodeError) as error:
            (path / OPTIONS).unlink(missing_ok=True)
            logger.warning(f"{path / OPTIONS} could not be written: {reason(error)}; the checkpoint is saved without")

    def note_excluded(self, path: Path, names: Sequence[str]) -> None:
        if names:
            (path / _EXCLUDED).write_text("\n".join(names))

    def excluded_before(self, path: Path) -> list[str]:
        file = path / _EXCLUDED
        return file.read_text().split() if file.exists() else []

    def publish(self, source: Path, step: int) -> None:
        """Make `source` the checkpoint of `step`, now that it is written.

        Raises CheckpointError where that is not this run's to do.
        """
        self._check_owner()
        if step not in self._known and self.of(step).exists():
            raise CheckpointError(f"{self.of(step)} is another run's: it was not there when this one started")
        for file in source.iterdir():
            if file.suffix != ".distcp":  # which the rank that wrote it has synced
                sync(file)
        self._sync_folder(source)
        replaced = self._set_aside(self.of(step), _REPLACED) if self.of(step).exists() else None
        source.rename(self.of(step))
        self._known.add(step)
        self._sync_folder(self.path)
        if replaced is not None:
            self.remove([replaced])

    def tidy(self, num_kept: int, *, up_to: int) -> None:
        """Remove leftovers, and the oldest checkpoints up to step `up_to` until `num_kept` are left; 0 keeps all.

        Where that fails, it is left for the next time.
        """
        try:
            self._check_owner()
            steps = [step for step in self.steps() if step <= up_to] if num_kept else []
            # renamed first: one that is half-removed must not look whole
            self.remove([self._set_aside(self.of(step), "removed") for step in steps[:-num_kept]])
            self.remove(self.leftovers())
        except (OSError, CheckpointError) as error:
            logger.warning(f"Old checkpoints in {self.path} could not be removed: {reason(error)}")

    def remove(self, incomplete: Iterable[Path]) -> None:
        """What cannot be removed is left over for the next time."""
        for path in incomplete:
            if path.is_symlink():  # to other storage, where the files stay
                with suppress(OSError):
                    path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    def _check_owner(self) -> None:
        if self._outputs is not None and read_owner(self._outputs) != self._owner:
            raise CheckpointError(f"{self._outputs} is another run's now")

    def _sync_folder(self, path: Path) -> None:
        """Not every file system can, CIFS for one: the files are synced and a rename is whole or not all the same."""
        try:
            sync(path)
        except OSError as error:
            if self._can_sync:
                logger.warning(
                    f"The file system of {path} cannot sync a folder ({reason(error)}): checkpoints are saved all the"
                    " same, but if the machine loses its power the newest may be missing"
                )
            self._can_sync = False

    def _set_aside(self, path: Path, why: str) -> Path:
        aside = path.with_name(f"{path.name}.incomplete-{why}")
        if aside.exists():
            self.remove([aside])
        return path.rename(aside)

    def _names(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path) if entry.is_dir()] if self.path.is_dir() else []
