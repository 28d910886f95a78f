"""torch.compile, block by block: all blocks run the same code, so one compilation serves them all."""

import torch

from torchtitan.protocols.model import Decoder


def apply_compile(model: Decoder) -> None:
    """Compile the forward of each block of `model` in place, each as one graph; parameter names stay.

    The forward and not the block is compiled, so that FSDP's hooks, which run around it, stay outside the graph.
    """
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, fullgraph=True)
