"""Activation checkpointing: a block's activations are recomputed in backward instead of kept from forward.

Each block's `forward` is wrapped, not the block, so parameter names stay.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.protocols.model import Decoder

ContextFn = Callable[[], tuple[Any, Any]]


def apply_ac(
    model: Decoder,
    config: ActivationCheckpoint,
    *,
    kept_products: Sequence[bool] = (True, False),
    keep_cpu_attention: bool = False,
) -> None:
    """Checkpoint the blocks of `model` in place, as [activation_checkpoint] says.

    kept_products tells, for a block's matrix products in their order, whether "op" keeps the result; it repeats.
    keep_cpu_attention exempts attention on a CPU from recomputation. torch 2.13 cannot recompute it in a compiled
    block of DTensors: it counts attention among the random operations, whose saved state it then confuses with a mesh.
    """
    if config.mode == "none":
        return
    context_fn: ContextFn | None = _keep_cpu_attention if keep_cpu_attention else None
    every_nth = 1
    if config.mode == "selective" and config.selective_ac_option == "op":
        context_fn = functools.partial(_keep_costly_ops, tuple(kept_products))
    elif config.mode == "selective":
        every_nth = int(config.selective_ac_option)
    for number, block in enumerate(model.layers.values(), start=1):
        if number % every_nth == 0:
            block.forward = _checkpointed(block.forward, context_fn)


def _checkpointed(forward: Callable[..., Any], context_fn: ContextFn | None) -> Callable[..., Any]:
    options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}

    @functools.wraps(forward)
    def checkpointed_forward(*args: Any) -> Any:
        # No block draws random numbers, so their state need not be restored.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return checkpointed_forward


def _keep_cpu_attention() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts([torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default])


def _keep_costly_ops(kept_products: Sequence[bool]) -> tuple[Any, Any]:
    """Keep what is dear to recompute for its size: attention, what came over the network, and the products named."""
    num_products = {False: 0, True: 0}  # by "is this the recomputation"

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op == torch.ops.aten.mm.default:
            keep = kept_products[num_products[ctx.is_recompute] % len(kept_products)]
            num_products[ctx.is_recompute] += 1
        else:
            keep = op in _costly_ops()
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@functools.cache
def _costly_ops() -> frozenset[Any]:
    aten, collectives = torch.ops.aten, torch.ops._c10d_functional
    return frozenset(
        {
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._efficient_attention_forward.default,  # context parallelism's, in float32
            collectives.reduce_scatter_tensor.default,
            collectives.all_gather_into_tensor.default,
        }
    )
