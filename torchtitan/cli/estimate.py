"""How much GPU memory a run needs, by part and moment, in seconds and on any machine.

    torchtitan estimate --world_size 8 --job.config_file my.toml --training.local_batch_size 2

Takes the options of run_train.sh and its CONFIG_FILE, the number of GPUs, NGPU where it is not given, and the memory of
one, by which activation_checkpoint.mode = "auto" chooses; nothing is allocated, downloaded or started. With --write it
looks for the most sequences at once that fit, with --longest too for the longest ones at the batch size that is given,
and writes the options with them as a TOML file to train with.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchtitan.config import ConfigManager
from torchtitan.config.block_modes import ASSUMED_GIB, describe_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.manager import write_resolved
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.train_spec import validate_run

if TYPE_CHECKING:
    from torchtitan.memory import MemoryEstimate


def main(parser: ArgumentParser, words: Sequence[str]) -> int:
    """Print the table."""
    parser.epilog = "torchtitan train --help lists the options of a run."
    parser.add_argument("--world_size", "--world-size", type=int, default=os.environ.get("NGPU", 1), help="GPUs")
    parser.add_argument(
        "--gib", type=float, default=ASSUMED_GIB, help="memory of a GPU (default: that of an H100 80GB)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="find the largest training.local_batch_size")
    parser.add_argument("--longest", action="store_true", help="with --write: the longest training.seq_len instead")
    launch, options = parser.parse_known_args(words)
    if config_file := os.environ.get("CONFIG_FILE"):
        options = ["--job.config_file", config_file, *options]
    if launch.world_size < 1:
        parser.error(f"--world_size {launch.world_size}: expected the number of GPUs, 1 or more")
    if launch.longest and not launch.write:
        parser.error("--longest: expected --write FILE beside it, the file that gets the longest training.seq_len")
    config = ConfigManager().parse_args(options)
    maybe_import_custom(config.experimental.custom_import)
    validate_run(config, world_size=launch.world_size, liger_installed=True)
    from torchtitan.memory.estimate import GIB, MemoryModel, describe  # torch: slow to import
    from torchtitan.memory.plan import choose_block_modes

    budget = config.activation_checkpoint.memory_share * launch.gib * GIB
    if launch.write:
        found: Literal["local_batch_size", "seq_len"] = "seq_len" if launch.longest else "local_batch_size"
        find_largest(found, config, launch.world_size, budget)
        write_resolved(config, launch.write)
        print(f"{launch.write} has training.{found} = {getattr(config.training, found)}")
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


def find_largest(
    name: Literal["local_batch_size", "seq_len"], config: JobConfig, world_size: int, budget: float
) -> None:
    """Give the configuration the largest value of this option of training whose peak is within `budget` bytes.

    Raises:
        ConfigError: not even the smallest fits.
    """
    from torchtitan.memory.estimate import GIB, MemoryModel
    from torchtitan.memory.plan import choose_block_modes

    def get_peak(size: int) -> int:
        setattr(config.training, name, size)
        memory = MemoryModel(config, world_size=world_size)
        peak = memory.estimate(choose_block_modes(config, memory, budget)).peak
        print(f"{size} {unit}: {peak / GIB:.1f} of {budget / GIB:.1f} GiB", file=sys.stderr)
        return peak

    config.job.config_file = None
    dims = ParallelDims.from_config(config.parallelism, world_size)
    if name == "seq_len":
        unit, less = "tokens in a sequence", "a smaller training.local_batch_size"
        step = 256 * dims.cp * dims.tp  # which divide a sequence
        sizes = list(range(step, 2**20 + 1, step))
    else:
        unit, less = "sequences", "a shorter training.seq_len"
        # a pipeline runs as many microbatches as it has stages or more; a global batch is divided without a rest
        step = config.parallelism.pipeline_parallel_microbatch_size * (2 * dims.pp if dims.pp > 1 else 1)
        whole = config.training.global_batch_size
        sizes = [n for n in range(step, 4096, step) if whole == -1 or whole % (n * dims.dp) == 0]
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
            f"training.{name}={step} does not fit into {budget / GIB:.1f} GiB; more GPUs (--world_size), {less},"
            " activation_checkpoint.mode auto or full, optimizer.state_precision compact, or the fused loss need less"
        )
    setattr(config.training, name, sizes[low - 1])


def to_table(estimate: "MemoryEstimate") -> str:
    """Every moment by part, and the peak."""
    from torchtitan.memory.estimate import GIB, PARTS

    heading = "GiB" if estimate.pp_rank is None else f"GiB, on pipeline rank {estimate.pp_rank}"
    rows: list[tuple[str, Iterable[str]]] = [(heading, (*PARTS, "sum"))]
    for moment in estimate.moments:
        name = f"{moment.name} (most in use)" if moment is estimate.worst_moment else moment.name
        rows.append((name, (f"{n / GIB:.2f}" for n in (*(moment.parts[part] for part in PARTS), moment.total))))
    rows.append(
        ("peak: reserved for all moments", (f"{n / GIB:.2f}" for n in (*estimate.parts.values(), estimate.peak)))
    )
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows]
    if estimate.host:
        lines.append(f"beside this, in the machine's memory for each rank: {estimate.host / GIB:.2f} GiB")
    return "\n".join(lines)
