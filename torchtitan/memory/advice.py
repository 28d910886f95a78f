"""What to tell the user when the GPU's memory did not suffice: what took it, and which options would free how much.

The numbers behind the options are estimates (estimate.py) of the same run with that option changed.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from torchtitan.config.block_modes import SELECTIVE_MODES, BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig
from torchtitan.distributed.mesh import Mesh
from torchtitan.memory.estimate import GIB, describe, estimate_memory
from torchtitan.protocols.train_spec import validate_run
from torchtitan.tools.packages import is_liger_installed

_ON_CPU = "DefaultCPUAllocator: can't allocate memory"
_SMALL_BUDGET_MIB = 256
_WORTH_NAMING = 0.01
"""Share of the peak that an option must free."""


class Remedy(NamedTuple):
    """One change that needs less memory."""

    freed: int
    """Bytes of the estimated peak."""
    peak: int
    """The estimated peak afterwards, in bytes."""
    text: str
    """The flags, or what to do."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory or the machine's did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or _ON_CPU in str(error)


def explain_out_of_memory(
    config: JobConfig,
    error: Exception,
    *,
    world_size: int,
    mesh: Mesh | None = None,
    block_modes: Sequence[BlockMode] | None = None,
) -> str:
    """The message for the user.

    Args:
        error: torch's, which says what was asked for, in use and reserved at that moment.
        mesh: that of the run; None only where no process group exists.
        block_modes: as the run recomputes, if it has got so far.
    """
    if _ON_CPU in str(error):
        return (
            f"OutOfMemoryError: the machine's memory does not suffice: {error}. Use a smaller training.local_batch_size"
            " or training.seq_len, a smaller model.flavor, or a GPU"
        )
    told = f"OutOfMemoryError: {str(error).split(' If reserved but')[0].strip()}"
    try:
        estimate = estimate_memory(config, world_size=world_size, mesh=mesh, block_modes=block_modes)
        remedies = list_remedies(config, world_size=world_size, mesh=mesh, block_modes=block_modes)
    except Exception:  # the estimate may not know the model, or the error may have come before there was a mesh
        return told
    moment = f"{describe(estimate)}; most is in use at this moment: {estimate.worst_moment.name}."
    return "\n".join([told, moment, *remedies])


def list_remedies(
    config: JobConfig, *, world_size: int, mesh: Mesh | None = None, block_modes: Sequence[BlockMode] | None = None
) -> list[str]:
    """Lines for the user."""
    remedies = get_remedies(config, world_size=world_size, mesh=mesh, block_modes=block_modes)
    if not remedies:
        return ["No option frees much of it: the model needs more GPUs, or GPUs with more memory."]
    return [
        "What frees how much of it, by the same estimate, each alone:",
        *(f"  {r.freed / GIB:6.1f} GiB, leaving {r.peak / GIB:.1f}:  {r.text}" for r in remedies),
    ]


def get_remedies(
    config: JobConfig, *, world_size: int, mesh: Mesh | None = None, block_modes: Sequence[BlockMode] | None = None
) -> list[Remedy]:
    """The changes that free something, most first. Under "auto" without block_modes: of the leanest."""
    liger_installed = is_liger_installed()
    peak = estimate_memory(config, world_size=world_size, mesh=mesh, block_modes=block_modes).peak
    remedies = []
    for text, changed, ranks in _changes(config, world_size, liger_installed):
        try:
            validate_run(changed, world_size=ranks, liger_installed=liger_installed)
            stays = changed.activation_checkpoint == config.activation_checkpoint
            modes = block_modes if stays else None
            after = estimate_memory(changed, world_size=ranks, mesh=mesh, block_modes=modes).peak
        except ConfigError:
            continue  # not with this run's other options, or not with its model
        if peak - after >= _WORTH_NAMING * peak:
            remedies.append(Remedy(peak - after, after, text))
    return sorted(remedies, reverse=True)


def _changes(config: JobConfig, world_size: int, liger_installed: bool) -> Iterator[tuple[str, JobConfig, int]]:
    """What may help, if it is not so already: the words for it, the configuration and the number of ranks."""

    def with_flags(**flags: object) -> tuple[str, JobConfig, int]:
        changed = copy.deepcopy(config)
        for name, value in flags.items():
            section, _, field = name.partition("__")
            setattr(getattr(changed, section), field, value)
        words = (
            f"--{name.replace('__', '.')}" + ("" if value is True else f" {value}") for name, value in flags.items()
        )
        return " ".join(words), changed, world_size

    training, validation, liger = config.training, config.validation, config.liger_kernel
    if not liger.enable_fused_linear_cross_entropy:
        native = {} if liger_installed else {"liger_kernel__implementation": "native"}
        yield with_flags(liger_kernel__enable_fused_linear_cross_entropy=True, **native)
    elif liger.logits_memory_budget_mib > _SMALL_BUDGET_MIB:
        yield with_flags(liger_kernel__logits_memory_budget_mib=_SMALL_BUDGET_MIB)
    yield with_flags(training__compile=True)
    for option in SELECTIVE_MODES:
        yield with_flags(activation_checkpoint__mode="selective", activation_checkpoint__selective_ac_option=option)
    yield with_flags(activation_checkpoint__mode="full")
    is_lean = config.activation_checkpoint.mode in ("auto", "full")
    leaner = {} if is_lean else {"activation_checkpoint__mode": "full"}
    yield with_flags(**leaner, activation_checkpoint__offload=True)
    if training.feed_forward_pieces == 1:
        yield with_flags(training__feed_forward_pieces=8)
    if (batch := training.local_batch_size) > 1:
        dims = ParallelDims.from_config(config.parallelism, world_size)
        yield with_flags(
            training__local_batch_size=max(smaller for smaller in range(1, batch) if batch % smaller == 0),
            training__global_batch_size=dims.get_global_batch_size(training),
        )
    if validation.enabled and validation.local_batch_size > 1:
        yield with_flags(validation__local_batch_size=validation.local_batch_size // 2)
    yield with_flags(parallelism__fsdp_reshard_after_forward="always")
    yield with_flags(training__enable_cpu_offload=True)
    _, changed, _ = with_flags(parallelism__data_parallel_shard_degree=-1)
    if training.global_batch_size == -1:
        yield "twice as many GPUs, the weights sharded over them", changed, 2 * world_size
