import pytest

from torchtitan.components.loss.chunking import equal_chunk_rows, rows_in_budget


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
