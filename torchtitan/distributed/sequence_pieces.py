"""A block's feed-forward, piece by piece of the sequence: its intermediates, wide, exist for one piece only.

It works token by token, so that any cut of the sequence gives the same results. The gradient of a weight is the sum of
the pieces', in the dtype of the computation: in bf16 it is rounded once for each piece.

Under tensor parallelism x is this rank's part of the sequence: each piece of it is gathered with those of the other
ranks, whose results come back in the order of the parts.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_in_pieces(
    module: nn.Module,
    x: Tensor,  # (B, S, D)
    num_pieces: int,
    *,
    is_recomputed: bool,
) -> Tensor:  # (B, S, D)
    """module(x), and in backward of each piece its forward again; whole where the pieces would not be equal.

    is_recomputed: the caller's forward runs again in backward. Compiled, that is a matter of each operation, and goes
    no further than the piece at hand; eager, it would make all pieces' intermediates, were they not recomputed alone.
    """
    if num_pieces == 1 or x.size(1) % num_pieces:
        return module(x)
    recomputed = partial(checkpoint, module, use_reentrant=False, preserve_rng_state=False)
    run = module if is_recomputed and torch.compiler.is_compiling() else recomputed
    return torch.cat([run(piece) for piece in x.chunk(num_pieces, dim=1)], dim=1)
