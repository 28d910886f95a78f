"""Which way the in-tree loss goes: chunks of tokens, unless a GPU has a budget for few rows of logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtitan.components.loss import IGNORE_INDEX, VocabShard, fused_linear, fused_linear_cross_entropy
from torchtitan.components.loss.fused_linear import _fill_by_chunks, _Options, _ways_by_tokens
from torchtitan.components.loss.in_place import fill_in_place
from torchtitan.components.loss.vocab_slices import fill_by_vocab_slices

DIM, VOCAB = 256, 20_000


def ways(
    device: str,
    num_rows: int,
    *,
    num_tokens: int = 2048,
    accum_dtype: torch.dtype = torch.bfloat16,
    needs_weight: bool = True,
    sharded: bool = False,
) -> str:
    shard = VocabShard(0, None, VOCAB) if sharded else None  # type: ignore[arg-type]
    with FakeTensorMode():
        hidden = torch.empty(num_tokens, DIM, dtype=torch.bfloat16, device=device)
        weight = torch.empty(VOCAB, DIM, dtype=torch.bfloat16, device=device)
    parts = _ways_by_tokens(
        hidden, weight, _Options(num_rows * 2 * VOCAB, accum_dtype, shard), needs_weight=needs_weight
    )
    assert [index for tokens, _ in parts for index in range(tokens.start, tokens.stop)] == list(range(num_tokens))
    return ", ".join(
        f"{tokens.stop - tokens.start} {getattr(fill, 'func', fill).__name__.removeprefix('_')}"
        for tokens, fill in parts
    )


@pytest.mark.parametrize(
    ("num_rows", "way"),
    [
        (100_000, "2048 fill_by_chunks"),
        (2048, "2048 fill_by_chunks"),
        (2047, "256 fill_in_place, 1792 fill_by_chunks"),
        (320, "256 fill_in_place, 1792 fill_by_chunks"),
        (319, "256 fill_in_place, 1792 fill_by_vocab_slices"),
        (1, "256 fill_in_place, 1792 fill_by_vocab_slices"),
    ],
)
def test_few_rows_go_in_place_and_very_few_over_slices(num_rows: int, way: str) -> None:
    assert ways("cuda", num_rows) == way


def test_few_tokens_on_a_gpu() -> None:
    assert ways("cuda", 300, num_tokens=0) == ""
    assert ways("cuda", 300, num_tokens=300) == "300 fill_by_chunks"
    assert ways("cuda", 200, num_tokens=256) == "256 fill_in_place"
    assert ways("cuda", 200, num_tokens=256, accum_dtype=torch.float32) == "256 fill_by_vocab_slices"
    assert ways("cuda", 200, num_tokens=400) == "256 fill_in_place, 144 fill_by_chunks"


def test_the_weight_gradient_s_memory_serves_only_in_the_dtype_of_the_logits() -> None:
    assert ways("cuda", 500, accum_dtype=torch.float32) == "2048 fill_by_chunks"
    assert ways("cuda", 300, accum_dtype=torch.float32) == "2048 fill_by_vocab_slices"


def test_chunks_of_any_size_where_no_weight_gradient_is_read_and_written_for_each() -> None:
    assert ways("cuda", 100, needs_weight=False) == "2048 fill_by_chunks"


def test_chunks_of_any_size_for_a_sharded_vocabulary_and_on_a_cpu() -> None:
    assert ways("cuda", 100, sharded=True) == ways("cpu", 100) == "2048 fill_by_chunks"


def test_ways_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with few rows, here on a CPU: each way goes on from the weight gradient of the one before."""
    dim, num_tokens = 16, 61
    ways = [
        (slice(0, dim), fill_in_place),
        (slice(dim, 40), fill_by_vocab_slices),
        (slice(40, num_tokens), partial(_fill_by_chunks, shard=None)),
    ]
    monkeypatch.setattr(fused_linear, "_ways_by_tokens", lambda *_, **__: ways)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, dim, requires_grad=True) for n in (num_tokens, 101))
    labels = torch.randint(101, (num_tokens,))
    labels[5::7] = IGNORE_INDEX
    loss = fused_linear_cross_entropy(hidden, weight, labels, scale=0.1, budget_bytes=4000)
    expected = 0.1 * F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for mine, true in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)
