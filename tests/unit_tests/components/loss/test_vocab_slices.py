"""Slices of the vocabulary give what any other way gives, within the budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy
from torchtitan.components.loss.gradient_sum import WeightGradient
from torchtitan.components.loss.vocab_slices import fill_by_vocab_slices

DIM, VOCAB = 24, 301


def run(hidden: Tensor, weight: Tensor, labels: Tensor, *, budget_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    losses = torch.full(labels.shape, float("nan"))
    d_hidden, d_weight = torch.full_like(hidden, float("nan")), WeightGradient(weight, weight.dtype)
    fill_by_vocab_slices(
        hidden,
        weight,
        labels,
        torch.tensor(0.3),
        losses=losses,
        d_hidden=d_hidden,
        d_weight=d_weight,
        budget_bytes=budget_bytes,
    )
    return losses, d_hidden, d_weight.finish()


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = F.cross_entropy(h @ w.t(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.detach(), *torch.autograd.grad(0.3 * losses.sum(), (h, w))


def make_problem(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (num_tokens,))
    labels[num_tokens // 2 + 1 :: 2] = IGNORE_INDEX
    return torch.randn(num_tokens, DIM).to(dtype), torch.randn(VOCAB, DIM).to(dtype), labels


# one group and one slice; several of both, none of which divides; a word at a time for a token at a time
@pytest.mark.parametrize("budget_bytes", [1 << 20, 4000, 1])
@pytest.mark.parametrize("num_tokens", [1, 31, 64])
def test_equals_float64(num_tokens: int, budget_bytes: int) -> None:
    hidden, weight, labels = make_problem(num_tokens, torch.float32)
    for mine, true in zip(
        run(hidden, weight, labels, budget_bytes=budget_bytes), oracle(hidden, weight, labels), strict=True
    ):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_rounded_as_in_one_chunk() -> None:
    """The hidden gradient adds up in float32 over slices; the weight's is rounded once for each group of tokens."""
    hidden, weight, labels = make_problem(200, torch.bfloat16)
    truth = oracle(hidden, weight, labels)
    few, one = (run(hidden, weight, labels, budget_bytes=budget) for budget in (40_000, 1 << 20))
    for mine, chunk, true, allowed in zip(few, one, truth, (1.0, 1.0, 1.5), strict=True):
        assert (mine.double() - true).norm() <= 1e-6 + allowed * 1.05 * (chunk.double() - true).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("accum_dtype", [None, torch.float32])
@pytest.mark.parametrize("num_rows", [130, 700])  # of logits: below 320, slices of the vocabulary; above, chunks
@pytest.mark.parametrize("num_tokens", [200, 256, 3000])
def test_a_tight_budget_gives_the_same_loss_and_gradients_in_no_more_memory(
    num_tokens: int, num_rows: int, accum_dtype: torch.dtype | None
) -> None:
    """200 tokens fit the weight gradient's memory, 256 fill it, 3000 go on elsewhere."""
    torch.manual_seed(0)
    dim, vocab_size = 256, 20_001
    hidden = torch.randn(num_tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    # logits of about 1: of larger ones a rounding to bf16 is no small change of the softmax, and products round apart
    weight = (torch.randn(vocab_size, dim, device="cuda") * dim**-0.5).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,), device="cuda")
    budget = 2 * vocab_size * num_rows

    def run(budget_bytes: int, accum_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        loss = fused_linear_cross_entropy(
            hidden, weight, labels, scale=1 / num_tokens, budget_bytes=budget_bytes, accum_dtype=accum_dtype
        )
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    expected = run(1 << 30, torch.float32)  # in one chunk
    run(budget, accum_dtype)  # compiles the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mine = run(budget, accum_dtype)
    gradients = 2 * (hidden.numel() + weight.numel())
    allowed = gradients + 1.3 * budget + (0 if accum_dtype is None else 4 * weight.numel())
    assert torch.cuda.max_memory_allocated() - before < allowed
    for a, b in zip(mine, expected, strict=True):
        assert (a.float() - b.float()).norm() < 5e-3 * b.float().norm()
