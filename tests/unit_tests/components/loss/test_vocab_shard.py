"""Both losses with the vocabulary sharded unevenly, some ranks holding fewer rows than others, or none."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.loss import (
    IGNORE_INDEX,
    VocabShard,
    chunked_logits,
    fused_linear_cross_entropy,
    linear_logprobs,
)
from torchtitan.components.loss.cross_entropy import _sharded_sum


class Case(NamedTuple):
    world_size: int
    vocab_size: int
    num_tokens: int
    budget_bytes: int


CASES = [
    Case(2, 101, 100, 12_800),  # by its own rows alone, the second rank would make fewer chunks: 4 and not 7
    Case(2, 101, 100, 1 << 20),
    Case(4, 5, 7, 16),  # the last rank holds nothing
    Case(4, 4, 1, 16),
]
SURE = [1.0, 100.0, 1000.0]
"""The largest logits of tokens that the model is sure of."""


def make_problem(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.num_tokens, 16, generator=generator)
    weight = torch.randn(case.vocab_size, 16, generator=generator)
    labels = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator)
    labels[1::5] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def on_one_rank(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = make_problem(case)
    rank, rows_per_rank = dist.get_rank(), -(-case.vocab_size // case.world_size)
    start = min(rank * rows_per_rank, case.vocab_size)
    rows = weight.detach()[start : start + rows_per_rank].clone().requires_grad_()
    assert dist.group.WORLD is not None
    shard = VocabShard(start, dist.group.WORLD, rows_per_rank, case.vocab_size)
    loss = fused_linear_cross_entropy(hidden, rows, labels, scale=0.5, budget_bytes=case.budget_bytes, shard=shard)
    loss.backward()
    return loss.detach(), hidden.grad, rows.grad


def standard_on_one_rank(case: Case) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and the gradient of this rank's logits, which are so large that exp() overflows."""
    hidden, weight, labels = make_problem(case)
    logits = 100 * (hidden @ weight.t()).detach()
    rank, rows_per_rank = dist.get_rank(), -(-case.vocab_size // case.world_size)
    start = min(rank * rows_per_rank, case.vocab_size)
    mine = logits[:, start : start + rows_per_rank].clone().requires_grad_()
    assert dist.group.WORLD is not None
    loss, *_ = _sharded_sum(mine, labels, start, case.vocab_size, dist.group.WORLD)
    loss.backward()
    return loss.detach(), mine.grad


def of_a_label_that_is_no_word(label: int) -> Tensor:
    """The sum over two tokens of four words, one of which has this label."""
    start, group = min(2 * dist.get_rank(), 4), dist.group.WORLD
    assert group is not None
    return _sharded_sum(torch.zeros(2, 4)[:, start : start + 2], torch.tensor([0, label]), start, 4, group)[0]


def sure_logits(top: float) -> Tensor:
    """Logits of three tokens and nine words, of which word 4 leads by 9; on four ranks the last holds nothing."""
    logits = torch.full((3, 9), top - 9.0) + torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = top
    return logits


def of_sure_tokens(top: float) -> tuple[Tensor, ...]:
    """Both losses and their gradients of this rank's logits, which are the weight where the hidden states are I."""
    world, group, labels = dist.get_world_size(), dist.group.WORLD, torch.tensor([4, 4, 4])
    assert group is not None
    rows_per_rank = -(-9 // world)
    start = min(dist.get_rank() * rows_per_rank, 9)
    mine = sure_logits(top)[:, start : start + rows_per_rank]
    rows, logits = mine.t().contiguous().requires_grad_(), mine.clone().requires_grad_()
    shard = VocabShard(start, group, rows_per_rank, 9)
    fused = fused_linear_cross_entropy(torch.eye(3), rows, labels, shard=shard)
    standard, *_ = _sharded_sum(logits, labels, start, 9, group)
    (fused + standard).backward()
    return fused.detach(), rows.grad.t(), standard.detach(), logits.grad


OPTIONS: dict[str, Any] = {
    "token_weights": torch.linspace(0, 2, 9),
    "class_weights": torch.linspace(0.5, 2, 11),
    "z_loss": 1e-2,
    "softcap": 5.0,
    "label_smoothing": 0.1,
    "budget_bytes": 4 * 6 * 2,
}
LABELS = torch.tensor([0, 3, IGNORE_INDEX, 10, 5, 7, 2, 9, 1])


def with_options(rank: int = 0, world: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """What is known of nine tokens and eleven words, and the gradients of the loss and of log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 16), (11, 16), (11,)))
    rows_per_rank = -(-11 // world)
    mine = slice(min(rank * rows_per_rank, 11), (rank + 1) * rows_per_rank)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight[mine], bias[mine])]
    shard = VocabShard(mine.start, dist.group.WORLD, rows_per_rank, 11) if dist.group.WORLD is not None else None
    found = fused_linear_cross_entropy(
        leaves[0], leaves[1], LABELS, bias=leaves[2], shard=shard, return_outputs=True, **OPTIONS
    )
    logprobs, entropies = linear_logprobs(
        leaves[0], leaves[1], LABELS, bias=leaves[2], softcap=5.0, shard=shard, budget_bytes=48
    )
    gradients = torch.autograd.grad(found.loss + logprobs.exp().sum() + (entropies**2).sum(), leaves)
    return [t.detach() for t in (*found, logprobs, entropies)], list(gradients)


def order_of_collectives() -> list[str]:
    """Of a call with several chunks."""
    calls = []

    class Recorded:
        def __getattr__(self, name: str) -> Callable[..., Tensor]:
            calls.append(name)
            return getattr(torch.ops._c10d_functional, name)

    with patch.object(chunked_logits, "collectives", Recorded()):
        on_one_rank(Case(dist.get_world_size(), 11, 64, 440))
    return calls


def on_each_rank(cases: list[Case]) -> dict[str, Any]:
    return {
        "no word": [(of_a_label_that_is_no_word(-1), of_a_label_that_is_no_word(4))],
        "fused": [on_one_rank(case) for case in cases],
        "standard": [standard_on_one_rank(case) for case in cases],
        "collectives": order_of_collectives(),
        "sure": [of_sure_tokens(top) for top in SURE],
        "options": with_options(dist.get_rank(), dist.get_world_size()),
    }


@cache
def run(world_size: int) -> list[dict[str, Any]]:
    return run_processes(on_each_rank, world_size, cases_of(world_size))


def cases_of(world_size: int) -> list[Case]:
    return [case for case in CASES if case.world_size == world_size]


def results(world_size: int, loss: str) -> Iterator[tuple[Case, tuple[tuple[Tensor, ...], ...]]]:
    """Each case, with what every rank found."""
    by_rank = [rank[loss] for rank in run(world_size)]
    yield from zip(cases_of(world_size), zip(*by_rank, strict=True), strict=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_equal_float64(world_size: int) -> None:
    for case, parts in results(world_size, "fused"):
        hidden, weight, labels = (t.detach().double() if t.is_floating_point() else t for t in make_problem(case))
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        expected = 0.5 * F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        expected.backward()
        losses, d_hidden, d_weight = zip(*parts, strict=True)
        for loss in losses:
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(sum(d_hidden).double(), hidden.grad, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.cat(d_weight).double(), weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_standard_loss_and_its_gradient_equal_float64(world_size: int) -> None:
    for case, parts in results(world_size, "standard"):
        hidden, weight, labels = make_problem(case)
        logits = (100 * (hidden @ weight.t())).detach().double().requires_grad_()
        expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        expected.backward()
        losses, d_logits = zip(*parts, strict=True)
        for loss in losses:
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.cat(d_logits, dim=1).double(), logits.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_label_outside_the_vocabulary_makes_the_standard_loss_infinite(world_size: int) -> None:
    for found in run(world_size):
        assert [loss.item() for loss in found["no word"][0]] == 2 * [float("inf")]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sure_token_is_as_exact_as_in_torch(world_size: int) -> None:
    """A loss of 3e-4 a token is lost in a logsumexp that is rounded to the size of the largest logit."""
    for i, top in enumerate(SURE):
        logits = sure_logits(top).double().requires_grad_()
        expected = F.cross_entropy(logits, torch.tensor([4, 4, 4]), reduction="sum")
        expected.backward()
        fused, d_fused, standard, d_standard = zip(*(rank["sure"][i] for rank in run(world_size)), strict=True)
        for loss in (*fused, *standard):
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=0)
        for parts in (d_fused, d_standard):
            torch.testing.assert_close(torch.cat(parts, dim=1).double(), logits.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_options_outputs_and_log_probabilities_equal_those_of_one_rank(world_size: int) -> None:
    """One rank's are held to float64 in test_terms.py."""
    expected, (d_hidden, d_weight, d_bias) = with_options()
    outputs, gradients = zip(*(rank["options"] for rank in run(world_size)), strict=True)
    for found in outputs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parts = list(zip(*gradients, strict=True))
    torch.testing.assert_close(sum(parts[0]), d_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts[1]), d_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts[2]), d_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo_never_has_two_gathers_under_way(world_size: int) -> None:
    """Some hundred of them in pairs break its memory."""
    for found in run(world_size):
        calls = found["collectives"]
        assert len(calls) > 2 and calls == ["all_gather_into_tensor", "wait_tensor"] * (len(calls) // 2)
