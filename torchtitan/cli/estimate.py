"""How much GPU memory a run needs, by part and moment, in seconds and on any machine.

    torchtitan estimate --world_size 8 --job.config_file my.toml --training.local_batch_size 2

Takes the options of run_train.sh and its CONFIG_FILE, the number of GPUs, NGPU where it is not given, and the memory of
one, by which activation_checkpoint.mode = "auto" chooses; nothing is allocated, downloaded or started. With --write it
looks for the most sequences at once that fit, and writes the options with them as a TOML file to train with.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.config import ConfigManager
from torchtitan.config.block_modes import describe_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.manager import write_resolved
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.train_spec import validate_run

if TYPE_CHECKING:
    from torchtitan.memory import MemoryEstimate


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="torchtitan estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="torchtitan train --help lists the options of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", "--world-size", type=int, default=os.environ.get("NGPU", 1), help="GPUs")
    parser.add_argument("--gib", type=float, default=79.1, help="memory of a GPU (default: that of an H100 80GB)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="find the largest training.local_batch_size")
    launch, options = parser.parse_known_args(argv)
    if config_file := os.environ.get("CONFIG_FILE"):
        options = ["--job.config_file", config_file, *options]
    if launch.world_size < 1:
        parser.error(f"--world_size {launch.world_size}: expected the number of GPUs, 1 or more")
    try:
        config = ConfigManager().parse_args(options)
        maybe_import_custom(config.experimental.custom_import)
        validate_run(config, world_size=launch.world_size, liger_installed=True)
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return 1
    from torchtitan.memory.estimate import GIB, MemoryModel, describe  # torch: slow to import
    from torchtitan.memory.plan import choose_block_modes

    budget = config.activation_checkpoint.memory_share * launch.gib * GIB
    if launch.write:
        try:
            find_largest_batch(config, launch.world_size, budget)
            write_resolved(config, launch.write)
        except (ConfigError, OSError) as error:
            print(error.report() if isinstance(error, ConfigError) else f"{error}", file=sys.stderr)
            return 1
        print(f"{launch.write} has training.local_batch_size = {config.training.local_batch_size}")
    memory = MemoryModel(config, world_size=launch.world_size)
    block_modes = choose_block_modes(config, memory, budget)
    estimate = memory.estimate(block_modes)
    training = config.training
    print(
        f"{config.model.title} on {launch.world_size} GPU{'s' * (launch.world_size > 1)},"
        f" {training.local_batch_size} x {training.seq_len} tokens on each data-parallel rank"
    )
    print(f"{describe(estimate)}; {describe_block_modes(block_modes)}\n\n{to_table(estimate)}")
    return 0


def find_largest_batch(config: JobConfig, world_size: int, budget: float) -> None:
    """Give the configuration the largest training.local_batch_size whose peak is within `budget` bytes.

    Raises:
        ConfigError: not even the smallest fits.
    """
    from torchtitan.memory.estimate import GIB, MemoryModel
    from torchtitan.memory.plan import choose_block_modes

    def get_peak(batch_size: int) -> int:
        config.training.local_batch_size = batch_size
        memory = MemoryModel(config, world_size=world_size)
        peak = memory.estimate(choose_block_modes(config, memory, budget)).peak
        print(f"{batch_size} sequences: {peak / GIB:.1f} of {budget / GIB:.1f} GiB", file=sys.stderr)
        return peak

    config.job.config_file = None
    dims = ParallelDims.from_config(config.parallelism, world_size)
    # a pipeline runs as many microbatches as it has stages or more; a global batch is divided without a rest
    unit = config.parallelism.pipeline_parallel_microbatch_size * (2 * dims.pp if dims.pp > 1 else 1)
    whole = config.training.global_batch_size
    sizes = [n for n in range(unit, 4096, unit) if whole == -1 or whole % (n * dims.dp) == 0]
    low, high = 0, len(sizes)  # those before low fit, those from high on do not
    probe = 0
    while low < high:
        if get_peak(sizes[probe]) <= budget:
            low = probe + 1
        else:
            high = probe
        probe = min(2 * low, (low + high) // 2)
    if low == 0:
        raise ConfigError(
            f"training.local_batch_size={unit} does not fit into {budget / GIB:.1f} GiB; more GPUs (--world_size), a"
            " shorter training.seq_len, activation_checkpoint.mode auto or full, or the fused loss need less"
        )
    config.training.local_batch_size = sizes[low - 1]


def to_table(estimate: "MemoryEstimate") -> str:
    """Every moment by part, and the peak."""
    from torchtitan.memory.estimate import GIB, PARTS, STREAMS

    heading = "GiB" if estimate.pp_rank is None else f"GiB, on pipeline rank {estimate.pp_rank}"
    rows: list[tuple[str, Iterable[str]]] = [(heading, (*PARTS, "sum"))]
    for moment in estimate.moments:
        parts = moment.by_part(*STREAMS)
        name = f"{moment.name} (most in use)" if moment is estimate.worst_moment else moment.name
        rows.append((name, (f"{n / GIB:.2f}" for n in (*(parts[part] for part in PARTS), moment.total))))
    rows.append(
        ("peak: reserved for all moments", (f"{n / GIB:.2f}" for n in (*estimate.parts.values(), estimate.peak)))
    )
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows]
    if estimate.host:
        lines.append(f"beside this, in the machine's memory for each rank: {estimate.host / GIB:.2f} GiB")
    return "\n".join(lines)
