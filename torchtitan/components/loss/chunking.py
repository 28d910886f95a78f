"""How many tokens' logits fit a memory budget, the knob of both fused losses for memory and time."""

from typing import NamedTuple

ALIGNMENT = 128
"""Chunks are multiples of this many rows, the tile height of the matrix products on a GPU."""
SMALL_ALIGNMENT = 16
"""Chunks with fewer rows than that are multiples of this: products of other sizes take slower kernels."""


def rows_in_budget(budget_bytes: int, *, vocab_rows: int, bytes_per_logit: int) -> int:
    """Rows of logits that fit the budget; at least 1."""
    return max(1, budget_bytes // max(1, vocab_rows * bytes_per_logit))


class Chunks(NamedTuple):
    """How the in-tree loss walks over its tokens."""

    rows: int
    """Tokens of a chunk; the last one may have fewer."""
    num_buffers: int
    """Chunks whose logits are held at a time."""


def plan_chunks(
    num_tokens: int, *, vocab_rows: int, bytes_per_logit: int, budget_bytes: int, is_sharded: bool
) -> Chunks:
    """The chunks whose logits, of `vocab_rows` each, fit the budget.

    Where the vocabulary is sharded, ranks combine their statistics chunk by chunk: all must pass the same numbers,
    `vocab_rows` those of the rank that holds most.
    """
    max_rows = rows_in_budget(budget_bytes, vocab_rows=vocab_rows, bytes_per_logit=bytes_per_logit)
    if is_sharded and num_tokens > max_rows:  # one chunk's reduction runs beside the next one's product
        return Chunks(equal_chunk_rows(num_tokens, max(1, max_rows // 2)), 2)
    return Chunks(equal_chunk_rows(num_tokens, max_rows), 1)


def equal_chunk_rows(num_tokens: int, max_rows: int) -> int:
    """Rows per chunk such that the fewest chunks cover `num_tokens`, alike in size and aligned where that fits.

    >>> equal_chunk_rows(8192, 5000)  # two chunks, not 5000 + 3192
    4096
    """
    if num_tokens <= max_rows:
        return max(num_tokens, 1)
    alignment = next(a for a in (ALIGNMENT, SMALL_ALIGNMENT, 1) if a <= max_rows)
    num_chunks = -(-num_tokens // _align_down(max_rows, alignment))
    rows = -(-num_tokens // num_chunks)
    return -(-rows // alignment) * alignment


def _align_down(number: int, alignment: int) -> int:
    return number - number % alignment


def liger_chunk_rows(num_tokens: int, *, dim: int, vocab_size: int, chunk_mem_const: int) -> int:
    """Rows of one chunk as Liger 0.8.3 and newer choose them."""
    num_chunks_aimed = -(-vocab_size // (chunk_mem_const * dim))
    rows = -(-num_tokens // num_chunks_aimed)
    return min(1 << (rows - 1).bit_length(), num_tokens)


def liger_chunk_mem_const(*, num_tokens: int, dim: int, vocab_size: int, max_rows: int) -> int:
    """The value of Liger's knob that gives its largest chunk of at most `max_rows` rows; 1 where none does."""
    largest = -(-vocab_size // dim)
    for value in range(largest, 1, -1):
        if liger_chunk_rows(num_tokens, dim=dim, vocab_size=vocab_size, chunk_mem_const=value) <= max_rows:
            return value
    return 1
