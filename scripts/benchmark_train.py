"""A whole training step, measured: tokens/s, MFU and peak memory with the fused loss off and on, and the largest batch.

    python scripts/benchmark_train.py                                   # 1B, 4096 tokens a sequence, compiled, one GPU
    torchrun --nproc_per_node 2 scripts/benchmark_train.py --batches 4 \
        --rows "fused --liger_kernel.enable_fused_linear_cross_entropy"
    python scripts/benchmark_train.py --flavor qwen3/0.6B qwen3/1.7B 3.2-1B 3.2-3B --batches 4 --steps 5 --warmup 2 \
        --rows "off --activation_checkpoint.mode auto" \
            "on --activation_checkpoint.mode auto --liger_kernel.enable_fused_linear_cross_entropy"

Each row is one configuration: a name, then options of the run. Trained is real text (training.dataset). Timed are
--steps steps after --warmup, from one device synchronisation to another; peak memory is the allocator's, reserved and
allocated. The largest batch is run and the next one must fail, from the one on that the estimate finds to fit.
Several processes measure one row at one batch size: a second process group would meet the keys of the first in
torchrun's store and hang, and a rank that is out of memory can only end the run, since the others wait for it.
Writes results.jsonl, row by row, and of several rows benchmark_train.png to --out; with --trace also rank 0's trace of
a later step to --out/profile_traces.
"""

import argparse
import gc
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # as the launcher, and before torch reads it
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from benchmark_origin import get_origin

from torchtitan.cli.estimate import find_largest
from torchtitan.config import ConfigManager
from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.sections import Profiling
from torchtitan.distributed.utils import get_world
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.device import get_peak_flops
from torchtitan.tools.logging import init_logger
from torchtitan.tools.profiling import maybe_profile
from torchtitan.train import Trainer

GIB = 1 << 30
DEFAULT_ROWS = ["standard", "fused --liger_kernel.enable_fused_linear_cross_entropy"]


def build_config(options: list[str], batch: int, args: argparse.Namespace) -> JobConfig:
    return ConfigManager().parse_args(
        [
            *("--training.local_batch_size", str(batch), "--training.steps", "100000"),
            *("--metrics.log_freq", "100000", "--training.seed", str(args.seed)),
            *("--job.dump_folder", str(args.out / "runs"), "--training.seq_len", str(args.seq_len)),
            *(["--training.compile"] if args.compile else []),
            *("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"),
            *options,
        ]
    )


def measure(name: str, options: list[str], batch: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """One configuration at one batch size; None where it runs out of memory. Several processes end with that."""
    config = build_config(options, batch, args)
    trainer: Trainer | None = None
    try:
        trainer = Trainer(config)
        batches = trainer.batches()
        seconds = run_steps(trainer, batches, args)
        peak = peak_memory(trainer.device)
        if args.trace:
            trace_step(trainer, batches, args)
        tokens_per_second = args.steps * batch * args.seq_len / seconds
        shared = trainer.parallel_dims.cp * trainer.parallel_dims.tp * trainer.parallel_dims.pp
        tokens_per_second *= trainer.num_microbatches / shared  # per device
        flops = tokens_per_second * trainer.model_args.get_num_flops_per_token(args.seq_len)
        origin = get_origin(trainer.device)
        peak_flops = get_peak_flops(origin["device"])
        return {
            "row": name,
            "batch": batch,
            "tokens_per_second": tokens_per_second,
            "mfu": None if peak_flops is None else flops / peak_flops,
            **peak,
            **origin,
        }
    except torch.cuda.OutOfMemoryError:
        world = get_world()
        if world.size > 1:
            print(f"{name:24}{batch:6}  out of memory on rank {world.rank}", flush=True)
            os._exit(1)  # at once: to end a process group one waits for the others
        return None
    except ConfigError as error:  # activation_checkpoint.mode=auto says before the first step that it will not fit
        print(str(error).partition("\n")[0], flush=True)
        return None
    finally:
        if trainer is not None:
            trainer.close()
        trainer = batches = None  # type: ignore[assignment]
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.compiler.reset()
        gc.enable()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_steps(trainer: Trainer, batches: Any, args: argparse.Namespace) -> float:
    """Seconds of the timed steps."""
    start = 0.0
    for i in range(args.warmup + args.steps):
        if i == args.warmup:
            synchronize(trainer.device)
            if trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        trainer.step += 1
        trainer.train_step(batches)
    synchronize(trainer.device)
    return time.perf_counter() - start


def trace_step(trainer: Trainer, batches: Any, args: argparse.Namespace) -> None:
    last = trainer.step + 4  # before it the profiler warms up
    profiling = Profiling(enable_profiling=True, profile_freq=last)
    options: dict[str, Any] = {"device": trainer.device, "rank": get_world().rank, "start_step": trainer.step}
    with maybe_profile(profiling, str(args.out), **options) as step_done:
        while trainer.step < last:
            trainer.step += 1
            trainer.train_step(batches)
            step_done()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {"reserved_gib": float("nan"), "allocated_gib": float("nan")}
    return {
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
    }


def measure_all(name: str, options: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in args.batches:
        row = measure(name, options, batch, args)
        print_row(name, batch, row)
        if row is not None:
            yield row
    if args.largest:
        yield from largest_batch(name, options, args)


def largest_batch(name: str, options: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows up to the largest batch that fits."""
    config = build_config(options, 1, args)
    is_auto = config.activation_checkpoint.mode == "auto"
    share = config.activation_checkpoint.memory_share if is_auto else 1.0
    with suppress(ConfigError):  # not even one sequence fits, by the estimate
        find_largest("local_batch_size", config, 1, share * get_capacity())
    batch, fits, fails = config.training.local_batch_size, 0, math.inf
    while fits + 1 < fails and batch > 0:
        row = measure(name, options, batch, args)
        print_row(name, batch, row)
        if row is None:
            fails, batch = batch, batch - 1
        else:
            fits, batch = batch, batch + 1
            yield row
    print(f"{name:24}largest batch: {fits}", flush=True)


def get_capacity() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def print_row(name: str, batch: int, row: dict[str, Any] | None) -> None:
    if get_world().rank != 0:
        return
    if row is None:
        print(f"{name:24}{batch:6}  out of memory", flush=True)
        return
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    print(
        f"{name:24}{batch:6}{row['tokens_per_second']:12,.0f}{mfu:>8}{row['reserved_gib']:10.1f}{row['allocated_gib']:10.1f}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(row["row"] for row in rows):
        curve = sorted((row for row in rows if row["row"] == name), key=lambda row: row["batch"])
        batches = [row["batch"] for row in curve]
        speed.plot(batches, [row["tokens_per_second"] for row in curve], "o-", label=name)
        memory.plot(batches, [row["reserved_gib"] for row in curve], "o-", label=name)
    speed.set(xlabel="sequences a device", ylabel="tokens/s a device", ylim=(0, None))
    memory.set(xlabel="sequences a device", ylabel="peak memory reserved, GiB", ylim=(0, None))
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    world = get_world()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", nargs="+", default=["1B"], help="of llama3, or of another FAMILY/FLAVOR")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, help="name, then options of the run")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--largest", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available() and world.size == 1
    )
    parser.add_argument("--trace", action="store_true", help="trace a step after the timed ones")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_train"))
    args = parser.parse_args()
    if (world.size > 1 or args.trace) and (args.largest or len(args.flavor) * len(args.rows) * len(args.batches) > 1):
        who = "several processes measure" if world.size > 1 else "--trace is for"
        parser.error(f"{who} one of --rows at one of --batches, without --largest")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: expected 1 or more")
    models = {given: given.split("/") if "/" in given else ("llama3", given) for given in args.flavor}
    for family, flavor in models.values():
        if flavor not in (known := list(get_train_spec(family).flavors)):
            parser.error(f"--flavor {flavor}: {family} has {', '.join(known)}")
    init_logger()

    if world.rank == 0:
        print(f"{'':24}{'batch':>6}{'tokens/s':>12}{'MFU':>8}{'reserved':>10}{'allocated':>10}   (GiB)", flush=True)
    rows: list[dict[str, Any]] = []
    results = args.out / "results.jsonl"
    if world.rank == 0:
        results.unlink(missing_ok=True)
    for (given, (family, flavor)), spec in product(models.items(), args.rows):
        name, *options = shlex.split(spec)
        name = f"{given} {name}" if len(models) > 1 else name
        for row in measure_all(name, ["--model.name", family, "--model.flavor", flavor, *options], args):
            rows.append(row)
            if world.rank == 0:
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if world.rank == 0 and len(rows) > 1:
        title = f"{', '.join(args.flavor)}, {args.seq_len} tokens a sequence, {world.size} x {rows[0]['device']}"
        plot(rows, args.out / "benchmark_train.png", title)


if __name__ == "__main__":
    main()
