"""Both losses with the vocabulary sharded unevenly, some ranks holding fewer rows than others, or none."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.loss import IGNORE_INDEX, VocabShard, fused_linear_cross_entropy
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
    shard = VocabShard(start, dist.group.WORLD, rows_per_rank)
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
    loss = _sharded_sum(mine, labels, start, case.vocab_size, dist.group.WORLD)
    loss.backward()
    return loss.detach(), mine.grad


def of_a_label_that_is_no_word(label: int) -> Tensor:
    """The sum over two tokens of four words, one of which has this label."""
    start, group = min(2 * dist.get_rank(), 4), dist.group.WORLD
    assert group is not None
    return _sharded_sum(torch.zeros(2, 4)[:, start : start + 2], torch.tensor([0, label]), start, 4, group)


def on_each_rank(cases: list[Case]) -> dict[str, list[tuple[Tensor, ...]]]:
    return {
        "no word": [(of_a_label_that_is_no_word(-1), of_a_label_that_is_no_word(4))],
        "fused": [on_one_rank(case) for case in cases],
        "standard": [standard_on_one_rank(case) for case in cases],
    }


@cache
def run(world_size: int) -> list[dict[str, list[tuple[Tensor, ...]]]]:
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
