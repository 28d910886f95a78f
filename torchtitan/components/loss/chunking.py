"""How many tokens' logits fit a memory budget, the knob of both fused losses for memory and time."""

from typing import NamedTuple

TILE = 128
"""Rows that a GPU's matrix products take at a time: a chunk with one more row costs as much as one with that many."""
_ALIGNMENTS = (1024, TILE, 16, 1)
"""Chunks are multiples of one of these, the largest that makes no more of them. At D=4096 1024 rows are one full turn
of an H100's 132 processors in the product for the hidden gradient, at 2048 half of one; below 16 kernels are slow."""
_SLACK = 32
"""A budget may be exceeded by one part in so many, where that fills up a tile."""


def rows_in_budget(budget_bytes: int, *, vocab_rows: int, bytes_per_logit: int) -> int:
    """Rows of logits that fit the budget, or as many as fill the last tile where it is missed by little; at least 1."""
    rows = max(1, budget_bytes // max(1, vocab_rows * bytes_per_logit))
    whole_tiles = round_up(rows, TILE)
    return whole_tiles if (whole_tiles - rows) * _SLACK <= rows else rows


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
        return Chunks(chunk_rows(num_tokens, max(1, max_rows // 2)), 2)
    return Chunks(chunk_rows(num_tokens, max_rows), 1)


def chunk_rows(num_tokens: int, max_rows: int) -> int:
    """Rows per chunk such that the fewest chunks cover `num_tokens`, alike in size as far as a GPU gains by it.

    >>> chunk_rows(8192, 5000)  # two chunks, not 5000 + 3192
    4096
    >>> chunk_rows(4400, 4224)  # 3072 + 1328: three full turns and two, where 2200 + 2200 would take three each
    3072
    """
    if num_tokens <= max_rows:
        return max(num_tokens, 1)
    needed = next(a for a in _ALIGNMENTS[1:] if a <= max_rows)
    num_chunks = -(-num_tokens // (max_rows - max_rows % needed))
    rows = -(-num_tokens // num_chunks)
    return next(aligned for a in _ALIGNMENTS if (aligned := round_up(rows, a)) <= max_rows)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
