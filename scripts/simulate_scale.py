"""What checkpoints cost at scale, without GPUs: the table of docs/parallelism.md, and a measurement.

    python scripts/simulate_scale.py                            # the table, in minutes
    python scripts/simulate_scale.py --measure 405b 512         # a save's bookkeeping on the first rank, steps with it

The model is built on the meta device and divided by the code that divides it in a run, over a process group of N ranks
that can communicate nothing; then ranks plan by the code that plans (checkpoint/plan.py), and the first one makes
.metadata by the code that makes it. Only what would take the disk is left out: the tensors' bytes. Where N is large,
the size of .metadata is that of 64 ranks by the number of its entries. Bytes are of one rank, the first.
"""

import argparse
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.checkpoint.background import WriterProcess
from torchtitan.checkpoint.plan import Planner, Shard, get_box
from torchtitan.checkpoint.ranks import FAN_OUT, Ranks
from torchtitan.checkpoint.write import Digest, make_metadata, pack_table
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.degrees import ParallelDims
from torchtitan.distributed.mesh import build_mesh
from torchtitan.protocols.train_spec import get_run_args, get_train_spec
from torchtitan.tools.gc import GarbageCollection
from torchtitan.tools.logging import logger

CONFIGS = Path(__file__).resolve().parents[1] / "torchtitan/models/llama3/train_configs"
DOCUMENTED = (("8b", 8), ("8b", 512), ("70b", 512), ("70b", 4096), ("405b", 512), ("405b", 4096))
PER_ENTRY = 1560
"""Bytes in a rank's file beside those of a tensor."""
ALL_BUILT = 64
"""Ranks up to which .metadata is made, not estimated."""
LATER_SAVES = 40
"""Beside which steps are counted."""


class Scale(NamedTuple):
    """Of one rank, the first."""

    sockets: int
    bytes_written: int
    bytes_read: int
    files_read: int
    metadata_bytes: int


class Simulation:
    """A run's state as each of its ranks sees it, one after the other."""

    def __init__(self, config: JobConfig, num_ranks: int):
        self.num_ranks = num_ranks
        self.dims = ParallelDims.from_config(config.parallelism, num_ranks)
        mesh = build_mesh(self.dims, "cpu")
        args = get_run_args(config.model, max_seq_len=config.max_seq_len)
        code = get_train_spec(config.model.name).load()
        with torch.device("meta"):
            model = code.model_cls(replace(args, n_layers=1))
        code.parallelize_fn(
            model,
            mesh=mesh,
            parallel_dims=self.dims,
            parallelism=replace(config.parallelism, enable_async_tensor_parallel=False),
            training=replace(config.training, compile=False),
            block_modes=["none"],
            loss_parallel=True,
        )
        weights: dict[str, Any] = model.state_dict()
        self._meshes = [weight.device_mesh for weight in weights.values()]
        self.state: dict[str, Tensor] = {}
        for name, weight in weights.items():  # all layers are as the first one
            for layer in range(args.n_layers if name.startswith("layers.") else 1):
                key = name.replace("layers.0.", f"layers.{layer}.")
                for part in (key, f"optimizer.state.{key}.exp_avg", f"optimizer.state.{key}.exp_avg_sq"):
                    self.state[part] = weight

    def plan(self, rank: int) -> tuple[Shard, ...]:
        for mesh in self._meshes:
            shard, tp = divmod(rank, self.dims.tp)  # the shipped files have no other axes
            mesh._coordinate_on_dim = tuple(tp if axis == "tp" else shard for axis in mesh.mesh_dim_names)
        return Planner(Ranks(alone=True)).plan(self.state).shards

    def table(self, rank: int) -> list[tuple[Any, ...]]:
        """As a writer gives it."""
        rows: list[tuple[Any, ...]] = []
        end = 0
        for shard in self.plan(rank):
            size = prod(shard.sizes) * shard.dtype.itemsize + PER_ENTRY
            rows.append((*shard, end, size))
            end += size
        return rows


@contextmanager
def simulated(model: str, num_ranks: int) -> Iterator[Simulation]:
    logger.disabled = True  # it would tell how the model is divided
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield Simulation(
            ConfigManager().parse_args(["--job.config_file", str(CONFIGS / f"llama3_{model}.toml")]), num_ranks
        )
    finally:
        dist.destroy_process_group()
        logger.disabled = False


def get_scale(model: str, num_ranks: int) -> Scale:
    built = min(num_ranks, ALL_BUILT)
    with simulated(model, built) as small:
        tables = [small.table(rank) for rank in range(built)]
        per_entry = len(pickle.dumps(make_metadata(_names(built), tables))) / sum(map(len, tables))
    with simulated(model, num_ranks) as run:
        tables = [run.table(rank) for rank in range(run.dims.tp)]  # which have what the first one may read
        writers = {(row[0], row[3]): rank for rank, table in reversed([*enumerate(tables)]) for row in table}
        run.plan(0)
        boxes = {key: get_box(tensor) for key, tensor in run.state.items()}
        return Scale(
            sockets=min(FAN_OUT, num_ranks - 1) + 1 + (num_ranks > 1),
            bytes_written=sum(row[-1] for row in tables[0]),
            bytes_read=sum(
                prod(sizes) * run.state[key].element_size() + PER_ENTRY for key, (_, sizes) in boxes.items()
            ),
            files_read=len({writers[key, offsets] for key, (offsets, _) in boxes.items()} | {0}),
            metadata_bytes=round(per_entry * sum(map(len, tables)) * num_ranks / len(tables)),
        )


def get_table() -> str:
    lines = [
        "| model | GPUs | sockets | written, GB | read, GB | files read | `.metadata`, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(get_row(model, num_ranks) for model, num_ranks in DOCUMENTED)])


def get_row(model: str, num_ranks: int) -> str:
    scale = get_scale(model, num_ranks)
    gb = f"{scale.bytes_written / 1e9:.2f} | {scale.bytes_read / 1e9:.2f}"
    mb = f"{scale.metadata_bytes / 1e6:.{1 if scale.metadata_bytes < 1e7 else 0}f}"
    return f"| {model.upper()} | {num_ranks} | {scale.sockets} | {gb} | {scale.files_read} | {mb} |"


def measure(model: str, num_ranks: int) -> dict[str, float]:
    """Of the bookkeeping of a first and of later saves on the first rank, in a thread as beside the training.

    Seconds; the trainer's CPU time in them; and how many steps of small kernels, which the main thread launches one by
    one, there were beside it to a second of the process's CPU time, over those between two saves. (Of CPU time, since
    that leaves out what else the machine does; the two threads wait for each other by Python's lock.)
    """
    torch.set_num_threads(1)
    GarbageCollection(gc_freq=50)  # off, as in a run: a full collection takes as long as all that is measured here
    with simulated(model, num_ranks) as run, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        packed = [pack_table(run.table(rank)) for rank in range(num_ranks)]
        run.plan(0)
        planner, process = Planner(Ranks(alone=True)), WriterProcess()
        files = [Digest(name, 0, digest) for name, (digest, _) in zip(_names(num_ranks), packed, strict=True)]
        tables = [table for _, table in packed]
        for name in _names(num_ranks):
            Path(folder, name).touch()
        process.call("write_metadata", Path(folder), [], [])  # it has started

        def save() -> tuple[float, float]:
            begin, used = time.perf_counter(), time.thread_time()
            planner.plan(run.state)
            if not process.call("write_metadata", Path(folder), files, None):
                process.call("write_metadata", Path(folder), files, tables)
            return time.perf_counter() - begin, time.thread_time() - used

        seconds, of_trainer, beside, between = [], [], [], []
        for _ in range(1 + LATER_SAVES):
            saving = thread.submit(save)
            beside.append(run_steps(saving.done))
            seconds.append(saving.result()[0])
            of_trainer.append(saving.result()[1])
            end = time.perf_counter() + seconds[-1]
            between.append(run_steps(lambda end=end: time.perf_counter() > end))  # type: ignore[misc]
        process.close()
        result = {"metadata_mb": float(round(Path(folder, ".metadata").stat().st_size / 1e6))}
        for save_name, of in (("first", slice(1)), ("later", slice(1, None))):
            result[f"{save_name}_s"] = round(statistics.median(seconds[of]), 2)
            result[f"{save_name}_of_trainer_ms"] = round(1e3 * statistics.median(of_trainer[of]), 1)
            steps = [statistics.fmean(chain(*lists[of])) for lists in (between, beside)]
            result[f"{save_name}_speed_beside"] = round(steps[0] / steps[1], 3)
        return result


def run_steps(is_over: Callable[[], bool]) -> list[float]:
    """CPU seconds of each until then: some 20 ms, several times as long as a thread may keep Python's lock."""
    seconds, x = list[float](), torch.ones(32, 32) / 32
    while not is_over() or not seconds:
        begin = time.process_time()
        for _ in range(5000):
            x = torch.tanh(x @ x)
        seconds.append(time.process_time() - begin)
    return seconds


def _names(num_ranks: int) -> list[str]:
    return [f"__{rank}_0.distcp" for rank in range(num_ranks)]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "GPUS"), help="8b, 70b or 405b, and a number")
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
    else:
        print(get_table())


if __name__ == "__main__":  # the writing process imports this file too
    main(sys.argv[1:])
