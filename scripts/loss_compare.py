"""Train twice from one seed, or read two finished runs, and compare: loss, gradient norm, tokens/s, memory.

    python scripts/loss_compare.py                                    # the debug model, the fused loss off and on
    python scripts/loss_compare.py --steps 100 --model.flavor 1B      # other options go to both runs
    python scripts/loss_compare.py --candidate "--training.compile" --tolerance 0.01
    python scripts/loss_compare.py --baseline outputs/monday --candidate outputs/tuesday

--baseline and --candidate take options of the run, or the output folder of a run that is finished. Runs are started by
run_train.sh, so CONFIG_FILE and NGPU mean what they mean there. Prints the largest differences over the steps that both
have, and draws loss_compare.png to --out. Exit status: 1 if a difference exceeds --tolerance, or a run fails.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RUN_TRAIN = Path(__file__).resolve().parents[1] / "run_train.sh"
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
LOSS, GRAD_NORM = "loss_metrics/global_avg_loss", "grad_norm"
SPEED, MEMORY = "throughput(tps)", "memory/max_reserved(GiB)"
WARMUP_STEPS = 3
"""Steps that compile, allocate and load; the speed is that of the others."""


class CompareError(Exception):
    """Why there is nothing to compare."""


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl says of a run, by step."""

    name: str
    about: str
    steps: dict[int, dict[str, float]]

    def curve(self, key: str, steps: Sequence[int]) -> list[float]:
        return [self.steps[step][key] for step in steps]

    @property
    def tokens_per_second(self) -> float:
        after = [values[SPEED] for step, values in self.steps.items() if step >= min(self.steps) + WARMUP_STEPS]
        return statistics.median(after or self.curve(SPEED, list(self.steps)))

    @property
    def memory_gib(self) -> float:
        return max(values[MEMORY] for values in self.steps.values())


@dataclass(frozen=True)
class Difference:
    """The absolute difference of one value at every step."""

    name: str
    by_step: dict[int, float]

    @classmethod
    def of(cls, name: str, key: str, a: Run, b: Run) -> "Difference":
        common = sorted(a.steps.keys() & b.steps.keys())
        if not common:
            raise CompareError(f"{a.name} and {b.name} have no logged step in common; see metrics.log_freq")
        return cls(name, {step: abs(a.steps[step][key] - b.steps[step][key]) for step in common})

    @property
    def worst_step(self) -> int:
        return max(self.by_step, key=self.by_step.__getitem__)

    @property
    def largest(self) -> float:
        return self.by_step[self.worst_step]


def options_or_folder(given: str) -> list[str] | Path:
    """The options of a new run, or the folder of a finished one."""
    if given and not given.lstrip().startswith("-"):
        return Path(given)
    try:
        return shlex.split(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} in {given!r}; expected options as a shell takes them") from None


def get_run(name: str, given: list[str] | Path, shared: Sequence[str], args: argparse.Namespace) -> Run:
    """The finished run in the folder `given`; without such a folder, a new run with the options in `given`."""
    if isinstance(given, Path):
        return read_run(name, str(given), given)
    folder = args.out / name
    command = [
        *(str(RUN_TRAIN), "--training.steps", str(args.steps), "--training.seed", "42", "--metrics.log_freq", "1"),
        *(*shared, *given, "--job.dump_folder", str(folder)),
        # from the start, also where an earlier comparison was in this folder, and with one file of metrics
        *("--checkpoint.no-enable_checkpoint", "--metrics.no-save_for_all_ranks"),
    ]
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # a run appends to it
    print(f"{name}: {shlex.join(command)}", flush=True)
    status = run_to_its_end(command)
    if status != 0:
        raise CompareError(f"{name} ended with exit status {status}; its messages are above")
    return read_run(name, shlex.join(given) or "no further options", folder)


def run_to_its_end(command: Sequence[str]) -> int:
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the run received it too, and takes some time to stop
            process.wait()
            raise


def read_run(name: str, about: str, folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise CompareError(f"{name}: {path} does not exist; expected options of a run, or the folder of a finished one")
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut by a kill or a full disk
        if LOSS in values:  # and not those of a validation
            # a later start in the same folder, from a checkpoint or anew, takes the place of what it trains again
            while steps and next(reversed(steps)) >= values["step"]:
                steps.popitem()
            steps[values["step"]] = values
    if not steps:
        raise CompareError(f"{name}: {path} holds no training step")
    return Run(name, about, steps)


def table(a: Run, b: Run) -> str:
    rows = [
        ("", a.name, b.name),
        ("logged steps", f"{len(a.steps)}", f"{len(b.steps)}"),
        ("first loss", *(f"{run.steps[min(run.steps)][LOSS]:.4f}" for run in (a, b))),
        ("last loss", *(f"{run.steps[max(run.steps)][LOSS]:.4f}" for run in (a, b))),
        ("tokens/s a device", *(f"{run.tokens_per_second:,.0f}" for run in (a, b))),
        ("peak memory, GiB", *(f"{run.memory_gib:.2f}" for run in (a, b))),
    ]
    return "\n".join(f"{label:22}{first:>14}{second:>14}" for label, first, second in rows)


def plot(a: Run, b: Run, differences: Sequence[Difference], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), sharex=True)
    curves = {"loss": LOSS, "gradient norm": GRAD_NORM, "tokens/s a device": SPEED, "memory, GiB": MEMORY}
    places = (axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 2])
    for ax, (title, key) in zip(places, curves.items(), strict=True):
        for run, style in ((a, "-"), (b, "--")):  # the second over the first: both are seen where they agree
            steps = sorted(run.steps)
            ax.plot(steps, run.curve(key, steps), style, linewidth=2 if run is a else 1.5, label=run.name)
        ax.set_title(title)
        ax.legend()
    for ax in (axes[0, 2], axes[1, 2]):
        ax.set_ylim(bottom=0)
    for ax, difference in zip(axes[1, :2], differences, strict=True):
        ax.plot(list(difference.by_step), list(difference.by_step.values()), ".-", color="tab:red")
        if difference.largest > 0:
            ax.set_yscale("log", nonpositive="mask")
        ax.set_title(f"difference in {difference.name}, at most {difference.largest:.1e}")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("step")
    figure.suptitle(f"{a.name}: {a.about}\n{b.name}: {b.about}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> int:
    """Compare as the arguments say; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    side: dict[str, Any] = {"metavar": "OPTIONS|FOLDER", "type": options_or_folder}
    parser.add_argument("--baseline", default="", **side, help="default: no further options")
    parser.add_argument("--candidate", default=FUSED, **side, help=f"default: {FUSED}")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a new run (default: 30)")
    parser.add_argument("--tolerance", type=float, help="largest difference of loss and gradient norm that is accepted")
    parser.add_argument("--out", type=Path, default=Path("outputs/loss_compare"), help="default: %(default)s")
    args, shared = parser.parse_known_args(_join_options(argv))
    if shared and isinstance(args.baseline, Path) and isinstance(args.candidate, Path):
        parser.error(f"no run is started that would take {shlex.join(shared)}: both are folders of finished runs")
    if find_spec("matplotlib") is None:  # said before the runs, which take minutes
        parser.error("the plot needs matplotlib, which this Python lacks: pip install matplotlib")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        a = get_run("baseline", args.baseline, shared, args)
        b = get_run("candidate", args.candidate, shared, args)
        differences = [
            Difference.of("loss", LOSS, a, b),
            Difference.of("gradient norm", GRAD_NORM, a, b),
        ]
    except CompareError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    image = args.out / "loss_compare.png"
    print(f"\n{table(a, b)}\n\nlargest difference over {len(differences[0].by_step)} steps")
    for difference in differences:
        print(f"  {difference.name:20}{difference.largest:14.3g}   at step {difference.worst_step}")
    plot(a, b, differences, image)
    print(f"\n{os.path.relpath(image)}")
    if args.tolerance is not None and max(difference.largest for difference in differences) > args.tolerance:
        print(f"The difference exceeds --tolerance {args.tolerance:g}", file=sys.stderr)
        return 1
    return 0


def _join_options(argv: Sequence[str]) -> list[str]:
    """`--baseline "--a.b c"` as `--baseline=--a.b c`: argparse takes a value that begins with dashes for a flag."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] in ("--baseline", "--candidate"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
