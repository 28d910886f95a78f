"""Starts the processes of a run on this machine: what run_train.sh and the command `torchtitan` call.

    torchtitan [--nproc_per_node N] [torchrun's flags for several machines] [--section.option value ...]
    torchtitan --dry_run [--nproc RANKS] [--section.option value ...]

The options are checked first, without importing torch: a mistake costs one message and a fraction of a second. Then
torch.distributed.run starts `-m torchtitan.train` N times. Its agent's long reports become one line: which rank
ended the run, and how. Exit status: the failed worker's, or 128 + the number of the signal that ended the run; a
mistake that no restart heals has one of its own (config/errors.py), and ends the run whatever --max_restarts says.
"""

import argparse
import io
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torchtitan.config.errors import EXIT_MISTAKE, ConfigError, exit_status, raise_all
from torchtitan.config.manager import ConfigManager
from torchtitan.config.schema import either, nearest, option_of
from torchtitan.config.types import FilePath, NonNegativeInt, PositiveInt, Range
from torchtitan.launch import preflight
from torchtitan.launch.environment import describe_upstream_variables, set_defaults_of_workers
from torchtitan.protocols.train_spec import validate_run
from torchtitan.tools.process import raise_file_limit
from torchtitan.tools.terminal import ProgressTerminal, send_progress

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# The flags that are taken out of the arguments, all but the first three torchrun's; the rest are options of the run.
FLAGS: dict[str, Any] = {
    "num_gpus": NonNegativeInt,  # of this machine, where that is known
    "dry_run": bool,
    "nproc": PositiveInt,  # of all machines, with dry_run
    "nproc_per_node": PositiveInt,
    "nnodes": str,
    "node_rank": NonNegativeInt,
    "rdzv_backend": str,
    "rdzv_endpoint": str,
    "rdzv_id": str,
    "rdzv_conf": str,
    "standalone": bool,
    "master_addr": str,
    "master_port": Annotated[int, Range(min=0, max=2**16 - 1)],
    "local_addr": str,
    "max_restarts": NonNegativeInt,
    "monitor_interval": Annotated[float, Range(above=0, max=10**9)],
    "log_dir": FilePath,
    "local_ranks_filter": str,
    "redirects": str,
    "tee": str,
    "numa_binding": Literal["node", "socket", "exclusive", "core-complex"],
}
_OWN_FLAGS = ("num_gpus", "dry_run", "nproc", "standalone")
"""Those that torchrun is not given."""
_DEFAULTS = {"nproc_per_node": "1", "nnodes": "1", "local_ranks_filter": "0"}
_MASTER_FLAGS = ("master_addr", "master_port", "node_rank")
"""torchrun's older way to bring machines together, which its static rendezvous reads."""

_OTHER_FILES = 256
"""How many a process may need besides a socket for each process of the run."""

# A worker that is asked to stop may finish its step and save a checkpoint first.
_SHUTDOWN_TIMEOUT_S = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Check the options, run the workers to their end, return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # torchrun copies the workers' lines to it and never flushes
        sys.stdout.reconfigure(line_buffering=True)
    try:
        launcher, options = split_arguments(sys.argv[1:] if argv is None else argv)
        num_gpus = getattr(launcher, "num_gpus", None)
        fewest, _, most = launcher.nnodes.partition(":")
        nodes = range(int(fewest), int(most or fewest) + 1)
        if line := describe_upstream_variables():
            print(line, file=sys.stderr)
        if getattr(launcher, "dry_run", False):
            return _dry_run(options, getattr(launcher, "nproc", launcher.nproc_per_node * nodes[0]), num_gpus)
        outputs = preflight.check(options, nproc=launcher.nproc_per_node, nnodes=nodes[0], num_gpus=num_gpus)
        raise_all([ConfigError(problem) for problem in _about_flags(launcher, max_files=raise_file_limit())])
        for line in preflight.about_other_numbers(options, nproc=launcher.nproc_per_node, nodes=nodes):
            print(line, file=sys.stderr)
        if (folder := getattr(launcher, "log_dir", os.devnull)) != os.devnull:  # which torchrun knows how to take
            preflight.check_writable(Path(folder), given=f"--log_dir {folder}")
        if sys.stdout.isatty():
            sys.stdout = ProgressTerminal(sys.stdout)
            if sys.stderr.isatty():  # not where `2>err.log` asks for it
                sys.stderr = sys.stdout
            # For the workers, whose own output is a file: this one's progress line is shown.
            os.environ["TORCHTITAN_PROGRESS_RANK"] = launcher.local_ranks_filter.partition(",")[0]
        set_defaults_of_workers(launcher.nproc_per_node)
        if num_gpus is not None:  # for the workers, whose torch may be unable to use them
            os.environ["TORCHTITAN_NUM_GPUS"] = str(num_gpus)
        os.environ["TORCHTITAN_LOG_RANK"] = launcher.local_ranks_filter
        with tempfile.TemporaryDirectory(prefix="torchtitan_", ignore_cleanup_errors=True) as log_dir:
            if launcher.nnodes not in ("1", "1:1"):  # what others show is not on this screen, and is wanted later
                log_dir = str(outputs / "worker_logs" / socket.gethostname())
            flags = {name: value for name, value in vars(launcher).items() if name not in _OWN_FLAGS}
            return run_workers({"log_dir": log_dir, **flags}, options)
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:  # before there were workers
        return 128 + signal.SIGINT
    finally:
        kill_workers()
        if isinstance(sys.stdout, ProgressTerminal):
            send_progress("")


def _dry_run(options: list[str], world_size: int, num_gpus: int | None) -> int:
    config = ConfigManager().parse_args(options)
    validate_run(config, world_size=world_size, liger_installed=True)
    from torchtitan.launch.dry_run import show  # torch: slow to import

    return show(config, world_size=world_size, device_type="cpu" if num_gpus == 0 and world_size == 1 else "cuda")


def split_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """torchrun's flags, and the options of the run. Raises ConfigError for flags with values that they cannot have."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for name, annotation in FLAGS.items():
        # A flag at the end or before another one gets `const`, so that nothing is left for argparse itself to report.
        const = "True" if annotation is bool else None
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?", const=const)
    given, options = parser.parse_known_args([word for word in argv if word != "--"])
    texts = _DEFAULTS | vars(given)

    flags, errors = argparse.Namespace(), []
    for name, text in texts.items():
        option = option_of(name, FLAGS[name], None)
        try:
            if text is None:
                raise ValueError(f"needs a value, {option.allowed()}")
            setattr(flags, name, option.parse(text))
            if name == "nnodes" and not _is_num_nodes(text):
                raise ValueError("must be a number of machines, or a range of it such as 2:4")
        except ValueError as error:
            words = [option.flag] if text is None else [option.flag, text or '""']
            errors.append(ConfigError(f"{' '.join(words)}: {error}"))
    for word in options:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and "." not in name and name != "help" and (meant := nearest(name, FLAGS)):
            errors.append(ConfigError(f"{word}: no such flag; did you mean --{either(meant)}?"))
    raise_all(errors)
    return flags, options


def _is_num_nodes(text: str) -> bool:
    found = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", text, re.ASCII)
    return found is not None and int(found[1]) <= int(found[2] or found[1])


def _about_flags(flags: argparse.Namespace, *, max_files: int) -> Iterator[str]:
    """What torchrun would take and show nothing, or end in a traceback."""
    num_processes = int(flags.nnodes.partition(":")[0]) * flags.nproc_per_node
    if max_files < num_processes + _OTHER_FILES:
        yield (
            f"a process may open {max_files} files here (`ulimit -Hn`), and where {num_processes} processes meet, one"
            f" has a socket for each of them; have the limit raised to {num_processes + _OTHER_FILES} or more"
        )
    shown, ranks = flags.local_ranks_filter, range(flags.nproc_per_node)
    if not set(shown.split(",")) <= set(map(str, ranks)):
        yield (
            f"LOG_RANK={shown} (the flag --local_ranks_filter): must be ranks of this machine, separated by commas,"
            f" each of them {either(ranks)}"
        )
    given = vars(flags)
    if given.get("standalone") and flags.nnodes not in ("1", "1:1"):  # on one machine every run is so
        yield f"--standalone is for one machine, and --nnodes is {flags.nnodes}; leave one of them out"
    if "nproc" in given:
        yield f"--nproc {flags.nproc} is for --dry_run; the processes of this machine are --nproc_per_node (NGPU)"
    has_master = any(flag in given for flag in _MASTER_FLAGS)
    if flags.nnodes.rpartition(":")[2] != "1" and "rdzv_endpoint" not in given and not has_master:
        yield (
            f"--nnodes {flags.nnodes}: the machines need a place to meet; add --rdzv_endpoint HOST:PORT, the same on"
            " all of them"
        )
    if "rdzv_endpoint" in given and has_master:
        yield (
            f"--rdzv_endpoint {given['rdzv_endpoint']} says where the machines meet, and so do --master_addr,"
            " --master_port and --node_rank; leave out the one or the others"
        )
    if "local_addr" in given:  # torchrun would look for it for minutes
        try:
            socket.getaddrinfo(flags.local_addr, None)
        except OSError as error:
            yield f"--local_addr {flags.local_addr}: not a host or address that is known here: {error}"
    if "numa_binding" in given and given.get("num_gpus") == 0:
        yield "--numa_binding binds processes to the cores near their GPUs; leave it out on CPU"


def run_workers(flags: dict[str, object], options: list[str]) -> int:
    """Start the workers and wait for them; the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from torchtitan.launch.agent import Agent, use_agent

    # What is ignored stays so: `nohup` ignores SIGHUP, for the run to outlive the terminal.
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]

    def stop(signum: int, _frame: FrameType | None) -> None:
        """Let the agent pass the signal on to the workers; a second one kills them."""
        for handled in signals:
            signal.signal(handled, lambda *_: kill_workers())
        name = signal.Signals(signum).name
        print(f"{name}: waiting for the workers to stop. Once more kills them.", file=sys.stderr, flush=True)
        raise SignalException(name, signal.Signals(signum))

    is_static = flags.get("rdzv_backend") == "static" or any(flag in flags for flag in _MASTER_FLAGS)
    place = {"rdzv_backend": "static"} if is_static else {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    command = [f"--{flag}={value}" for flag, value in (place | {"role": "rank", "tee": "3"} | flags).items()]
    arguments = torchrun.parse_args([*command, "-m", "torchtitan.train", *options])
    arguments.signals_to_handle = "SIGQUIT"  # the others are handled here
    arguments.shutdown_timeout = _SHUTDOWN_TIMEOUT_S
    for handled in signals:
        signal.signal(handled, stop)
    _quiet_agent()
    # A store for each start of the workers: in one that is kept, restarted ranks find the addresses of dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    use_agent()
    log_dir, shown_ranks = Path(arguments.log_dir), arguments.local_ranks_filter.split(",")
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _report_failure(*error.get_first_failure(), log_dir, shown_ranks)
    except SignalException as error:
        for rank, failure in Agent.failures.items():
            _report_failure(rank, failure, log_dir, shown_ranks)
        return 128 + error.sigval
    except RendezvousError as error:
        where = f"{arguments.nnodes} machine(s) at {arguments.rdzv_endpoint or arguments.master_addr}"
        print(f"torchrun could not bring together {where}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"torchrun could not start the workers: {error}", file=sys.stderr)
        return 1
    return 0


def kill_workers() -> None:
    """End what is still there of the workers and of the processes that they started."""
    for children in Path("/proc/self/task").glob("*/children"):
        pids: list[str] = []
        with suppress(OSError):  # a thread that has ended by now
            pids = children.read_text().split()
        for pid in pids:
            with suppress(ProcessLookupError):  # not every child leads a process group, as workers do
                os.killpg(int(pid), signal.SIGKILL)


def _report_failure(rank: int, failure: "ProcessFailure", log_dir: Path, shown_ranks: list[str]) -> int:
    """Say in one line which worker failed, and how; show its last words if they are not on the screen yet."""
    how = f"exited with status {failure.exitcode}"
    if failure.exitcode == EXIT_MISTAKE:
        how += " (which no restart heals)"
    if failure.exitcode < 0:
        how = f"was killed by {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        how += " (the machine may have run out of memory)"
    if str(failure.local_rank) in shown_ranks:
        print(f"Rank {rank} {how}; its messages are above.", file=sys.stderr)
    elif last_words := _read_last_words(log_dir, failure.local_rank):
        print(f"Rank {rank} {how}. The end of its output:", *last_words, sep="\n", file=sys.stderr)
    else:
        print(f"Rank {rank} {how}; there is no output in its log.", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _read_last_words(log_dir: Path, local_rank: int) -> list[str]:
    """The last lines of a rank's output."""
    # by time, not by name: the folder may hold the logs of earlier runs, and attempt_10 sorts before attempt_9
    folders = sorted(log_dir.glob(f"*/attempt_*/{local_rank}"), key=lambda folder: folder.stat().st_mtime)
    logs = [log for folder in folders[-1:] for log in folder.glob("std*.log")]
    return [line for log in logs for line in log.read_text(errors="replace").splitlines()[-20:]]


def _quiet_agent() -> None:
    """Of what torchrun's agent logs, print restarts only: how a run ends is said here, in one line."""
    agent_log = logging.getLogger("torch.distributed.elastic")
    agent_log.propagate = False
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: "will restart" in record.getMessage())
    agent_log.addHandler(handler)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.INFO)
