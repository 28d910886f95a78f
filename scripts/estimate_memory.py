"""How much GPU memory a run needs, by part and moment, in seconds and on any machine.

    python scripts/estimate_memory.py --world_size 8 --job.config_file my.toml --training.local_batch_size 2

Takes the options of run_train.sh and its CONFIG_FILE, and the number of GPUs, NGPU where it is not given; nothing is
allocated, downloaded or started.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.config import ConfigManager
from torchtitan.config.errors import ConfigError
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.train_spec import validate_run


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="./run_train.sh --help lists the options of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", "--world-size", type=int, default=os.environ.get("NGPU", 1), help="GPUs")
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
    from torchtitan.memory.estimate import describe, estimate_memory, to_table  # torch: slow to import

    estimate = estimate_memory(config, world_size=launch.world_size)
    training = config.training
    print(
        f"{config.model.name} {config.model.flavor} on {launch.world_size} GPU{'s' * (launch.world_size > 1)},"
        f" {training.local_batch_size} x {training.seq_len} tokens on each data-parallel rank"
    )
    print(f"{describe(estimate)}\n\n{to_table(estimate)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
