"""The program `torchtitan`, and `python -m torchtitan`: a command, then what it takes; without one, it trains."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from torchtitan.config.errors import ConfigError
from torchtitan.config.manager import get_ready_files


class Command(NamedTuple):
    module: str
    """Its main(words), or in this room main(parser, words), takes what follows and returns the exit status."""
    about: str


COMMANDS = {
    "train": Command("torchtitan.launch.launcher", "train; what is meant where no command is given"),
    "generate": Command("torchtitan.cli.generate", "continue a prompt with a trained model"),
    "convert": Command("torchtitan.cli.convert", "weights to and from Hugging Face's format"),
    "estimate": Command("torchtitan.cli.estimate", "how much GPU memory a run needs, by part"),
    "tokenizer": Command("torchtitan.cli.tokenizer", "train a tokenizer on texts"),
    "tokenize": Command("torchtitan.cli.tokenize", "tokenise a dataset once, into files of token ids"),
    "config": Command("torchtitan.config.manager", "print the resolved configuration; with --help, the options"),
    "compare": Command("torchtitan.cli.compare", "train twice, or read two runs, and compare them"),
    "report": Command("torchtitan.cli.report", "draw runs: one HTML file of curves, options and events"),
}


def main(argv: Sequence[str]) -> int:
    """Run the command that the words begin with; the exit status. Each imports what it needs, and only that."""
    word = argv[0] if argv else ""
    if word in ("--help", "-h", "help") and len(argv) == 1:
        print(help_text())
        return 0
    if word.startswith("-") or not word:
        return main(["train", *argv])
    if word not in COMMANDS:
        print(f"torchtitan {word}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    words = list(argv[1:])
    if word == "train" and not any(flag.replace("-", "_").startswith("__job.config_file") for flag in words):
        words = ["--job.config_file", "debug_model", *words]  # as run_train.sh does
    module = import_module(COMMANDS[word].module)
    if not module.__name__.startswith("torchtitan.cli."):
        status: int = module.main(words)
        return status
    parser = argparse.ArgumentParser(
        prog=f"torchtitan {word}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        status = module.main(parser, words)
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader, `| head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def help_text() -> str:
    """The commands."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: torchtitan [COMMAND] ...",
            "",
            *(f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()),
            "",
            "torchtitan COMMAND --help tells what a command takes; torchtitan train --help lists the options of a run,",
            "torchtitan train --help training those of a section.",
            "",
            f"--job.config_file takes a TOML file, or the name of a ready one: {', '.join(get_ready_files())}.",
            "Without one it is the debug model that is trained: a minute and a half on two CPU cores.",
        ]
    )


def run() -> None:
    """What the installed program calls."""
    status = main(sys.argv[1:])
    if "torch" in sys.modules:
        from torchtitan.distributed.utils import end_process, get_world

        if get_world().size > 1:  # of `torchrun -m torchtitan generate`
            end_process(status)
    sys.exit(status)
