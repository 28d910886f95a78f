"""What the output projection and its loss cost a rank under tensor parallelism: the table of docs/parallelism.md.

    python scripts/head_cost_table.py

Plain arithmetic, of one microbatch. The vocabulary is sharded over the tp ranks, so that a rank holds V / tp rows of
the weight. Two ways to feed a fused loss with it:

    sharded     as this package does: the hidden states are gathered, each rank works on its own rows, the hidden
                gradient is reduce-scattered: 2 * T * D * b * (tp - 1) / tp bytes, beside 12 bytes a token of statistics
    gathered    the whole weight is gathered and its gradient reduce-scattered: 2 * V * D * b * (tp - 1) / tp bytes, and
                the memory of all V rows

Shapes: T tokens of one tensor-parallel group (sequences * length / context degree), D model dim, V vocabulary,
b bytes of an element. Bytes on the network are those that a rank receives.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.components.loss.chunking import plan_chunks
from torchtitan.models.llama3.flavors import llama3_flavors

DOCUMENTED = (("8B", 1, 8192), ("8B", 8, 8192), ("70B", 8, 8 * 8192), ("405B", 8, 2 * 8192))
"""Flavour of Llama 3, tensor-parallel degree and tokens of each row."""


_STATISTICS_BYTES = 3 * 4  # a token's maximum, sum and target logit, float32 (components/loss/fused_linear.py)


@dataclass(frozen=True)
class HeadCost:
    """Bytes on one rank, or received by it."""

    weight: int
    """And its gradient as much again."""
    logits: int
    """What the fused loss holds of the logits at a time."""
    all_logits: int
    """What the standard loss holds of them when compiled: the logits and their gradient."""
    moved: int


def get_head_cost(
    *,
    vocab_size: int,
    dim: int,
    num_tokens: int,
    tp_degree: int = 1,
    bytes_per_element: int = 2,
    budget_bytes: int = 1 << 30,
    gather_weight: bool = False,
) -> HeadCost:
    """The cost of the head, with the vocabulary kept sharded, or with the whole weight gathered on each rank."""
    rows = vocab_size if gather_weight else -(-vocab_size // tp_degree)
    weight = rows * dim * bytes_per_element
    # a rank that has the whole weight needs only its own part of the sequence
    tokens_here = -(-num_tokens // tp_degree) if gather_weight else num_tokens
    if gather_weight:
        moved = 2 * vocab_size * dim * bytes_per_element * (tp_degree - 1) // tp_degree
    else:
        hidden = 2 * num_tokens * dim * bytes_per_element * (tp_degree - 1) // tp_degree
        moved = hidden + _STATISTICS_BYTES * num_tokens * (tp_degree - 1)
    chunks = plan_chunks(
        tokens_here,
        vocab_rows=rows,
        bytes_per_logit=bytes_per_element,
        budget_bytes=budget_bytes,
        is_sharded=tp_degree > 1 and not gather_weight,
    )
    return HeadCost(
        weight=weight,
        logits=chunks.num_buffers * chunks.rows * rows * bytes_per_element,
        all_logits=2 * tokens_here * rows * bytes_per_element,
        moved=moved,
    )


def get_table() -> str:
    """In Markdown; MB of 10^6 bytes."""
    lines = [
        "| model | tp | tokens | weight, gradient | logits, standard | logits, fused | moved | moved if gathered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for flavor, tp, num_tokens in DOCUMENTED:
        args = llama3_flavors[flavor]
        cost_of = partial(get_head_cost, vocab_size=args.vocab_size, dim=args.dim, num_tokens=num_tokens, tp_degree=tp)
        ours, gathered = cost_of(), cost_of(gather_weight=True)
        numbers = (ours.weight, ours.all_logits, ours.logits, ours.moved, gathered.moved)
        lines.append(f"| {flavor} | {tp} | {num_tokens} | " + " | ".join(f"{n / 1e6:.0f}" for n in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(get_table())
