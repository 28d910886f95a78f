"""The first chunk in the weight gradient's memory gives what any other way gives."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy
from torchtitan.components.loss.in_place import first_chunk_in_place


@pytest.mark.parametrize("num_tokens", [1, 31, 64])
@pytest.mark.parametrize("slice_rows", [128, 10_000])
def test_equals_autograd_of_the_standard_loss(num_tokens: int, slice_rows: int) -> None:
    torch.manual_seed(0)
    dim, vocab_size = 64, 301
    hidden, weight = torch.randn(num_tokens, dim, requires_grad=True), torch.randn(vocab_size, dim, requires_grad=True)
    labels = torch.randint(vocab_size, (num_tokens,))
    labels[num_tokens // 2 + 1 :] = IGNORE_INDEX
    losses = torch.full((num_tokens,), float("nan"))
    d_hidden, d_weight = torch.full_like(hidden, float("nan")), torch.full_like(weight, float("nan"))
    with torch.no_grad():
        first_chunk_in_place(
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
        (d_hidden, d_weight), torch.autograd.grad(0.3 * expected.sum(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [200, 256, 1000])
def test_a_tight_budget_gives_the_same_loss_and_gradients_in_no_more_memory(num_tokens: int) -> None:
    """200 tokens fit the first chunk, 256 fill it, 1000 go on in chunks of 128."""
    torch.manual_seed(0)
    dim, vocab_size = 256, 20_001
    hidden = torch.randn(num_tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab_size, (num_tokens,), device="cuda")
    budget = 2 * vocab_size * 130

    def run(budget_bytes: int) -> tuple[torch.Tensor, ...]:
        loss = fused_linear_cross_entropy(hidden, weight, labels, scale=1 / num_tokens, budget_bytes=budget_bytes)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    expected = run(1 << 30)
    run(budget)  # compiles the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mine = run(budget)
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < gradients + 1.3 * budget
    for a, b in zip(mine, expected, strict=True):
        assert (a.float() - b.float()).norm() < 5e-3 * b.float().norm()
