"""What a run has left in its output folder: its curves, its history and its options. Imports no torch."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from torchtitan.config.errors import ConfigError
from torchtitan.config.manager import ConfigManager

LOSS, GRAD_NORM, LR = "loss_metrics/global_avg_loss", "grad_norm", "lr"
SPEED, MFU, MEMORY, MEMORY_PCT = "throughput(tps)", "mfu(%)", "memory/max_reserved(GiB)", "memory/max_reserved(%)"
DATA, VALIDATION = "time_metrics/data_loading(%)", "time_metrics/validation(%)"
VALIDATION_LOSS = "validation_metrics/loss"
WARMUP_STEPS = 3
"""Steps that compile, allocate and load; the speed is that of the others."""

Values = dict[str, float]
Point = tuple[float, float]


class RunError(ConfigError):
    """Why there is nothing to show or to compare."""


@dataclass
class Run:
    """What metrics.jsonl says of a run, by step; what a later start trained again is in `lost`."""

    name: str
    about: str = ""
    steps: dict[int, Values] = field(default_factory=dict)
    validations: dict[int, Values] = field(default_factory=dict)
    lost: list[dict[int, Values]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Those that config.toml has and that are not the defaults, by `section.option`; the others are in `defaults`."""
    defaults: dict[str, Any] = field(default_factory=dict)

    def curve(self, key: str) -> list[Point]:
        return to_curve(self.steps, key)

    @property
    def tokens_per_second(self) -> float:
        speeds = self.curve(SPEED)
        after = [speed for step, speed in speeds if step >= min(self.steps) + WARMUP_STEPS]
        return statistics.median(after or [speed for _, speed in speeds])

    @property
    def memory_gib(self) -> float:
        return max(gib for _, gib in self.curve(MEMORY))

    @property
    def environment(self) -> dict[str, Any]:
        """Of the last start."""
        starts = [event for event in self.events if event["event"] == "start"]
        return {name: value for name, value in starts[-1].items() if name not in _OF_EVENTS} if starts else {}


_OF_EVENTS = ("event", "step", "time")


@dataclass(frozen=True)
class Difference:
    """The absolute difference of one value at every step that two runs have."""

    name: str
    by_step: dict[int, float]

    @classmethod
    def of(cls, name: str, key: str, a: Run, b: Run) -> "Difference":
        common = sorted(
            step for step in a.steps.keys() & b.steps.keys() if key in a.steps[step] and key in b.steps[step]
        )
        if not common:
            raise RunError(f"{a.name} and {b.name} have no logged step in common; see metrics.log_freq")
        return cls(name, {step: abs(a.steps[step][key] - b.steps[step][key]) for step in common})

    @property
    def worst_step(self) -> int:
        return max(self.by_step, key=self.by_step.__getitem__)

    @property
    def largest(self) -> float:
        return self.by_step[self.worst_step]


def to_curve(steps: dict[int, Values], key: str) -> list[Point]:
    """(step, value) in the order of the steps; what is not finite has no place in a picture."""
    points = [(step, values[key]) for step, values in sorted(steps.items()) if key in values]
    return [(step, value) for step, value in points if math.isfinite(value)]


def read_run(folder: Path, *, name: str = "", about: str = "") -> Run:
    """The run in an output folder, or of one rank in it.

    Raises:
        RunError: it has no metrics, or none of a training step.
    """
    run = Run(name or str(folder), about)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{run.name}: {path} does not exist; expected the output folder of a run (job.dump_folder)")
    for values in _read_lines(path):
        if LOSS in values:
            # a later start in the same folder, from a checkpoint or anew, takes the place of what it trains again
            step = int(values["step"])
            if again := {old: run.steps.pop(old) for old in list(run.steps) if old >= step}:
                run.lost.append(again)
            run.steps[step] = values
            run.validations = {old: value for old, value in run.validations.items() if old < step}
        elif VALIDATION_LOSS in values:
            run.validations[int(values["step"])] = values
    if not run.steps:
        raise RunError(f"{run.name}: {path} holds no training step")
    # with metrics.save_for_all_ranks the folder is that of a rank, and the run's is the one above
    run.events = _read_first(folder, "history.jsonl", lambda file: [v for v in _read_lines(file) if "event" in v], [])
    run.options, run.defaults = _read_first(folder, "config.toml", _read_options, ({}, {}))
    return run


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The run in each folder; of a folder without one, those in the folders right below it."""
    paths: list[Path] = []
    for folder in folders:
        below = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        paths += below if below and not (folder / "metrics.jsonl").exists() else [folder]
    return [read_run(path) for path in dict.fromkeys(paths)]


def _read_first(folder: Path, name: str, read: Any, default: Any) -> Any:
    return next((read(file) for file in (folder / name, folder.parent / name) if file.is_file()), default)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut by a kill or a full disk
        if isinstance(values, dict) and "step" in values:
            yield values


def _read_options(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is not as it is by default, and the rest."""
    known = ConfigManager().parse_args([]).to_dict()
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    try:
        sections = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError):
        return found
    for section, options in sections.items():
        for name, value in options.items():
            found[known.get(section, {}).get(name) == value][f"{section}.{name}"] = value
    return found
