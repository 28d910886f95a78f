"""The process group, seeds, reductions over a mesh axis, and clipping. In the workers nothing else reads
the environment.
"""

import atexit
import datetime
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Comm
from torchtitan.distributed.mesh import Mesh
from torchtitan.tools.device import get_device_type
from torchtitan.tools.logging import logger
from torchtitan.tools.owner import own_folder

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class World:
    """Who this process is among those that torchrun started; alone where it started none."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    restart_count: int
    """How often torchrun has started these processes again after a failure; by its count on this machine."""
    out_of_memory_count: int | None = None
    """How many of those starts were for memory that ran out; None where no launcher of ours would start again."""


def get_world() -> World:
    """Read torchrun's variables, and the launcher's."""
    out_of_memory_count = os.environ.get("TORCHTITAN_OUT_OF_MEMORY_COUNT")
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        restart_count=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        out_of_memory_count=None if out_of_memory_count is None else int(out_of_memory_count),
    )


def get_progress_rank() -> int | None:
    """The local rank whose progress line the launcher shows on its terminal; None where it has no terminal."""
    rank = os.environ.get("TORCHTITAN_PROGRESS_RANK")
    return None if rank is None else int(rank)


def tells_all() -> bool:
    """Whether this rank logs more than warnings: the first one, and those that LOG_RANK names besides each machine's
    first.
    """
    world, shown = get_world(), os.environ.get("TORCHTITAN_LOG_RANK", "").split(",")
    return world.rank == 0 or (world.local_rank > 0 and str(world.local_rank) in shown)


def check_gpus() -> None:
    """Raise ConfigError where this machine has GPUs, by the launcher's count, and torch cannot use them."""
    num_gpus = int(os.environ.get("TORCHTITAN_NUM_GPUS", "0"))
    if num_gpus > 0 and not torch.cuda.is_available():
        raise ConfigError(
            f"this machine has {num_gpus} GPU{'s' * (num_gpus > 1)}, and torch {torch.__version__} cannot use them;"
            " install a torch that fits their driver, or hide them with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def init_distributed(
    comm: Comm, *, dump_folder: str, enable_cpu_offload: bool = False, device_type: str | None = None
) -> torch.device:
    """Start the process group, and return this process's device: its GPU where there are any.

    The first rank owns the output folder from here on; ConfigError where another run does.
    """
    world = get_world()
    if dump_folder and world.rank == 0:
        own_folder(Path(dump_folder), job=os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", ""))
    device_type = device_type or get_device_type()
    device = torch.device(device_type, world.local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        _enable_flight_recorder(comm, Path(dump_folder))
    timeout = datetime.timedelta(seconds=comm.init_timeout_seconds)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # a rank connects to those that it talks to, not to all in every group
    # With CPU offload, weights are gathered on the GPU but norms are summed and checkpoints written on the CPU.
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl" if enable_cpu_offload else "nccl"}[device_type]
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend, timeout=timeout)
    else:  # alone: no address to meet at is needed
        dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)
    return device


def leave_process_group(*, failed: bool) -> None:
    """Not after a failure over NCCL, whose shutdown waits for ranks that know nothing of it: they hear of it, and the
    launcher does, when this process ends.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End as sys.exit does, but without freeing Python's objects: after a failure, which others wait to hear of.

    A thread of gloo's, which outlives destroy_process_group, may still be letting go of a collective's tensors; it
    aborts the process where Python has begun to free its own (torch 2.13).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_of_lost_rank(error: Exception) -> bool:
    """Whether a collective failed, and not this rank itself, nor the start of the group."""
    of_collective = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return of_collective and dist.is_initialized()


def end_after_lost_rank(
    error: Exception, *, step: int = 0, asked_to_stop: Callable[[], bool] = lambda: False
) -> NoReturn:
    """End because another rank has: as the second one to fail, so that the launcher names the first and its words.

    Over NCCL this is not reached: its watchdog aborts the process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked_to_stop():  # already: the launcher may have seen the other rank's end before this one did
        signal.raise_signal(signal.SIGTERM)
    time.sleep(_PATIENCE_S)  # the launcher stops this rank meanwhile, unless the other one hangs
    # without the line of its source code, and advice to read logs
    symptom = re.sub(r"^\[.*?\] |\. This is typically.*", "", str(error).partition("\n")[0])
    logger.error(
        f"LostRankError: a collective of rank {get_world().rank} failed in step {step} ({symptom}): another rank ended"
        " or hangs, or was slower than [comm] allows"
    )
    end_process(1)  # a save in flight would wait for the other rank


def _enable_flight_recorder(comm: Comm, dump_folder: Path) -> None:
    """Record the last collectives, and write them to a file when one times out."""
    if comm.trace_buf_size == 0:
        return
    folder = dump_folder / comm.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = f"{folder}/rank_"


def set_pg_timeouts(seconds: int, mesh: Mesh, device: torch.device) -> None:
    """Change the time-out of every group's collectives: long while all start up, short once they keep pace.

    A mesh's groups begin with torch's own.
    """
    # All ranks must have finished what ran under the old time-out.
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for group in [*mesh.get_groups(), None]:  # None is the group of all ranks
        _set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def set_determinism(seed: int | None, device: torch.device, *, deterministic: bool = False) -> int:
    """Seed torch, the same on all ranks, and return the seed; where it is None, rank 0 draws one.

    `deterministic` also allows only kernels that give the same bits at every run; the others raise.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    chosen = torch.tensor(torch.seed() % 2**31 if seed is None else seed, device=device)
    dist.broadcast(chosen, src=0)
    seed = int(chosen.item())
    torch.manual_seed(seed)
    return seed


def get_start_time() -> str:
    """Rank 0's clock as a name for files of this start, the same on all ranks: 20260131-120059."""
    name = [datetime.datetime.now().strftime("%Y%m%d-%H%M%S")]
    dist.broadcast_object_list(name, src=0)
    return name[0]


def sum_over_world_(values: Tensor) -> Tensor:
    """Sum of a plain tensor over all ranks, in place."""
    dist.all_reduce(values)
    return values


def sum_each_over_world(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums of numbers, () each, over all ranks, which have the same names: one reduction, none without names."""
    return dict(zip(values, sum_over_world_(torch.stack([*values.values()])).tolist(), strict=True)) if values else {}


def dist_sum(value: Tensor, axis: DeviceMesh) -> Tensor:
    """Sum over the ranks of a one-dimensional mesh, as a new tensor on the device."""
    return _all_reduce(value, dist.ReduceOp.SUM, axis)


def dist_max(value: Tensor, axis: DeviceMesh) -> Tensor:
    """Maximum over the ranks of a one-dimensional mesh, as a new tensor on the device."""
    return _all_reduce(value, dist.ReduceOp.MAX, axis)


def _all_reduce(value: Tensor, op: dist.ReduceOp.RedOpType, axis: DeviceMesh) -> Tensor:
    result = value.detach().clone()
    if axis.size() > 1:  # NCCL would make a communicator of one rank
        dist.all_reduce(result, op, axis.get_group())
    return result


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of it; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What the gradients are to be multiplied by so that their norm is at most max_norm; no host sync."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def get_total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients, or all weights, of all ranks, float32, in one all-reduce over the world.

    A tensor that r ranks hold alike counts for 1 / r on each of them; so shards, copies and
    other ranks' pipeline stages add up in one sum, whichever mesh each of them lives on.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_copies[_num_copies(tensor)].append(local_tensor(tensor))
    square = sum(_square(local) / n for n, local in by_copies.items())
    assert isinstance(square, Tensor), "this rank has none of them"
    dist.all_reduce(square)
    return square.sqrt().float()


def _square(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements. On a CPU in float64: torch adds them up one by one there, and in float32 is
    1e-5 off after some ten thousand of them.
    """
    dtype = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square().sum()


def _num_copies(tensor: Tensor) -> int:
    """How many ranks hold this very shard."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    assert not any(isinstance(placement, Partial) for placement in tensor.placements), "a gradient was not reduced"
    axes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in axes if isinstance(placement, Replicate))
