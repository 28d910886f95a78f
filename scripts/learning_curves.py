"""Whether a way of training learns as well as another: each from several seeds, on real text, from the first step.

    python scripts/learning_curves.py                                           # the 1B flavour, 9 runs, 40 minutes
    python scripts/learning_curves.py --rows float32 "float8 --model.converters float8" --seeds 2
    python scripts/learning_curves.py --flavor debugmodel --steps 30 --last 10 --rows "sgd-like --optimizer.beta1 0"

A row is a name, then options of its runs; the others are compared with the first. A run that is whole in --out is
read, not run again, so that several machines may share the rows. The learning rate stays where its warm-up ends: a
run's first steps are then a shorter run, and rows of different speed can be compared at equal time. For each row are
printed the mean loss of the last steps for each seed, and its mean less the first row's: after as many steps, and after
as long.
Writes learning_curves.jsonl, the figures and each run's loss, and learning_curves.png to --out.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
from benchmark_origin import get_origin

from torchtitan.cli.runs import LOSS, Run, RunError, read_run

DEFAULT_ROWS = ["float32", "compact --optimizer.state_precision compact", "float8 --model.converters float8"]
NUM_POINTS = 50
"""Of a curve: each is the mean of as many steps."""


def get_run(name: str, options: list[str], seed: int, args: argparse.Namespace) -> Run:
    """The run of a row from a seed; trained now unless it is there."""
    folder = args.out / name / f"seed-{seed}"
    try:
        run = read_run(folder)
        if max(run.steps) == args.steps:
            return run
    except RunError:
        pass
    for file in ("metrics.jsonl", "history.jsonl"):  # a run appends to them
        (folder / file).unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torchtitan", "train", "--model.flavor", args.flavor),
        *("--training.local_batch_size", str(args.batch), "--training.seq_len", str(args.seq_len)),
        *("--training.steps", str(args.steps), "--training.seed", str(seed), "--metrics.log_freq", "1"),
        *("--optimizer.lr", str(args.lr), "--lr_scheduler.warmup_steps", str(args.steps // 10)),
        *("--lr_scheduler.decay_ratio", "0", "--activation_checkpoint.mode", "auto"),
        *("--training.mixed_precision_param", "bfloat16"),
        *("--liger_kernel.enable_fused_linear_cross_entropy", *(["--training.compile"] if args.compile else [])),
        *("--job.dump_folder", str(folder), *options),
    ]
    print(shlex.join(command), flush=True)
    with (folder.parent / f"seed-{seed}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)
    return read_run(folder)


def mean_loss(run: Run, end: int, num_steps: int) -> float:
    """Of `num_steps` steps up to `end`."""
    return statistics.mean(run.steps[step][LOSS] for step in range(max(end - num_steps, 0) + 1, end + 1))


def plot(runs: dict[str, list[Run]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    width = max(args.steps // NUM_POINTS, 1)
    ends = range(width, args.steps + 1, width)
    for color, (name, seeds) in enumerate(runs.items()):
        for number, run in enumerate(seeds):
            label = name if number == 0 else None
            losses = [mean_loss(run, end, width) for end in ends]
            axes.plot(ends, losses, color=f"C{color}", alpha=0.7, linewidth=1, label=label)
    axes.set(xlabel="steps", ylabel=f"loss, mean of {width} steps", yscale="log")
    axes.set_title(f"{args.flavor}, {args.batch} x {args.seq_len} tokens a step, {len(args.seeds)} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out / "learning_curves.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="1B")
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, help="name, then options of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--last", type=int, default=100, help="steps whose mean loss is compared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curves"))
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    runs: dict[str, list[Run]] = {}
    for name, *options in map(shlex.split, args.rows):
        (args.out / name).mkdir(parents=True, exist_ok=True)
        runs[name] = [get_run(name, options, seed, args) for seed in args.seeds]

    first = next(iter(runs.values()))
    speeds = {name: statistics.median(run.tokens_per_second for run in seeds) for name, seeds in runs.items()}
    with (args.out / "learning_curves.jsonl").open("w") as file:
        for name, seeds in runs.items():
            losses = [mean_loss(run, args.steps, args.last) for run in seeds]
            mean, spread = statistics.mean(losses), max(losses) - min(losses)
            equal_steps = mean - statistics.mean(mean_loss(run, args.steps, args.last) for run in first)
            faster = speeds[name] / speeds[next(iter(runs))]
            here, there = (round(args.steps * min(1.0, share)) for share in (faster, 1 / faster))
            equal_time = statistics.mean(mean_loss(run, here, args.last) for run in seeds)
            equal_time -= statistics.mean(mean_loss(run, there, args.last) for run in first)
            by_seed = " ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"{name:12}{speeds[name]:10,.0f} tokens/s  loss {mean:.4f}  seeds {by_seed}"
                f"  spread {spread:.4f}  equal steps {equal_steps:+.4f}  equal time {equal_time:+.4f}",
                flush=True,
            )
            curves = [[round(run.steps[step][LOSS], 4) for step in sorted(run.steps)] for run in seeds]
            row = {"row": name, "tokens_per_second": speeds[name], "mean_of_last": args.last, "losses": losses}
            row |= {"equal_steps": equal_steps, "equal_time": equal_time, "seeds": args.seeds, "curves": curves}
            file.write(json.dumps(row | get_origin(device)) + "\n")
    plot(runs, args)


if __name__ == "__main__":
    main()
