"""Tensor parallel with sequence parallel: each matrix is split over the tp ranks, and so is the sequence between them.

A block's input, its norms and its residual sums hold S / tp positions on each rank; before attention and before the
feed-forward the sequence is gathered, and after each it is reduce-scattered, so that a block moves
2 x (all-gather + reduce-scatter) of (B, S, D) in forward and the same in backward.
The final norm's output is a DTensor with the sequence sharded: the output projection takes it from there, and so
does a fused loss, which gathers it once.
"""

from collections.abc import Mapping

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.protocols.model import Decoder

SEQUENCE = Shard(1)
"""How hidden states (B, S, D) lie between blocks."""
IN_A_ROW = Shard(0)
"""The same parts, taken for those of a (B * tp, S / tp, D): in this order they are gathered as they lie."""


def apply_tp(
    model: Decoder, tp_mesh: DeviceMesh, block_plan: Mapping[str, ParallelStyle], *, loss_parallel: bool
) -> None:
    """Split `model`, or a pipeline stage of one, in place; each block as its plan says, by name of module it may have.

    With loss_parallel the logits are a DTensor with the vocabulary sharded, which the loss must understand;
    without, each rank gets all of them as a plain tensor.
    """
    parts: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(
            input_layouts=SEQUENCE,
            output_layouts=Shard(-1) if loss_parallel else Replicate(),
            use_local_output=not loss_parallel,
        ),
    }
    present = {name: style for name, style in parts.items() if getattr(model, name) is not None}
    parallelize_module(model, tp_mesh, present)
    for layer in model.layers.values():
        names = dict(layer.named_modules())
        parallelize_module(layer, tp_mesh, {name: style for name, style in block_plan.items() if name in names})
    if model.tok_embeddings is not None:
        # What comes out of a collective is an AsyncCollectiveTensor, and one that enters a compiled block loses its
        # gradient without a word (torch 2.13). Any operation that is not a view waits for it; the copy is small.
        model.tok_embeddings.register_forward_hook(lambda module, args, output: output.clone())


def gathered_sequence(*layouts: Shard | None) -> PrepareModuleInput:
    """Inputs with a layout are gathered; None passes as it is."""
    return PrepareModuleInput(
        input_layouts=layouts,
        desired_input_layouts=tuple(None if layout is None else Replicate() for layout in layouts),
    )
