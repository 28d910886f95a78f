import sys

try:
    from torchtitan.cli.main import run
except ModuleNotFoundError as error:
    if error.name and error.name.startswith("torchtitan"):
        raise
    sys.exit(
        f"{sys.executable} lacks {error.name}, which torchtitan needs. In a checkout `./run_train.sh --dry_run` sets up"
        " .venv, and `source .venv/bin/activate` makes it this one; elsewhere, pip install the package"
    )

run()
