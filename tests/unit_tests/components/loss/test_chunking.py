import pytest

from torchtitan.components.loss.chunking import equal_chunk_rows, plan_slices, rows_in_budget


def test_the_default_budget_holds_4096_rows_of_llama_3_logits() -> None:
    rows = rows_in_budget(1024 << 20, vocab_rows=128256, bytes_per_logit=2)
    assert [equal_chunk_rows(n, rows) for n in (1024, 4096, 8192, 16384)] == [1024, 4096, 4096, 4096]


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 1000, 4097, 8192])
@pytest.mark.parametrize("max_rows", [1, 5, 127, 128, 300, 4186, 10**6])
def test_chunks_fit_the_budget_and_are_as_few_as_can_be(num_tokens: int, max_rows: int) -> None:
    rows = equal_chunk_rows(num_tokens, max_rows)
    assert 1 <= rows <= max_rows
    alignment = 128 if max_rows >= 128 else 16 if max_rows >= 16 else 1
    usable = max_rows - max_rows % alignment
    fewest = 1 if num_tokens <= max_rows else -(-num_tokens // usable)
    assert -(-num_tokens // rows) == fewest
    assert rows == num_tokens or rows % alignment == 0


def test_a_budget_below_one_row_still_takes_one() -> None:
    assert rows_in_budget(1, vocab_rows=128256, bytes_per_logit=2) == 1


@pytest.mark.parametrize("budget_mib", [1, 31, 63, 100])
@pytest.mark.parametrize("num_tokens", [1, 500, 4096, 28672])
def test_slices_fit_the_budget_and_move_about_as_little_as_can_be(num_tokens: int, budget_mib: int) -> None:
    """Against all other ways to share the budget between tokens and words, in the bytes that vocab_slices.py counts."""
    vocab_size, dim, budget = 128256, 4096, budget_mib << 20

    def traffic(tokens: int, words: int) -> float:
        groups, slices = -(-num_tokens // tokens), -(-vocab_size // words)
        return groups * 2 * 2 * vocab_size * dim + num_tokens * slices * 8 * dim

    tokens, words = plan_slices(num_tokens, vocab_size=vocab_size, dim=dim, bytes_per_logit=2, budget_bytes=budget)
    assert tokens * (2 * words + 4 * dim) <= budget
    others = [(t, (budget // t - 4 * dim) // 2) for t in range(16, num_tokens + 16, 16)]
    best = min(traffic(t, min(w, vocab_size)) for t, w in others if w >= 1)
    assert traffic(tokens, words) < 1.5 * best  # it takes only powers of 2 for many tokens
