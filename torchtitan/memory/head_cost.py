"""What the output projection and its loss cost a rank under tensor parallelism: memory, and bytes on the network.

Plain arithmetic, of one microbatch. The vocabulary is sharded over the tp ranks, so that a rank holds V / tp rows of
the weight. Two ways to feed a fused loss with it:

    sharded     as this package does: the hidden states are gathered, each rank works on its own rows, the hidden
                gradient is reduce-scattered: 2 * T * D * b * (tp - 1) / tp bytes, beside 12 bytes a token of statistics
    gathered    the whole weight is gathered and its gradient reduce-scattered: 2 * V * D * b * (tp - 1) / tp bytes, and
                the memory of all V rows

Shapes: T tokens of one tensor-parallel group (sequences * length / context degree), D model dim, V vocabulary,
b bytes of an element. Bytes on the network are those that a rank receives.

And the log's advice where the standard loss's logits take much of a device.
"""

from dataclasses import dataclass

from torchtitan.components.loss.chunking import plan_chunks

LARGE_SHARE = 0.05
"""Of the device's memory: where logits take as much, the log says so."""

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
    is_sharded = tp_degree > 1 and not gather_weight
    # a rank that has the whole weight needs only its own part of the sequence
    tokens_here = -(-num_tokens // tp_degree) if gather_weight else num_tokens
    if gather_weight:
        moved = 2 * vocab_size * dim * bytes_per_element * (tp_degree - 1) // tp_degree
    else:
        hidden = 2 * num_tokens * dim * bytes_per_element * (tp_degree - 1) // tp_degree
        moved = hidden + _STATISTICS_BYTES * num_tokens * (tp_degree - 1)
    return HeadCost(
        weight=weight,
        logits=get_fused_logits_bytes(
            num_tokens=tokens_here,
            vocab_rows=rows,
            bytes_per_logit=bytes_per_element,
            budget_bytes=budget_bytes,
            is_sharded=is_sharded,
        ),
        all_logits=2 * tokens_here * rows * bytes_per_element,
        moved=moved,
    )


def get_fused_logits_bytes(
    *, num_tokens: int, vocab_rows: int, bytes_per_logit: int, budget_bytes: int, is_sharded: bool
) -> int:
    """The logits buffers of the in-tree fused loss on a GPU."""
    chunks = plan_chunks(
        num_tokens,
        vocab_rows=vocab_rows,
        bytes_per_logit=bytes_per_logit,
        budget_bytes=budget_bytes,
        is_sharded=is_sharded,
    )
    return chunks.num_buffers * chunks.rows * vocab_rows * bytes_per_logit


def about_logits_memory(
    *, num_tokens: int, vocab_rows: int, bytes_per_logit: int, compiled: bool, capacity: int
) -> str | None:
    """What the standard loss's logits take on this device and how to avoid it; None where it is little.

    Eager cross entropy holds 12 bytes a logit at its peak, in bf16 and in float32 (docs/performance.md); compiled, the
    logits and their gradient.
    """
    bytes_per_token = vocab_rows * (2 * bytes_per_logit if compiled else 12)
    needed = num_tokens * bytes_per_token
    if needed < LARGE_SHARE * capacity:
        return None
    return (
        f"The logits of each microbatch take about {needed / 2**30:.1f} GiB, {100 * needed / capacity:.0f}% of this "
        "device's memory; --liger_kernel.enable_fused_linear_cross_entropy trains without them"
    )
