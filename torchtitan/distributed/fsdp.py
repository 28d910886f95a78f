"""FSDP2: weights, gradients and optimizer states sharded over the data and context ranks, with mixed precision.

Used wherever there is more than one process, also where a rank has nothing to share (tensor parallel alone), because
it does the mixed precision too: the optimizer sees float32 shards, forward and backward see `param_dtype` copies.
Plain replication is a mesh of n copies of one shard. One process alone does with mixed_precision.py.

Units, each gathered and reduced as a whole: the embedding, each block, the final norm, the output. The output is a
unit of its own with `with_weight` registered as a second forward, so that a fused loss reads a whole weight inside
it, under every reshard policy, and its gradient is reduced once. A tied output has no weight: the embedding's unit
then stays gathered through forward, and is reduced when backward is done, with the gradients of both uses.
"""

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from torchtitan.config.block_modes import BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import ReshardPolicy
from torchtitan.distributed.mesh import Mesh
from torchtitan.protocols.model import Decoder, TiedOutputHead


def apply_fsdp(
    model: Decoder,
    mesh: Mesh,
    parallel_dims: ParallelDims,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_policy: ReshardPolicy = "default",
    block_modes: Sequence[BlockMode] = (),
    cpu_offload: bool = False,
) -> None:
    """Shard `model`, or a pipeline stage of one, in place.

    block_modes has every block of the whole model: those that are "gathered" keep their weights for backward under any
    policy, and the embedding does as the first block.

    Gradients are summed over the ranks, not averaged: the loss is already divided by the global number of tokens.
    """
    data_mesh = mesh["hsdp"] if parallel_dims.dp_replicate > 1 else mesh["dp_shard_cp"]
    offload = CPUOffloadPolicy(pin_memory=data_mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    # Nothing is cast on the way in: activations have param_dtype since the embedding, the rotary table stays float32.
    precision = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    reshard = should_reshard_after_forward(reshard_policy, parallel_dims)
    gathered = {str(number) for number, mode in enumerate(block_modes) if mode == "gathered"}

    def shard(module: nn.Module | None, *, reshard_after_forward: bool) -> None:
        if module is not None:
            fully_shard(
                module,
                mesh=data_mesh,
                reshard_after_forward=reshard_after_forward,
                mp_policy=precision,
                offload_policy=offload,
            )

    is_tied = isinstance(model.output, TiedOutputHead)
    shard(model.tok_embeddings, reshard_after_forward=reshard and "0" not in gathered and not is_tied)
    for number, block in model.layers.items():
        shard(block, reshard_after_forward=reshard and number not in gathered)
    # Backward needs these two at once: gathering them again would save no memory at the peak.
    shard(model.norm, reshard_after_forward=reshard_policy == "always")
    if not is_tied:
        shard(model.output, reshard_after_forward=reshard_policy == "always")
    shard(model, reshard_after_forward=False)
    # torch 2.13 warns of each module that returns a view, as nn.Linear does, lest it be changed in place: none is here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if model.output is not None:
        register_fsdp_forward_method(model.output, "with_weight")
    _prefetch_head(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module, parallel_dims)


def reduce_over_copies(model_parts: Sequence[nn.Module], *, now: bool) -> None:
    """Whether the next backward sums its gradients over HSDP's copies of the weights, or leaves that to a later one.

    Those copies are joined by the slowest links, and the sums of several microbatches need to cross them only once.
    """
    for part in model_parts:
        if isinstance(part, FSDPModule):
            part.set_requires_all_reduce(now)


def should_reshard_after_forward(policy: ReshardPolicy, parallel_dims: ParallelDims) -> bool:
    """Whether the blocks' gathered weights are freed between forward and backward.

    By default they are, except with pipeline parallel, where each microbatch would gather them again.
    """
    if policy == "default":
        return parallel_dims.pp == 1
    return policy == "always"


def _prefetch_head(model: Decoder) -> None:
    """Have the norm and the output gathered while the last block computes.

    The output may run after the model's forward; FSDP by itself would then gather its weight, often the largest, only
    once all blocks are done.
    """
    head = [cast(FSDPModule, part) for part in (model.norm, model.output) if isinstance(part, FSDPModule)]
    for last_block in list(model.layers.values())[-1:]:
        cast(FSDPModule, last_block).set_modules_to_forward_prefetch(head)


def _sum_gradients(module: FSDPModule, parallel_dims: ParallelDims) -> None:
    if parallel_dims.dp_replicate * parallel_dims.fsdp == 1:
        return  # nothing is divided, and asking for it would cost a pass over the gradients
    module.set_gradient_divide_factor(1.0)
    # By plain sums: a factor is otherwise folded into the collective, which gloo cannot do.
    module.set_force_sum_reduction_for_comms(True)
