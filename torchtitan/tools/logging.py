"""The package's one logger, and the format in which its lines are printed."""

import logging
import sys

logger = logging.getLogger("torchtitan")


def init_logger(*, warnings_only: bool = False) -> None:
    """Print the package's log on stdout, one line a record; calling it again replaces the earlier handler."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[titan] %(asctime)s - root - %(levelname)s - %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if warnings_only else logging.INFO)
    # The root logger may have handlers of its own (a notebook, another library): each line is printed once.
    logger.propagate = False
