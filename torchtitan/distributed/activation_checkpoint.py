"""Activation checkpointing: a block's activations are recomputed in backward instead of kept from forward.

Each block's `forward` is wrapped, not the block, so parameter names stay. What recomputation by "op" keeps is named by
module: the operations of a named module run under an annotation of torch.fx.traceback, which eager code and a traced
graph carry alike, so that another product in the block, or one that runs as `_scaled_mm`, changes nothing.
"""

from collections.abc import Callable, Collection, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import traceback
from torch.fx.traceback import annotate
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan.config.block_modes import BlockMode
from torchtitan.protocols.model import Decoder

ContextFn = Callable[[], tuple[Any, Any]]

_KEPT = "torchtitan.kept"
"""What a module's results are marked with."""

_PRODUCTS = {"aten::mm", "aten::_scaled_mm"}
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torchtitan::context_attention",
    "torchtitan::document_attention",
}
_COSTLY_OPS = _ATTENTION | {
    "aten::max",  # what float8 scales by, one number or one a row: to find it again reads a whole tensor
    "aten::amax",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_gather_into_tensor",
}


def apply_ac(
    model: Decoder,
    block_modes: Sequence[BlockMode],
    *,
    kept_results: Collection[str] = (),
    keep_cpu_attention: bool = False,
) -> None:
    """Checkpoint the blocks of `model`, or of a pipeline stage, in place.

    block_modes has every block of the whole model; `set_block_modes` changes them later. That "gathered" keeps weights
    besides is for apply_fsdp.
    kept_results names the modules of a block whose matrix products "op" keeps.
    keep_cpu_attention exempts attention on a CPU from recomputation. torch 2.13 cannot recompute it in a compiled
    block of DTensors: it counts attention among the random operations, whose saved state it then confuses with a mesh.
    """
    options: dict[BlockMode, dict[str, ContextFn]] = {
        "full": {"context_fn": _keep_cpu_attention} if keep_cpu_attention else {},
        "op": {"context_fn": _keep_costly_ops},
        "attention": {"context_fn": _keep_attention},
    }
    block: Any
    for block in model.layers.values():
        for name in kept_results:  # what they compute carries the mark, eagerly and in a compiled block's graph
            kept = block.get_submodule(name)
            kept.forward = MethodType(_marked_forward, kept)
        block.plain_forward = block.forward
        block.forward = MethodType(_forward_by_mode, block)
        block.checkpoint_options = options
    set_block_modes(model, block_modes)


def set_block_modes(model: Decoder, block_modes: Sequence[BlockMode]) -> None:
    """Have the blocks of a model that was given to apply_ac recompute in another way; compiled ones compile anew."""
    block: Any
    for number, block in model.layers.items():
        mode = block_modes[int(number)]
        block.block_mode = "none" if mode == "gathered" else mode


def _forward_by_mode(block: Any, *args: Any) -> Any:
    if block.block_mode == "none":
        return block.plain_forward(*args)
    # No block draws random numbers, so their state need not be restored.
    options = block.checkpoint_options[block.block_mode]
    return checkpoint(block.plain_forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _marked_forward(module: nn.Module, *args: Any) -> Any:
    with annotate({_KEPT: True}):
        return type(module).forward(module, *args)  # the class may have changed since: mixed_precision.py does that


def _keep_cpu_attention() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts([torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default])


def _keep_attention() -> tuple[Any, Any]:
    """Keep what is as small as the block's input, and at long sequences more than half of its arithmetic."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _keep_costly_ops() -> tuple[Any, Any]:
    """Keep what is dear to recompute for its size: attention, what came over the network, the marked products."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_marked = traceback.current_meta.get("custom", {}).get(_KEPT, False)
        keep = op.name() in _COSTLY_OPS or (is_marked and op.name() in _PRODUCTS)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
