"""The function behind the in-tree loss: what it takes, in which precision it computes, and what it refuses."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.components.loss import (
    IGNORE_INDEX,
    FusedLinearCrossEntropyLoss,
    TokenSums,
    fused_linear,
    fused_linear_cross_entropy,
    linear_logprobs,
    operators,
)
from torchtitan.components.loss.softmax_gradient import combine_statistics, row_statistics
from torchtitan.components.loss.terms import Terms
from torchtitan.components.loss.valid_rows import ValidRows
from torchtitan.models.common.model import OutputHead

VOCAB, DIM = 101, 16
BYTES = 4 * VOCAB  # of one row of float32 logits


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_loss_is_computed(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was computed")

    for function in ("statistics_and_gradient_", "write_gradient_"):
        monkeypatch.setattr(operators, function, refuse)
    weight = torch.nn.Parameter(torch.randn(VOCAB, DIM))  # which asks for its gradient whatever the mode
    with mode():
        fused_linear_cross_entropy(torch.randn(9, DIM), weight, torch.randint(VOCAB, (9,)))


def test_one_token_needs_no_batch_and_hidden_states_may_be_transposed() -> None:
    hidden, weight, labels = torch.randn(DIM, 9).t(), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(fused_linear_cross_entropy(hidden, weight, labels), losses.sum())
    torch.testing.assert_close(fused_linear_cross_entropy(hidden[2], weight, labels[2]), losses[2])


def test_labels_reach_the_kernels_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels read them one after the other."""
    seen = []
    compute = operators.statistics_and_gradient_

    def record(logits: Tensor, labels: Tensor, *others: Any) -> None:
        seen.append(labels.is_contiguous())
        compute(logits, labels, *others)

    monkeypatch.setattr(operators, "statistics_and_gradient_", record)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    for labels in (torch.randint(VOCAB, (9, 2))[:, 1], torch.tensor(5).expand(9), torch.randint(VOCAB, (9,))[::2]):
        fused_linear_cross_entropy(torch.randn(len(labels), DIM), weight, labels, budget_bytes=4 * BYTES)
    assert seen and all(seen)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functional_transforms_are_refused(transform: Callable[..., Callable[..., Tensor]]) -> None:
    weight, labels = torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    transformed = transform(lambda hidden: fused_linear_cross_entropy(hidden, weight, labels))
    with pytest.raises(RuntimeError, match="do not know .*: use torch.autograd and a batch dim of the hidden"):
        transformed(torch.randn(*([3] if transform is torch.func.vmap else []), 9, DIM))


@pytest.mark.parametrize("budget_bytes", [1 << 20, 7 * 2 * BYTES])
def test_float64_is_computed_in_float64(budget_bytes: int) -> None:
    """By gradcheck, and against torch. gradcheck goes backward through a graph several times: each builds its own."""
    weight, labels = torch.randn(VOCAB, DIM, dtype=torch.float64), torch.randint(VOCAB, (30,))
    hidden = torch.randn(30, DIM, dtype=torch.float64)
    labels[1::3] = IGNORE_INDEX
    labels[:4].clamp_(max=10)
    options = {"scale": 0.1, "budget_bytes": budget_bytes, "accum_dtype": torch.float32}  # which would be less

    class Repeatable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return fused_linear_cross_entropy(hidden, weight, labels[:4], **options)  # type: ignore[arg-type]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
            with torch.enable_grad():
                loss = fused_linear_cross_entropy(*leaves, labels[:4], **options)  # type: ignore[arg-type]
            return torch.autograd.grad(loss, leaves, grad)

    hidden.requires_grad_()
    weight.requires_grad_()
    few_words = weight[: int(labels[:4].max()) + 1].detach().requires_grad_()
    assert torch.autograd.gradcheck(Repeatable.apply, (hidden[:4].detach().requires_grad_(), few_words))
    loss = fused_linear_cross_entropy(hidden, weight, labels, **options)  # type: ignore[arg-type]
    expected = 0.1 * F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for mine, true in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


def test_a_number_as_scale_is_not_rounded_to_the_default_dtype() -> None:
    hidden, weight, labels = torch.randn(9, DIM), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    expected = fused_linear_cross_entropy(hidden, weight, labels, scale=torch.tensor(0.1234567))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fused_linear_cross_entropy(hidden, weight, labels, scale=0.1234567) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_statistics_of_parts_combine_to_those_of_the_whole() -> None:
    logits, labels = 5 * torch.randn(6, VOCAB), torch.randint(VOCAB, (6,))
    bounds = [0, 40, 40, 101]  # the second part is empty

    def terms(start: int) -> Terms:
        return Terms(VOCAB, start, label_smoothing=0.1, outputs=True)

    parts = [row_statistics(logits[:, first:last], labels, terms(first)) for first, last in pairwise(bounds)]
    torch.testing.assert_close(combine_statistics(torch.stack(parts)), row_statistics(logits, labels, terms(0)))


@pytest.mark.parametrize("logged", [True, False])
def test_training_has_the_walk_find_no_more_than_the_log_tells(logged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    compute = operators.cross_entropies

    def record(statistics: Tensor, *others: Any) -> Tensor:
        found.append(len(statistics))
        return compute(statistics, *others)

    monkeypatch.setattr(operators, "cross_entropies", record)
    sums = TokenSums(z_loss=0.01, predictions=True, by_sequence=True)
    sums.reset(logged=logged)
    head, hidden, labels = OutputHead(DIM, VOCAB), torch.randn(3, 5, DIM), torch.randint(VOCAB, (3, 5))
    labels[0, 1:] = IGNORE_INDEX
    loss = FusedLinearCrossEntropyLoss(budget_bytes=1 << 20, sums=sums)(hidden, head, labels, torch.tensor(0.5))
    logits = head(hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5).sum(-1)
    torch.testing.assert_close(sums.of_sequences, [expected.detach()])
    torch.testing.assert_close(loss, 0.5 * expected.sum())
    told = sums.scaled(torch.tensor(1.0))
    is_right = (logits.argmax(-1) == labels) & (labels != IGNORE_INDEX)
    assert found == [6 if logged else 3] and told.get("token_accuracy") == (is_right.sum() if logged else None)


@pytest.mark.parametrize("labels_are_on_the_host", [True, False])
def test_ignored_tokens_are_not_computed_where_the_host_has_the_labels(
    labels_are_on_the_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """126 of 256 tokens, rounded up to a multiple of 4; the outputs are of all tokens all the same."""
    hidden, weight = torch.randn(8, 32, DIM), torch.randn(VOCAB, DIM)
    labels = torch.randint(VOCAB, (8, 32))
    labels[4:], labels[0, :2] = IGNORE_INDEX, IGNORE_INDEX
    weights = torch.rand(8, 32)
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    losses = F.cross_entropy((leaves[0] @ leaves[1].t()).flatten(0, 1), labels.flatten(), reduction="none")
    expected = torch.autograd.grad((losses * weights.flatten()).sum(), leaves)

    walked = []
    compute = operators.statistics_and_gradient_

    def record(logits: Tensor, *others: Any) -> None:
        walked.append(len(logits))
        compute(logits, *others)

    monkeypatch.setattr(operators, "statistics_and_gradient_", record)
    if not labels_are_on_the_host:  # as on a GPU, where their number is not known to the host
        monkeypatch.setattr(fused_linear.ValidRows, "of", lambda labels, _: ValidRows(labels.flatten(), 256, None))
    mine = [t.requires_grad_() for t in (hidden, weight)]
    found = fused_linear_cross_entropy(*mine, labels, token_weights=weights, return_outputs=True)
    for gradient, true in zip(torch.autograd.grad(found.loss, mine), expected, strict=True):
        torch.testing.assert_close(gradient.double(), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.token_losses.double(), losses.detach().view(8, 32), rtol=1e-5, atol=1e-6)
    assert found.arg_max.shape == (8, 32) and bool((found.arg_max[4:] == IGNORE_INDEX).all())
    logprobs = linear_logprobs(*mine, labels).logprobs
    torch.testing.assert_close(logprobs, -found.token_losses)
    assert walked == ([128] if labels_are_on_the_host else [256])


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        ((4, DIM), (VOCAB, DIM + 1), (4,), "expected hidden"),
        ((4, DIM), (VOCAB, DIM), (5,), "expected hidden"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], weight: tuple[int, ...], labels: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(torch.randn(hidden), torch.randn(weight), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.int64, torch.int64),
        (torch.complex64, torch.complex64),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
    ],
)
def test_dtypes_that_it_does_not_compute_with_are_refused(hidden: torch.dtype, weight: torch.dtype) -> None:
    message = f"one dtype, bfloat16, float16, float32 or float64, got {hidden} and {weight}"
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(torch.ones(2, 3).to(hidden), torch.ones(5, 3).to(weight), torch.tensor([0, 1]))


def test_labels_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be int64, got torch\.int32"):
        fused_linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize("devices", [("cpu", "meta", "cpu"), ("cpu", "cpu", "meta"), ("meta", "cpu", "cpu")])
def test_tensors_on_several_devices_are_refused(devices: tuple[str, str, str]) -> None:
    tensors = (torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"one device, got {devices[0]}, {devices[1]} and {devices[2]}"):
        fused_linear_cross_entropy(*(t.to(device) for t, device in zip(tensors, devices, strict=True)))


def test_a_sharded_weight_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight = DTensor.from_local(torch.randn(5, 3), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"the weight is sharded: .*OutputHead.with_weight"):
            fused_linear_cross_entropy(torch.randn(2, 3), weight, torch.tensor([0, 1]))
    finally:
        dist.destroy_process_group()


def test_a_scale_for_each_token_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be a number or a 0-dim tensor"):
        fused_linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), scale=torch.ones(2))
