"""Whether the package works on this host's GPUs, and how well: everything that takes more than one of them, in one go.

    python scripts/benchmark_parallel.py                            # on 2, 4 or 8 GPUs; on 2, 9 minutes
    python scripts/benchmark_parallel.py --only train --flavor 8B   # one part
    python scripts/benchmark_parallel.py --device cpu --nproc 2     # a rehearsal without GPUs, on tiny sizes

    parity    every layout's loss and gradient norm are one GPU's, in float32 and in bf16
    restart   a worker is killed; the run comes back from its last checkpoint and ends as one that was left alone.
              Half of the GPUs go on with a run of all
    train     tokens/s, MFU and memory of a whole step with the fused loss: sharded, also in float8, with async
              tensor and context parallel, sequences twice as long, and 8B, whose states are compact
    head      the loss head alone, its vocabulary sharded: in-tree against gathering the weight
    profile   the collectives left in a step of train with async tensor parallel; none may gather the head's weight

Each part starts processes of its own, with a time limit; one that fails is told, and the others go on. Parity and
restart, of which nothing is timed to the second, run side by side before the others. Writes
report.md, results.jsonl and the logs of all processes to --out. Exit status: 1 if anything failed.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
from benchmark_origin import get_commit
from parallel_report import Row, format_part, read_tests
from trace_collectives import describe_time, get_collectives, get_tensor_parallel_sizes, read_events

from torchtitan.models.llama3.flavors import llama3_flavors

REPO = Path(__file__).resolve().parents[1]
IN_TREE = "--liger_kernel.enable_fused_linear_cross_entropy --liger_kernel.implementation native"
AUTO = "--activation_checkpoint.mode auto"
ASYNC = "--parallelism.enable_async_tensor_parallel"
TP, CP = "--parallelism.tensor_parallel_degree 2", "--parallelism.context_parallel_degree 2"


@dataclass(frozen=True)
class Sizes:
    flavor: str
    seq_len: int
    sequences: int
    """A rank, whatever it shares them with."""
    train: tuple[str, ...]
    head: tuple[str, ...]


SIZES = {
    "cuda": Sizes("1B", 8192, 2, ("--steps=8", "--warmup=2"), ()),  # the head is Llama 3 8B's
    "cpu": Sizes(
        flavor="debugmodel",
        seq_len=64,
        sequences=1,
        train=("--no-compile", "--steps=1", "--warmup=1"),
        head=("--tokens=257", "--vocab=2001", "--dim=64", "--dtype=float32", "--budget=1", "--repeats=2", "--warmup=1"),
    ),
}


class Host:
    """Runs processes for the parts, on `nproc` devices."""

    def __init__(self, device: str, nproc: int, sizes: Sizes, *, out: Path, limit_s: float) -> None:
        self.device, self.nproc, self.sizes, self.out = device, nproc, sizes, out.resolve()
        self._limit_s = limit_s
        self.traced: Path | None = None
        """The folder of the layout whose collectives are looked at, once it has run."""
        (self.out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: Sequence[str]) -> str | None:
        """Run a Python program to its end, or to the time limit; None, or how it failed."""
        log = self.out / "logs" / f"{name}.log"
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        failure = None
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPO, env=self._environment(), stdout=file, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(self._limit_s)
                failure = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                failure = f"still running after {self._limit_s:.0f} s"
            finally:
                if process.poll() is None:
                    kill_with_descendants(process.pid)
                    process.wait()
        failure = failure and f"{failure}; see {log.relative_to(self.out)}"
        print(f"{name}: {failure or 'done'} ({time.monotonic() - begin:.0f} s)", flush=True)
        return failure

    def torchrun(self, name: str, nproc: int, script: str, arguments: Sequence[str]) -> str | None:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}")
        return self.run(name, [*launcher, f"scripts/{script}", *arguments])

    def pytest(self, name: str, test: str, selected: str) -> Iterator[Row]:
        """What the selected tests of a file recorded."""
        results = self.out / "logs" / f"{name}.xml"
        results.unlink(missing_ok=True)
        test = f"tests/integration_tests/{test}"
        failure = self.run(name, ["-m", "pytest", test, "-q", "-k", selected, f"--junitxml={results}"])
        rows = list(read_tests(results)) if results.exists() else []
        yield from rows
        if not rows or (failure and not any("failed" in row for row in rows)):
            yield {"name": name, "failed": failure or "no test was run"}

    def _environment(self) -> dict[str, str]:
        # In a container with some of a host's GPUs, setting up NVLink's multicast can fail and end NCCL's start.
        environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environment.get("PYTHONPATH")]))
        return environment | ({"CUDA_VISIBLE_DEVICES": "", "REHEARSAL": "1"} if self.device == "cpu" else {})


def kill_with_descendants(pid: int) -> None:
    """torchrun's workers are in sessions of their own, which a signal to torchrun's does not reach."""
    family = [pid]
    for parent in family:  # grows on the way
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                family += [int(child) for child in children.read_text().split()]
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


# The parts: each yields rows for its table, and rows with "failed" or "note" for the lines below it


def parity(host: Host) -> Iterator[Row]:
    for size in (2, 4, 8):
        if size <= host.nproc:
            cases = {f"parity_{size}_{dtype}": f"{host.device}{size} and {dtype}" for dtype in ("float32", "bfloat16")}
            yield from side_by_side(host, "test_parity_gpus.py", cases)


def side_by_side(host: Host, test: str, cases: dict[str, str]) -> Iterator[Row]:
    """The rows of tests of a file, selected by name, each in a process of its own."""
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(list[Row], host.pytest(name, test, selected)) for name, selected in cases.items()]
    for rows in found:
        yield from rows.result()


@dataclass(frozen=True)
class Layout:
    """A row of train."""

    name: str
    options: str
    sequences: int
    """For training.local_batch_size: what the ranks of a sequence share."""
    seq_len: int
    flavor: str
    traced: bool = False


def get_layouts(sizes: Sizes, *, on_gpus: bool) -> Iterator[Layout]:
    """As many tokens a rank in each, unless the name says otherwise; all blocks keep what fits."""
    flavor, seq_len, n = sizes.flavor, sizes.seq_len, sizes.sequences
    fused = f"{IN_TREE} {AUTO}"
    float8 = f"{fused} --model.converters float8" + " --float8.emulate" * (not on_gpus)
    tp = TP + f" {ASYNC}" * on_gpus
    has_torchao = importlib.util.find_spec("torchao") is not None
    yield Layout("shard", fused, n, seq_len, flavor)
    yield Layout("tp 2 x shard" + ", async" * on_gpus, f"{tp} {fused}", 2 * n, seq_len, flavor, traced=True)
    yield Layout("cp 2 x shard", f"{CP} {fused}", 2 * n, seq_len, flavor)
    if has_torchao:
        yield Layout("shard, float8", float8, n, seq_len, flavor)
    if sizes == SIZES["cuda"]:
        yield Layout("shard, 16384 tokens", fused, 1, 16384, flavor)
        yield Layout("cp 2 x shard, 16384 tokens", f"{CP} {fused}", 2, 16384, flavor)
        yield Layout("cp 2 x shard, 16384 tokens, half as many a rank", f"{CP} {fused}", 1, 16384, flavor)
        compact = "--optimizer.state_precision compact"
        yield Layout("8B, shard, 1 sequence a rank", f"{fused} {compact}", 1, seq_len, "8B")
        if has_torchao:
            yield Layout("8B, shard, 1 sequence a rank, float8", f"{float8} {compact}", 1, seq_len, "8B")


def train(host: Host) -> Iterator[Row]:
    sizes = host.sizes
    for number, layout in enumerate(get_layouts(sizes, on_gpus=host.device == "cuda")):
        yield from time_layout(host, number, layout)
    yield {"note": f"{sizes.flavor}, {sizes.seq_len} tokens a sequence, {sizes.sequences} sequences a rank."}


def time_layout(host: Host, number: int, layout: Layout) -> Iterator[Row]:
    folder = host.out / "train" / str(number)
    (folder / "results.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "profile_traces", ignore_errors=True)
    if layout.traced:
        host.traced = folder
    arguments = [
        *("--flavor", layout.flavor, "--seq_len", str(layout.seq_len), "--no-largest", *host.sizes.train),
        *("--batches", str(layout.sequences), "--out", str(folder), "--rows", f"'{layout.name}' {layout.options}"),
        *(["--trace"] if layout.traced else []),
    ]
    failure = host.torchrun(f"train_{number}", host.nproc, "benchmark_train.py", arguments)
    rows = read_lines(folder / "results.jsonl")
    yield from ({**row, "name": layout.name, "ranks": host.nproc} for row in rows)
    if failure or not rows:
        yield {"name": layout.name, "failed": failure or f"out of memory; see logs/train_{number}.log"}


def head(host: Host) -> Iterator[Row]:
    for degree in (2, 4, 8):
        if degree <= host.nproc:
            folder = host.out / "head" / str(degree)
            (folder / "results.jsonl").unlink(missing_ok=True)
            arguments = ["--device", host.device, "--out", str(folder), *host.sizes.head]
            failure = host.torchrun(f"head_{degree}", degree, "benchmark_loss_tp.py", arguments)
            yield from read_lines(folder / "results.jsonl")
            if failure:
                yield {"name": f"tp {degree}", "failed": failure}


def profile(host: Host) -> Iterator[Row]:
    if host.traced is None:  # without train
        for number, layout in enumerate(get_layouts(host.sizes, on_gpus=host.device == "cuda")):
            if layout.traced:
                yield from (row for row in time_layout(host, number, layout) if "failed" in row)
    trace = host.traced and next(host.traced.glob("profile_traces/step_*/rank0_trace.json.gz"), None)
    if trace is None:
        yield {"name": "profile", "failed": "no trace was written"}
        return
    events = read_events(trace)
    yield from (collective.to_row() for collective in get_collectives(events))
    if about_time := describe_time(events):
        yield {"note": about_time}
    args = llama3_flavors[host.sizes.flavor]
    rows_bytes = -(-args.vocab_size // 2) * args.dim * torch.bfloat16.itemsize
    yield judge_weight(get_tensor_parallel_sizes(events), rows_bytes)


def judge_weight(tensor_parallel_sizes: Sequence[int], rows_bytes: int) -> Row:
    """Whether a collective between tensor-parallel ranks is as large as a rank's rows of the head's weight."""
    if not tensor_parallel_sizes:
        return {"name": "profile", "failed": "the trace has no collective between tensor-parallel ranks"}
    largest = max(tensor_parallel_sizes)
    said = f"Of {len(tensor_parallel_sizes)} collectives between tensor-parallel ranks the largest is"
    said += f" {largest / 1e6:.2f} MB; a rank's rows of the head's weight are {rows_bytes / 1e6:.2f} MB"
    if largest >= rows_bytes:
        return {"name": "profile", "failed": f"{said}: one is as large, the weight may have been gathered."}
    return {"note": f"{said}: none is as large, the weight was not gathered."}


def restart(host: Host) -> Iterator[Row]:
    run = f"{host.device}{host.nproc}"
    cases = {"restart": f"{run} and not compact and not to", "restart_half": f"{run}to"}
    if run == "cuda2":
        cases["restart_compact"] = f"{run} and compact"
    yield from side_by_side(host, "test_restart_gpus.py", cases)


def run_part(name: str, host: Host) -> list[Row]:
    """The part's rows; where it fails by itself, with one that says so."""
    rows: list[Row] = []
    try:
        rows.extend(PARTS[name](host))
    except Exception as error:  # what a part finds may be unlike what it expects: the others do not depend on it
        traceback.print_exc()
        rows.append({"name": name, "failed": f"{type(error).__name__}: {error}"})
    return rows


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


PARTS = {"parity": parity, "restart": restart, "train": train, "head": head, "profile": profile}
UNTIMED = ("parity", "restart")


def describe_host(host: Host) -> str:
    device = torch.cuda.get_device_name() if host.device == "cuda" else f"CPU ({platform.machine()})"
    lines = ["# On several devices", "", f"{host.nproc} x {device}, torch {torch.__version__}, Python "]
    lines[-1] += f"{platform.python_version()}, commit {get_commit()}"
    if host.device == "cuda":
        lines[-1] += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        with suppress(OSError, subprocess.SubprocessError):  # how the GPUs are linked decides what the figures can be
            topology = subprocess.run(
                ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True
            )
            table = re.sub(r"\x1b\[\d*m", "", topology.stdout).partition("\n\n")[0]
            lines += ["", "```", table.strip(), "```"]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the parts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--nproc", type=int, choices=[2, 4, 8], help="GPUs to use (default: as many as there are)")
    parser.add_argument("--flavor", choices=list(llama3_flavors), help="of train and profile (default: 1B)")
    parser.add_argument("--seq_len", type=int, help="of train and profile (default: 8192)")
    parser.add_argument("--sequences", type=int, help="a GPU, of train and profile (default: 2)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_parallel"))
    args = parser.parse_args()
    if args.device == "cpu" and args.nproc not in (None, 2):
        parser.error("a rehearsal has 2 processes")
    num_gpus = torch.cuda.device_count()
    nproc = 2 if args.device == "cpu" else args.nproc or next((n for n in (8, 4, 2) if n <= num_gpus), 0)
    if args.device == "cuda" and not 0 < nproc <= num_gpus:
        parser.error(
            f"this host has {num_gpus} GPUs, and {nproc or 'at least 2'} are needed; --device cpu is a rehearsal"
        )
    given = {name: value for name in ("flavor", "seq_len", "sequences") if (value := getattr(args, name)) is not None}
    sizes = Sizes(**(vars(SIZES[args.device]) | given))
    host = Host(args.device, nproc, sizes, out=args.out, limit_s=args.limit)

    report = describe_host(host)
    results: list[Row] = []
    with ThreadPoolExecutor() as pool:
        untimed = {name: pool.submit(run_part, name, host) for name in UNTIMED if name in args.only}
    for name in PARTS:
        if name not in args.only:
            continue
        rows = untimed[name].result() if name in untimed else run_part(name, host)
        results += [{"part": name, **row} for row in rows]
        report += "\n" + format_part(name, rows)
        # after each part: whoever stops this has what there is
        (host.out / "report.md").write_text(report)
        (host.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    print(f"\n{report}\n{os.path.relpath(host.out / 'report.md')}")
    return int(any("failed" in row for row in results))


if __name__ == "__main__":
    sys.exit(main())
