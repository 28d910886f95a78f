"""Convert weights to and from Hugging Face's format; the same as `torchtitan convert`, which explains it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
