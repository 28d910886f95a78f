"""Print the table of docs/parallelism.md: what the head costs a rank, sharded and gathered.

python scripts/head_cost_table.py
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.memory.head_cost import get_head_cost
from torchtitan.models.llama3.flavors import llama3_flavors

DOCUMENTED = (("8B", 1, 8192), ("8B", 8, 8192), ("70B", 8, 8 * 8192), ("405B", 8, 2 * 8192))
"""Flavour of Llama 3, tensor-parallel degree and tokens of each row."""


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
