"""Runs of the real trainer, in real processes, on a tiny model and on global batches that every layout sees alike."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import torchtitan.train
from tests.integration_tests.tiny_sizes import ODD
from tests.processes import FORKED, get_worker_environment
from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.sections import Training

REPO = Path(__file__).parents[2]
SEQ_LEN, GLOBAL_BATCH, STEPS, SEED = 64, 8, 4, 7
NUM_SOURCES = 3
SOURCES = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0])
"""Of each sequence of a global batch. The second step has no label of 1 and 2."""
MIXTURE = "--training.datasets 0=5,1=2,2=1"
EOS = 1  # of tests/assets/tokenizer

# What every run has in common. Learning rates are large, and the layers' weights (tiny_model.py), so that what is wrong
# soon shows in the loss.
OPTIONS = f"""
    --experimental.custom_import tests.integration_tests.tiny_llama3 --model.name tiny_llama3 --model.flavor odd
    --model.tokenizer_path {REPO}/tests/assets/tokenizer
    --training.seed {SEED} --training.steps {STEPS} --training.seq_len {SEQ_LEN}
    --training.global_batch_size {GLOBAL_BATCH} --training.mixed_precision_param float32
    --training.max_norm 0.35 --lr_scheduler.warmup_steps 2 --optimizer.lr 3e-3
    --liger_kernel.implementation native --liger_kernel.logits_memory_budget_mib 1
    --metrics.log_freq 1 --comm.init_timeout_seconds 100
"""


@dataclass(frozen=True)
class Run:
    """One run: how many processes, how many sequences each of them takes at once, and further options."""

    name: str
    world_size: int = 1
    local_batch_size: int = GLOBAL_BATCH
    options: str = ""

    def arguments(self, folder: Path) -> list[str]:
        own = f"--job.dump_folder {folder} --training.local_batch_size {self.local_batch_size} {self.options}"
        return f"{OPTIONS} {own}".split()


@dataclass(frozen=True)
class Step:
    """What a run says of a step."""

    loss: float
    grad_norm: float
    max_loss: float
    """The largest mean over one data rank's tokens."""
    z_loss: float = 0.0
    token_accuracy: float = 0.0
    token_entropy: float = 0.0
    by_source: tuple[float | None, ...] = ()
    """The loss of each dataset of a mixture, where the loss tells it."""


def global_batch(step: int) -> Batch:
    """(GLOBAL_BATCH, SEQ_LEN) tokens and labels; each step ignores others of the labels, never evenly."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(ODD.vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    text[torch.rand(text.shape, generator=generator) < 0.06] = EOS  # which ends a document
    tokens, labels = text[:, :-1], text[:, 1:].clone()
    if step == 0:  # a data rank without a label, where each has half of the batch
        labels[GLOBAL_BATCH // 2 :] = IGNORE_INDEX
        labels[0, : SEQ_LEN // 3] = IGNORE_INDEX
    elif step == 1:  # ... where they take turns
        labels[1::2] = IGNORE_INDEX
        labels[2, SEQ_LEN // 2 + 5 :] = IGNORE_INDEX
    elif step == 2:  # the second half of each sequence: other context ranks and other chunks than the first
        labels[:, SEQ_LEN // 2 :] = IGNORE_INDEX
    elif step == 3:  # few labels, here and there
        labels[torch.rand(labels.shape, generator=generator) < 0.9] = IGNORE_INDEX
    return Batch(tokens, labels, sources=SOURCES)


@dataclass(frozen=True)
class GlobalBatches:
    """A data rank's part of the global batches, microbatch by microbatch; in place of the trainer's data loader."""

    dp_rank: int
    dp_world_size: int
    batch_size: int
    seed: int
    is_mixture: bool
    place = None
    gave_up = False

    def __iter__(self) -> Iterator[Batch]:
        for step in count():
            batch = global_batch(step)
            for rows in torch.arange(GLOBAL_BATCH).view(-1, self.dp_world_size, self.batch_size)[:, self.dp_rank]:
                yield Batch(batch.tokens[rows], batch.labels[rows], sources=SOURCES[rows])

    def get_tokens_by_source(self) -> dict[str, int]:
        return {str(i): 0 for i in range(NUM_SOURCES)} if self.is_mixture else {}

    def close(self) -> None:
        pass


def build_global_batches(
    *, training: Training, dp_rank: int, dp_world_size: int, batch_size: int, seed: int, **_: object
) -> GlobalBatches:
    return GlobalBatches(dp_rank, dp_world_size, batch_size, seed, is_mixture=bool(training.datasets))


Result = list[Step] | Exception
"""The steps of a run, or what ended it."""


def train_all(runs: Sequence[Run], *, on_gpus: bool = False) -> dict[str, Result]:
    """The result of each run, by its name. All have one number of processes, and share them while none fails.

    A run in which a process aborts gets a second try: gloo of torch 2.13 has been seen to do that on a CPU, once in
    some hundred runs. What a layout does wrong it does every time.
    """
    results: dict[str, Result] = {}
    aborted: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        while remaining := [run for run in runs if run.name not in results]:
            stores = [serve_store() for _ in remaining]
            ports = [store.port for store in stores]
            failure: Exception | None = None
            try:
                start(_work, remaining[0].world_size, remaining, folder, ports, on_gpus)
            except Exception as error:
                failure = error
            for run in remaining:
                if not all(_end_file(folder, run, rank).exists() for rank in range(run.world_size)):
                    assert failure is not None
                    is_abort = isinstance(failure, mp.ProcessExitedException) and failure.signal_name == "SIGABRT"
                    if is_abort and run.name not in aborted:
                        aborted.add(run.name)
                        shutil.rmtree(Path(folder, run.name))
                    else:
                        results[run.name] = failure
                    break
                lines = Path(folder, run.name, "metrics.jsonl").read_text().splitlines()
                results[run.name] = [_to_step(line) for line in lines]
    return results


def _end_file(folder: str, run: Run, rank: int) -> Path:
    """Made by a rank when it has ended the run."""
    return Path(folder, run.name, f"ended{rank}")


def start(worker: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run worker(rank, *args) in this many processes, to their end."""
    mp.start_processes(worker, args, world_size, start_method=FORKED.get_start_method())


def serve_store() -> dist.TCPStore:
    """Where the workers of one run meet: as under torchrun, at a store of their parent."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def _to_step(line: str) -> Step:
    values = json.loads(line)
    names = ("global_avg_loss", "global_max_loss", "z_loss", "token_accuracy", "token_entropy")
    loss, *others = (values.get(f"loss_metrics/{name}", 0.0) for name in names)
    by_source = tuple(values.get(f"loss_metrics/global_avg_loss/{i}") for i in range(NUM_SOURCES))
    return Step(loss, values["grad_norm"], *others, by_source)


def _work(rank: int, runs: Sequence[Run], folder: str, ports: Sequence[int], on_gpus: bool) -> None:
    torchtitan.train.build_dataloader = build_global_batches
    for run, port in zip(runs, ports, strict=True):
        become_worker(rank, run.world_size, port, on_gpus=on_gpus)
        torch._dynamo.reset()
        # Tracing is what parallelism can break; on a CPU code generation is slow, and runs of one process have it.
        backend = "inductor" if on_gpus or run.world_size == 1 else "aot_eager"
        with patch("torch.compile", partial(torch.compile, backend=backend)):
            status = torchtitan.train.main(run.arguments(Path(folder, run.name)))
        assert status == 0, f"{run.name}: exit status {status}"
        _end_file(folder, run, rank).touch()


def join_group(rank: int, world_size: int, port: int, *, on_gpus: bool) -> torch.device:
    """Become a worker, and one of a process group; the device of its tensors."""
    become_worker(rank, world_size, port, on_gpus=on_gpus)
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    return device


def become_worker(rank: int, world_size: int, port: int, *, on_gpus: bool = False) -> None:
    """Look like a worker of torchrun whose agent has its store at `port`; see no GPU unless asked to."""
    os.environ |= get_worker_environment(rank, world_size, port) | {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
