"""Train twice from one seed, or read two finished runs, and compare: loss, gradient norm, tokens/s, memory.

    torchtitan compare                                    # the debug model, the fused loss off and on
    torchtitan compare --steps 100 --model.flavor 1B      # other options go to both runs
    torchtitan compare --candidate "--training.compile" --tolerance 0.01
    torchtitan compare --baseline outputs/monday --candidate outputs/tuesday

--baseline and --candidate take options of the run, or the output folder of a run that is finished. In a checkout runs
are started by run_train.sh, so CONFIG_FILE and NGPU mean what they mean there. Prints the largest differences over the
steps that both have, and draws both runs in report.html in --out, as `torchtitan report` does. Exit status: 1 if a
difference exceeds --tolerance, or a run fails.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.cli import report
from torchtitan.cli.runs import GRAD_NORM, LOSS, Difference, Run, RunError, read_run
from torchtitan.config.manager import REPOSITORY

RUN_TRAIN = REPOSITORY / "run_train.sh"
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"


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
        return read_run(given, name=name, about=str(given))
    folder = args.out / name
    command = [
        *([str(RUN_TRAIN)] if RUN_TRAIN.exists() else [sys.executable, "-m", "torchtitan", "train"]),
        *("--training.steps", str(args.steps), "--training.seed", "42", "--metrics.log_freq", "1"),
        *(*shared, *given, "--job.dump_folder", str(folder)),
        # from the start, also where an earlier comparison was in this folder, and with one file of metrics
        *("--checkpoint.no-enable_checkpoint", "--metrics.no-save_for_all_ranks"),
    ]
    for file in ("metrics.jsonl", "history.jsonl"):  # a run appends to them
        (folder / file).unlink(missing_ok=True)
    print(f"{name}: {shlex.join(command)}", flush=True)
    status = run_to_its_end(command)
    if status != 0:
        raise RunError(f"{name} ended with exit status {status}; its messages are above")
    return read_run(folder, name=name, about=shlex.join(given) or "no further options")


def run_to_its_end(command: Sequence[str]) -> int:
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the run received it too, and takes some time to stop
            process.wait()
            raise


def table(a: Run, b: Run) -> str:
    rows = [("", a.name, b.name), *((label, get(a), get(b)) for label, get in report.summary_rows())]
    return "\n".join(f"{label:22}{first:>14}{second:>14}" for label, first, second in rows if first or second)


def main(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Compare as the words say; the exit status."""
    side: dict[str, Any] = {"metavar": "OPTIONS|FOLDER", "type": options_or_folder}
    parser.add_argument("--baseline", default="", **side, help="default: no further options")
    parser.add_argument("--candidate", default=FUSED, **side, help=f"default: {FUSED}")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a new run (default: 30)")
    parser.add_argument("--tolerance", type=float, help="largest difference of loss and gradient norm that is accepted")
    parser.add_argument("--out", type=Path, default=Path("outputs/loss_compare"), help="default: %(default)s")
    args, shared = parser.parse_known_args(_join_options(words))
    if shared and isinstance(args.baseline, Path) and isinstance(args.candidate, Path):
        parser.error(f"no run is started that would take {shlex.join(shared)}: both are folders of finished runs")
    page = args.out / "report.html"
    a = get_run("baseline", args.baseline, shared, args)
    b = get_run("candidate", args.candidate, shared, args)
    differences = [Difference.of("loss", LOSS, a, b), Difference.of("gradient norm", GRAD_NORM, a, b)]
    report.write([a, b], page)
    print(f"\n{table(a, b)}\n\nlargest difference over {len(differences[0].by_step)} steps")
    for difference in differences:
        print(f"  {difference.name:20}{difference.largest:14.3g}   at step {difference.worst_step}")
    print(f"\n{os.path.relpath(page)}")
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
