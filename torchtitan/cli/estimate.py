"""How much GPU memory a run needs, by part and moment, in seconds and on any machine.

    torchtitan estimate --world_size 8 --job.config_file my.toml --training.local_batch_size 2

Takes the options of run_train.sh and its CONFIG_FILE, the number of GPUs, NGPU where it is not given, and the memory of
one, by which activation_checkpoint.mode = "auto" chooses; nothing is allocated, downloaded or started.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torchtitan.config import ConfigManager
from torchtitan.config.block_modes import describe_block_modes
from torchtitan.config.errors import ConfigError
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

    memory = MemoryModel(config, world_size=launch.world_size)
    budget = config.activation_checkpoint.memory_share * launch.gib * GIB
    block_modes = choose_block_modes(config, memory, budget)
    estimate = memory.estimate(block_modes)
    training = config.training
    print(
        f"{config.model.title} on {launch.world_size} GPU{'s' * (launch.world_size > 1)},"
        f" {training.local_batch_size} x {training.seq_len} tokens on each data-parallel rank"
    )
    print(f"{describe(estimate)}; {describe_block_modes(block_modes)}\n\n{to_table(estimate)}")
    return 0


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
