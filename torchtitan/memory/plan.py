"""What a start says about memory, and the choice of recomputation that activation_checkpoint.mode = "auto" makes.

The choice begins with the fastest way, every block keeps all, and its weights as FSDP gathered them. It makes one block
after the other leaner until the estimated peak fits: first all of them gather their weights again, then they keep only
the costly results, then, if need be, only attention's, and at last they are recomputed whole. So what is cheap to do
again for its size goes first. Earlier blocks become leaner first,
since they wait longest for their backward. Each pipeline rank chooses for its own blocks, by its own peak.
"""

import gc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from torchtitan.config.block_modes import BLOCK_MODES, BlockMode, describe_block_modes, get_block_modes
from torchtitan.config.errors import ConfigError, RecomputeMoreError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.pipeline_split import ZERO_BUBBLE
from torchtitan.distributed.activation_checkpoint import set_block_modes
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.utils import World
from torchtitan.memory.advice import list_remedies
from torchtitan.memory.estimate import GIB, MemoryModel, describe
from torchtitan.memory.measure import is_one_process
from torchtitan.protocols.model import Decoder
from torchtitan.protocols.train_spec import get_run_args
from torchtitan.tools.device import DeviceMemoryMonitor, get_host_memory, get_memory_held_by_others
from torchtitan.tools.logging import logger

T = TypeVar("T")
BlockModes = tuple[BlockMode, ...]

LARGE_SHARE = 0.05
"""Of the device's memory: where the standard loss takes as much of the peak, the log says so."""

LEANER = 0.95
"""Of the estimated peak that was too much, where the next choice must stay; the estimate is as exact."""


NUM_FREE_STARTS = 2
"""Steps of a start that are not worth a checkpoint: the second is the first with the optimizer's states."""


@dataclass
class MemoryPlan:
    """How each block of a run is recomputed, by its number in the model, and what follows if that was too much."""

    block_modes: BlockModes
    choose: Callable[[float], BlockModes] | None = None
    """Gives the modes within so many bytes; None where there is no choice."""
    peak: float = 0
    """The estimate for block_modes, in bytes."""
    by_restart: bool = False
    """Another choice takes another start. With several ranks those that have enough memory wait in a collective for the
    one that has not, and what FSDP holds in the middle of a step cannot be taken back.
    """
    saves: bool = False
    """There are checkpoints, from which another start goes on."""
    num_steps: int = 0

    def run(self, forward_backward: Callable[[], T], model_parts: Sequence[Decoder]) -> T:
        """Call `forward_backward`, which drops the gradients first; again with leaner blocks if its memory runs out.

        Nothing is lost by that, since weights change only afterwards.

        Raises:
            torch.OutOfMemoryError: the recomputation was not left to "auto", is the leanest, or a start over would lose
                more than the first steps.
            RecomputeMoreError: the launcher is to start all ranks again, which then choose a leaner one.
        """
        self.num_steps += 1
        while True:
            try:
                return forward_backward()
            except torch.OutOfMemoryError as error:
                self.peak *= LEANER
                leaner = self.choose(self.peak) if self.choose else self.block_modes
                loses_much = self.by_restart and not self.saves and self.num_steps > NUM_FREE_STARTS
                if leaner == self.block_modes or loses_much:
                    raise
                if self.by_restart:
                    modes = describe_block_modes(leaner)
                    raise RecomputeMoreError(f"{str(error).strip()}; all ranks start again, where {modes}") from None
            # not above, where the error still holds what was kept for backward
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.block_modes = leaner
            for part in model_parts:
                set_block_modes(part, leaner)
            logger.warning(f"Out of memory: this step again, and from now on {describe_block_modes(leaner)}")


def plan_memory(config: JobConfig, *, world: World, mesh: Mesh, device: torch.device) -> MemoryPlan:
    """Say what the run will need of the device, and choose the recomputation; a collective call.

    On a CPU, whose memory also holds the program, nothing is said unless the recomputation is to be chosen.

    Raises:
        ConfigError: the mode is "auto", and the model fits in no way, or its memory cannot be estimated; or what is to
            wait in the machine's memory does not fit there.
    """
    options = config.activation_checkpoint
    unchosen = get_block_modes(options, get_run_args(config.model, max_seq_len=config.max_seq_len).n_layers)
    monitor = DeviceMemoryMonitor(device)
    logger.info(f"{monitor.name} capacity: {monitor.capacity / GIB:.2f}GiB memory")
    if device.type == "cpu" and options.mode != "auto":
        return MemoryPlan(unchosen)
    try:
        model = MemoryModel(config, world_size=world.size, mesh=mesh)
    except Exception as error:  # a model from outside may use what the meta device lacks: no reason not to train
        cannot = f"The peak memory cannot be estimated for {config.model.title}: {error}"
        if options.mode == "auto":
            raise ConfigError(f"{cannot}; use another activation_checkpoint.mode than auto") from error
        logger.warning(cannot)
        return MemoryPlan(unchosen)

    capacity = monitor.capacity // (world.local_size if device.type == "cpu" else 1)
    budget = _get_budget(config, capacity, device)
    choose = partial(choose_block_modes, config, model)
    block_modes = choose(budget)
    estimate = model.estimate(block_modes)
    for _ in range(_get_most(world.out_of_memory_count or 0, device)):  # as MemoryPlan.run chooses
        block_modes = choose(estimate.peak * LEANER)
        estimate = model.estimate(block_modes)
    logger.info(describe(estimate, capacity=capacity))
    _check_host_memory(config, estimate.host * world.local_size)
    if options.mode == "auto":
        if estimate.peak > budget:
            raise ConfigError(_explain_misfit(config, estimate.peak, budget, capacity, world, mesh))
        logger.info(
            f"activation_checkpoint.mode=auto: {describe_block_modes(block_modes)}; estimated peak"
            f" {estimate.peak / GIB:.1f} GiB, {(budget - estimate.peak) / GIB:.1f} left of {budget / GIB:.1f}"
        )
    loss = estimate.parts["loss"]
    may_fuse = not config.liger_kernel.enable_fused_linear_cross_entropy and model.dims.pp == 1
    if may_fuse and loss > LARGE_SHARE * capacity:
        logger.info(
            f"The logits of each microbatch take about {loss / GIB:.1f} GiB of the peak, {100 * loss / capacity:.0f}%"
            " of this device's memory; --liger_kernel.enable_fused_linear_cross_entropy trains without them"
        )
    by_restart = not is_one_process(config, model.dims)
    return MemoryPlan(
        block_modes,
        choose if not by_restart or world.out_of_memory_count is not None else None,
        estimate.peak,
        by_restart=by_restart,
        saves=config.checkpoint.enable_checkpoint and not config.checkpoint.load_only,
    )


def choose_block_modes(config: JobConfig, model: MemoryModel, budget: float) -> BlockModes:
    """As the options say; for "auto" the fastest whose estimated peak is within `budget` bytes, or else the leanest."""
    if config.activation_checkpoint.mode != "auto":
        return get_block_modes(config.activation_checkpoint, model.n_layers)
    may_stay_gathered = _may_stay_gathered(config, model)
    fastest, *leaner = (mode for mode in BLOCK_MODES if mode != "gathered" or may_stay_gathered)
    if model.dims.pp > 1 and config.parallelism.pipeline_parallel_schedule in ZERO_BUBBLE:
        leaner = ["full"]  # they cannot run the others: config/validate.py
    chosen = [fastest] * model.n_layers
    for rank in range(model.dims.pp):
        for mode, block in itertools.product(leaner, model.get_blocks(rank)):
            if model.estimate_rank(rank, chosen).peak <= budget:
                break
            chosen[block] = mode
    return tuple(chosen)


def _may_stay_gathered(config: JobConfig, model: MemoryModel) -> bool:
    """Where each block's weights would be gathered again for backward, and no option says so; pipelines never do."""
    is_left_open = config.parallelism.fsdp_reshard_after_forward == "default"
    return is_left_open and model.dims.pp == 1 and not is_one_process(config, model.dims)


def _get_budget(config: JobConfig, capacity: int, device: torch.device) -> int:
    """Bytes that this process may use, the same on all ranks: those of the rank that has the fewest.

    Deterministic runs do not look at what other processes hold, so that a resume chooses alike.
    """
    budget = config.activation_checkpoint.memory_share * capacity
    if not config.training.deterministic:
        budget -= get_memory_held_by_others(device)
    return -_get_most(-int(budget), device)


def _get_most(value: int, device: torch.device) -> int:
    """The largest of all ranks."""
    most = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())


def _check_host_memory(config: JobConfig, needed: int) -> None:
    available = get_host_memory()
    if needed > available:
        option = (
            "activation_checkpoint.offload" if config.activation_checkpoint.offload else "training.enable_cpu_offload"
        )
        raise ConfigError(
            f"{option} needs {needed / GIB:.1f} GiB of this machine's memory for its processes, which has"
            f" {available / GIB:.1f}; use shorter sequences, or leave it off"
        )


def _explain_misfit(config: JobConfig, peak: int, budget: int, capacity: int, world: World, mesh: Mesh) -> str:
    share = config.activation_checkpoint.memory_share
    needed_share = math.ceil(100 * (share + (peak - budget) / capacity)) / 100
    lines = [
        f"activation_checkpoint.mode=auto: {config.model.title} does not fit, however much is"
        f" recomputed: {(peak - budget) / GIB:.1f} GiB are missing of the {peak / GIB:.1f} that it needs, where"
        f" activation_checkpoint.memory_share={share} of {capacity / GIB:.1f} GiB and other processes"
        f" leave {budget / GIB:.1f}"
    ]
    if needed_share <= 1:
        lines.append(f"activation_checkpoint.memory_share={needed_share} would let it try")
    return "\n".join([*lines, *list_remedies(config, world_size=world.size, mesh=mesh)])
