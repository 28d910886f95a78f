"""Continue a prompt with a trained model; the same as `torchtitan generate`, which explains it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.cli.generate import main
from torchtitan.distributed.utils import end_process

if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
