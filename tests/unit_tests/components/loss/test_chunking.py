import pytest

from torchtitan.components.loss.chunking import chunk_rows, rows_in_budget


def test_the_default_budget_holds_4096_rows_of_llama_3_logits() -> None:
    rows = rows_in_budget(1024 << 20, vocab_rows=128256, bytes_per_logit=2)
    assert [chunk_rows(n, rows) for n in (1024, 4096, 8192, 16384, 32768)] == [1024, 4096, 4096, 4096, 4096]
    # half of 8192 tokens drawn by chance, rounded up to a tile, are one chunk
    assert [chunk_rows(n, rows) for n in (4224, 4352, 5120)] == [4224, 3072, 3072]


@pytest.mark.parametrize("budget_rows", [1, 16, 127, 500, 512, 520, 2000, 4090, 4186, 4200])
def test_a_budget_is_exceeded_by_a_32nd_at_most_and_to_fill_a_tile(budget_rows: int) -> None:
    rows = rows_in_budget(budget_rows * 200, vocab_rows=100, bytes_per_logit=2)
    filled = -(-budget_rows // 128) * 128
    assert rows == (filled if filled <= budget_rows * (1 + 1 / 32) else budget_rows)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 1000, 4097, 8192])
@pytest.mark.parametrize("max_rows", [1, 5, 127, 128, 300, 4186, 10**6])
def test_chunks_fit_the_budget_and_are_as_few_as_can_be(num_tokens: int, max_rows: int) -> None:
    rows = chunk_rows(num_tokens, max_rows)
    assert 1 <= rows <= max_rows
    alignment = 128 if max_rows >= 128 else 16 if max_rows >= 16 else 1
    usable = max_rows - max_rows % alignment
    fewest = 1 if num_tokens <= max_rows else -(-num_tokens // usable)
    assert -(-num_tokens // rows) == fewest
    assert rows == num_tokens or rows % alignment == 0


def test_a_budget_below_one_row_still_takes_one() -> None:
    assert rows_in_budget(1, vocab_rows=128256, bytes_per_logit=2) == 1
