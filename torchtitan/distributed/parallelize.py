"""A model on many devices: the parallelisms of this package, applied in the order that they need."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor.parallel import ParallelStyle

from torchtitan.config.block_modes import BlockMode, describe_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_context_parallel
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.mixed_precision import apply_mixed_precision
from torchtitan.distributed.tensor_parallel import apply_tp
from torchtitan.protocols.model import Decoder
from torchtitan.tools.logging import logger


def parallelize_decoder(
    model: Decoder,  # on the meta device; also a pipeline stage of the model
    *,
    tensor_parallel_plan: Mapping[str, ParallelStyle],
    kept_results: Collection[str],
    mesh: Mesh,
    parallel_dims: ParallelDims,
    parallelism: Parallelism,
    training: Training,
    block_modes: Sequence[BlockMode],
    loss_parallel: bool,
) -> None:
    """Divide `model` over the mesh, in place.

    Tensor parallel comes first, because FSDP shards what it leaves to a rank. What wraps a block's forward goes from
    the inside out: attention's kernel, checkpointing, compilation, and FSDP's hooks around all.

    Args:
        tensor_parallel_plan: the style of each module of a block.
        kept_results: the modules of a block, by name, whose matrix products recomputation by "op" keeps.
        block_modes: of every block of the whole model.
    """
    if parallel_dims.tp > 1:
        apply_tp(model, mesh["tp"], tensor_parallel_plan, loss_parallel=loss_parallel)
        logger.info("Applied tensor parallel with sequence parallel to the model")
        if parallelism.enable_async_tensor_parallel:
            from torchtitan.distributed.async_tensor_parallel import enable_async_tp  # loads the compiler: 0.6 s

            enable_async_tp(mesh["tp"])
            logger.info("Enabled async tensor parallel")
    if parallel_dims.cp > 1:
        apply_context_parallel(model, mesh["cp"])
        logger.info("Applied context parallel to the model")
    if training.feed_forward_pieces > 1:
        block: Any
        for block in model.layers.values():
            if not hasattr(block, "feed_forward_pieces"):
                raise ConfigError(
                    f"{training.feed_forward_pieces=} needs blocks that run their feed-forward in pieces, as"
                    f" TransformerBlock does, and {type(block).__name__} does not say how many; leave it at 1"
                )
            block.feed_forward_pieces = training.feed_forward_pieces
    keep_cpu_attention = training.compile and parallel_dims.tp > 1 and mesh.device_type == "cpu"
    apply_ac(model, block_modes, kept_results=kept_results, keep_cpu_attention=keep_cpu_attention)
    logger.info(f"Applied activation checkpointing: {describe_block_modes(block_modes)}")
    if training.compile:
        apply_compile(model)
        logger.info("Compiling each TransformerBlock with torch.compile")
    param_dtype = getattr(torch, training.mixed_precision_param)
    if parallel_dims.world_size == 1 and not training.enable_cpu_offload:
        apply_mixed_precision(model, param_dtype)
        logger.info(f"One process: nothing to shard; computing in {training.mixed_precision_param}")
        return
    apply_fsdp(
        model,
        mesh,
        parallel_dims,
        param_dtype=param_dtype,
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        reshard_policy=parallelism.fsdp_reshard_after_forward,
        block_modes=block_modes,
        cpu_offload=training.enable_cpu_offload,
    )
    logger.info("Applied FSDP to the model")
