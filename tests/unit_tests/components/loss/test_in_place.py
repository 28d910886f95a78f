"""The first tokens in the weight gradient's memory give what any other way gives."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.loss.gradient_sum import WeightGradient
from torchtitan.components.loss.in_place import fill_in_place


@pytest.mark.parametrize("num_tokens", [1, 31, 64])
@pytest.mark.parametrize("slice_rows", [128, 10_000])
def test_equals_autograd_of_the_standard_loss(num_tokens: int, slice_rows: int) -> None:
    torch.manual_seed(0)
    dim, vocab_size = 64, 301
    hidden, weight = torch.randn(num_tokens, dim, requires_grad=True), torch.randn(vocab_size, dim, requires_grad=True)
    labels = torch.randint(vocab_size, (num_tokens,))
    labels[num_tokens // 2 + 1 :] = IGNORE_INDEX
    losses = torch.full((num_tokens,), float("nan"))
    d_hidden, d_weight = torch.full_like(hidden, float("nan")), WeightGradient(weight, weight.dtype)
    with torch.no_grad():
        fill_in_place(
            hidden,
            weight,
            labels,
            torch.tensor(0.3),
            losses=losses,
            d_hidden=d_hidden,
            d_weight=d_weight,
            budget_bytes=4 * num_tokens * slice_rows,
        )
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    for mine, true in zip(
        (d_hidden, d_weight.finish()), torch.autograd.grad(0.3 * expected.sum(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)
