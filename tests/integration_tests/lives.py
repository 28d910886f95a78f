"""The real trainer on a tiny model, in real processes that a test can watch, stop and kill.

A process is forked from one that has imported torch and the package, and so is the one that writes its checkpoints: a
run starts in a tenth of a second, and tests can afford many. What it printed, its exit status and its metrics.jsonl are
what a test looks at.
"""

import json
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

import torchtitan.train
from tests.processes import FORKED, find_children, find_free_port, get_worker_environment
from torchtitan.checkpoint import background
from torchtitan.components.dataloader import Batch
from torchtitan.config.errors import EXIT_MISTAKE
from torchtitan.train import Trainer

REPO = Path(__file__).parents[2]
OPTIONS = f"""
    --experimental.custom_import tests.integration_tests.tiny_llama3
    --model.name tiny_llama3 --model.flavor tiny --model.tokenizer_path {REPO}/tests/assets/tokenizer
    --training.seq_len 32 --training.local_batch_size 2
    --training.seed 7 --training.deterministic --training.mixed_precision_param float32
    --lr_scheduler.warmup_steps 2 --optimizer.lr 3e-3 --liger_kernel.implementation native
    --metrics.log_freq 1 --comm.init_timeout_seconds 60
"""
TIMEOUT_S = 240

Hook = Callable[[], None]
"""Runs in the process before the trainer does: a function of a module, to change what the trainer will find."""


class Step(NamedTuple):
    """What a run says of a step, in full precision."""

    loss: float
    grad_norm: float
    max_loss: float
    """The largest mean over one data rank's tokens."""
    num_tokens: int
    """Seen since the run began."""


class Life:
    """A run from a start to its end, whatever that is. Its data are beside its folder."""

    def __init__(self, folder: Path, options: str, *, world_size: int = 1, hook: Hook | None = None) -> None:
        self.folder = folder
        data = folder.with_name("data.jsonl")
        if not data.exists():
            write_data(data)
        self._logs = folder.with_name(f"{folder.name}-life{_next_number(folder)}")
        self._logs.mkdir(parents=True)
        port = find_free_port()  # for the store of rank 0, where the others meet
        argv = f"{OPTIONS} --job.dump_folder {folder} --training.dataset_path {data} {options}".split()
        self.processes = [
            FORKED.Process(target=_live, args=(rank, world_size, port, argv, self._log(rank), hook))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one of the processes; nothing happens where it has ended."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """Leave no process; each is given no chance to do anything."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self) -> list[int]:
        """Wait for all processes; their exit statuses, negative where a signal ended them."""
        end = time.monotonic() + TIMEOUT_S
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            self.kill()
            raise TimeoutError(f"the run did not end:\n{self.last_words()}")
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition: Callable[[], bool], interval_s: float = 0.001) -> None:
        """Return when it is true, or when the first process has ended."""
        end = time.monotonic() + TIMEOUT_S
        while self.processes[0].is_alive() and not condition():
            assert time.monotonic() < end, self.last_words()
            time.sleep(interval_s)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: last_step(self.folder) >= step)

    def children(self) -> list[int]:
        """Ids of the processes that those of this run have started."""
        return [child for process in self.processes for child in find_children(process.pid)]

    def output(self, rank: int = 0) -> str:
        log = self._log(rank)
        return log.read_text() if log.exists() else ""

    def last_words(self, rank: int = 0) -> str:
        return "\n".join(self.output(rank).splitlines()[-30:])

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.log"


def train(
    folder: Path,
    options: str,
    *,
    world_size: int = 1,
    hook: Hook | None = None,
    status: int = 0,
) -> Life:
    """A run up to its end, which must be with this exit status on all ranks: 1 is any failure that the run reports."""
    life = Life(folder, options, world_size=world_size, hook=hook)
    allowed = {1, EXIT_MISTAKE} if status == 1 else {status}
    assert set(life.wait()) <= allowed, "\n".join(life.last_words(rank) for rank in range(world_size))
    return life


def before_step(what: Callable[[Trainer], None]) -> None:
    """For a hook: have the trainer do this first in each step."""
    train_step = Trainer.train_step

    def do_first(self: Trainer, batches: Iterator[Batch]) -> bool:
        what(self)
        return train_step(self, batches)

    Trainer.train_step = do_first


def signal_at(step: int, number: signal.Signals) -> None:
    """A hook: the trainer gets a signal as this step begins."""
    before_step(lambda trainer: os.kill(os.getpid(), number) if trainer.step == step else None)


def errors(life: Life, rank: int = 0) -> list[str]:
    """Lines of the log that tell of an error, without their time; any other line that is no log line counts too.

    That steps of milliseconds wait for data depends on what else the machine does.
    """
    said = life.output(rank).splitlines()
    lines = [line for line in said if " - INFO - " not in line and "The steps wait for data" not in line]
    return [line.partition(" - root - ")[2] or line for line in lines]


def write_data(path: Path) -> None:
    """Some hundred steps' worth of documents of very different lengths."""
    words = (REPO / "LICENSE").read_text().split()
    draw = random.Random(0)
    documents = [" ".join(draw.choices(words, k=draw.randint(1, 120))) for _ in range(100)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def read_lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, but for a line that is being written or was when the run was killed."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def read_records(folder: Path) -> dict[int, list[Step]]:
    """All that was said of each step: a step after the last checkpoint is trained again after a restart."""
    records = defaultdict(list)
    for line in read_lines(folder):
        if "grad_norm" in line:
            step = Step(
                line["loss_metrics/global_avg_loss"],
                line["grad_norm"],
                line["loss_metrics/global_max_loss"],
                line["n_tokens_seen"],
            )
            records[line["step"]].append(step)
    return dict(records)


def read_steps(folder: Path) -> dict[int, Step]:
    """What was said last of each step."""
    return {step: records[-1] for step, records in read_records(folder).items()}


def last_step(folder: Path) -> int:
    """The step that metrics.jsonl ends with; 0 where there is none yet."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        steps = re.findall(rb'^\{"step": (\d+),', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").glob("*"))


def _next_number(folder: Path) -> int:
    return next(n for n in count() if not folder.with_name(f"{folder.name}-life{n}").exists())


def _live(rank: int, world_size: int, port: int, argv: list[str], log: Path, hook: Hook | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    if world_size > 1:
        os.environ |= get_worker_environment(rank, world_size, port)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    background.START_METHOD = "fork"
    if hook is not None:
        hook()
    sys.exit(torchtitan.train.main(argv))
