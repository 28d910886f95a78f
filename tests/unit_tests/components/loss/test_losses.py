"""Loss, hidden gradient and weight gradient of every loss against float64, over the edge cases."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

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
    CrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_linear,
    fused_linear_cross_entropy,
)
from torchtitan.components.loss.softmax_gradient import combine_statistics, row_statistics
from torchtitan.models.llama3.model.model import OutputHead

VOCAB, DIM = 101, 16
BYTES = 4 * VOCAB  # of one row of float32 logits

LOSSES: dict[str, Callable[..., Tensor]] = {
    "standard": CrossEntropyLoss(),
    "standard, compiled": CrossEntropyLoss(compile=True),
    "in-tree, one chunk": FusedLinearCrossEntropyLoss(budget_bytes=1 << 20),
    "in-tree, chunks of 7": FusedLinearCrossEntropyLoss(budget_bytes=7 * BYTES),
    "in-tree, chunks of 1": FusedLinearCrossEntropyLoss(budget_bytes=1),
    "in-tree, float32 sum": FusedLinearCrossEntropyLoss(budget_bytes=7 * BYTES, accum_dtype=torch.float32),
}
if find_spec("liger_kernel") and not torch.cuda.is_available():  # interpreted; test_liger.py has it on a GPU
    from torchtitan.components.loss.liger import LigerFusedLinearLoss

    LOSSES["Liger, one chunk"] = LigerFusedLinearLoss(budget_bytes=1 << 20)
    LOSSES["Liger, chunks of 16"] = LigerFusedLinearLoss(budget_bytes=16 * BYTES)


class Result(NamedTuple):
    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor

    def errors(self, truth: "Result") -> list[float]:
        """Relative to the truth; where that is zero, the norm itself."""
        return [
            float((mine.double() - true).norm() / (true.norm() or 1.0)) for mine, true in zip(self, truth, strict=True)
        ]


def make_labels(shape: tuple[int, int], ignored: str) -> Tensor:
    labels = torch.randint(VOCAB, shape)
    if ignored == "some":
        labels[torch.rand(shape) < 0.4] = IGNORE_INDEX
        labels[0, 0] = 3
    elif ignored == "a whole sequence":
        labels[0] = IGNORE_INDEX
    elif ignored == "all":
        labels[:] = IGNORE_INDEX
    return labels


def run(
    loss_fn: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    upstream: float = 1.0,
) -> Result:
    head = OutputHead(weight.shape[1], weight.shape[0])
    head.weight = torch.nn.Parameter(weight.clone())
    leaf = hidden.clone(memory_format=torch.preserve_format).requires_grad_()
    scale = 1 / (labels != IGNORE_INDEX).sum().clamp(min=1).float()
    loss = loss_fn(leaf, head, labels, scale)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (upstream * loss).backward()
    assert leaf.grad is not None and head.weight.grad is not None
    return Result(loss.detach(), leaf.grad, head.weight.grad)


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, *, upstream: float = 1.0) -> Result:
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    num_valid = (labels != IGNORE_INDEX).sum().clamp(min=1)
    total = F.cross_entropy((h @ w.t()).flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = total / num_valid
    d_hidden, d_weight = torch.autograd.grad(upstream * loss, (h, w))
    return Result(loss.detach(), d_hidden, d_weight)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("ignored", ["none", "some", "a whole sequence", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_float32_equals_oracle(name: str, ignored: str) -> None:
    hidden, weight, labels = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM), make_labels((2, 25), ignored)
    result = run(LOSSES[name], hidden, weight, labels)
    assert max(result.errors(oracle(hidden, weight, labels))) < 1e-6
    if ignored == "all":
        assert not result.loss and not result.d_hidden.any() and not result.d_weight.any()


@pytest.mark.parametrize("upstream", [0.0, 2.0, -3.5])
@pytest.mark.parametrize("name", LOSSES)
def test_upstream_gradient_scales_both_gradients(name: str, upstream: float) -> None:
    hidden, weight, labels = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM), make_labels((2, 25), "some")
    result = run(LOSSES[name], hidden, weight, labels, upstream=upstream)
    assert max(result.errors(oracle(hidden, weight, labels, upstream=upstream))) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)])
@pytest.mark.parametrize("name", LOSSES)
def test_few_tokens(name: str, shape: tuple[int, int]) -> None:
    hidden, weight, labels = torch.randn(*shape, DIM), torch.randn(VOCAB, DIM), make_labels(shape, "none")
    assert max(run(LOSSES[name], hidden, weight, labels).errors(oracle(hidden, weight, labels))) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_that_are_not_contiguous(name: str) -> None:
    hidden, weight, labels = (
        torch.randn(DIM, 6, 4).permute(2, 1, 0),
        torch.randn(VOCAB, DIM),
        make_labels((4, 6), "some"),
    )
    assert not hidden.is_contiguous()
    result = run(LOSSES[name], hidden, weight, labels, upstream=2.0)
    assert max(result.errors(oracle(hidden, weight, labels, upstream=2.0))) < 1e-6


# Triton's interpreter truncates to bf16 where a GPU rounds, so Liger's error is not its own here.
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.endswith("of 1") and "Liger" not in name])
def test_bfloat16_error_is_that_of_the_standard_loss(name: str) -> None:
    """One bf16 rounding more or less is the limit: the sum over chunks may round the weight gradient again."""
    hidden, weight = torch.randn(4, 32, DIM).bfloat16(), torch.randn(VOCAB, DIM).bfloat16()
    labels = make_labels((4, 32), "some")
    truth = oracle(hidden, weight, labels)
    standard = run(LOSSES["standard"], hidden, weight, labels).errors(truth)
    errors = run(LOSSES[name], hidden, weight, labels).errors(truth)
    num_chunks = 1 if "chunks of" not in name else 128 / 14  # bf16 rows take half the bytes
    allowed = [1.1, 1.1, 1.1 * num_chunks**0.5]
    assert all(e <= a * s + 1e-5 for e, a, s in zip(errors, allowed, standard, strict=True)), (errors, standard)


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_gives_the_same_loss(name: str) -> None:
    hidden, weight, labels = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM), make_labels((2, 25), "some")
    head = OutputHead(DIM, VOCAB)
    head.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        loss = LOSSES[name](hidden, head, labels, 1 / (labels != IGNORE_INDEX).sum().float())
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), oracle(hidden, weight, labels).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_only_the_loss_is_computed(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was computed")

    for function in ("loss_and_gradient_", "write_gradient_"):
        monkeypatch.setattr(fused_linear, function, refuse)
    weight = torch.nn.Parameter(torch.randn(VOCAB, DIM))  # which asks for its gradient whatever the mode
    with mode():
        fused_linear_cross_entropy(torch.randn(9, DIM), weight, torch.randint(VOCAB, (9,)))


def test_no_tokens_have_no_loss_and_zero_gradients() -> None:
    hidden, weight = torch.randn(0, DIM, requires_grad=True), torch.randn(VOCAB, DIM, requires_grad=True)
    loss = fused_linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and weight.grad is not None and not weight.grad.any()


def test_one_token_needs_no_batch_and_hidden_states_may_be_transposed() -> None:
    hidden, weight, labels = torch.randn(DIM, 9).t(), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    torch.testing.assert_close(fused_linear_cross_entropy(hidden, weight, labels), losses.sum())
    torch.testing.assert_close(fused_linear_cross_entropy(hidden[2], weight, labels[2]), losses[2])


def test_labels_reach_the_kernels_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels read them one after the other."""
    seen = []
    compute = fused_linear.loss_and_gradient_

    def record(logits: Tensor, labels: Tensor, scale: Tensor, losses: Tensor) -> None:
        seen.append(labels.is_contiguous())
        compute(logits, labels, scale, losses)

    monkeypatch.setattr(fused_linear, "loss_and_gradient_", record)
    weight = torch.randn(VOCAB, DIM, requires_grad=True)
    for labels in (torch.randint(VOCAB, (9, 2))[:, 1], torch.tensor(5).expand(9), torch.randint(VOCAB, (9,))[::2]):
        fused_linear_cross_entropy(torch.randn(len(labels), DIM), weight, labels, budget_bytes=4 * BYTES)
    assert seen and all(seen)


@pytest.mark.parametrize("label", [-1, -101, VOCAB, VOCAB + 50])
def test_a_label_outside_the_vocabulary_makes_the_loss_infinite(label: int) -> None:
    """The host does not wait for the device to raise an error; but no other token's loss is made of it either."""
    labels = torch.tensor([3, label, 5])
    for num_rows in (1, 3):
        loss = fused_linear_cross_entropy(
            torch.randn(3, DIM), torch.randn(VOCAB, DIM), labels, budget_bytes=num_rows * BYTES
        )
        assert loss == float("inf")


def test_a_second_backward_is_refused_and_changes_nothing() -> None:
    hidden, weight = torch.randn(9, DIM, requires_grad=True), torch.randn(VOCAB, DIM, requires_grad=True)
    loss = fused_linear_cross_entropy(hidden, weight, torch.randint(VOCAB, (9,)))
    gradients = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    before = [gradient.clone() for gradient in gradients]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(2 * loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = torch.randn(9, DIM, requires_grad=True), torch.randn(VOCAB, DIM)
    loss = fused_linear_cross_entropy(hidden, weight, torch.randint(VOCAB, (9,)))
    with pytest.raises(RuntimeError, match="no second derivative: leave create_graph off"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_frozen_weight_or_hidden_state_gets_no_gradient() -> None:
    hidden, weight, labels = torch.randn(9, DIM), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    truth = oracle(hidden, weight, labels)
    for leaf, frozen, true in ((hidden, weight, truth.d_hidden), (weight, hidden, truth.d_weight)):
        leaf.requires_grad_()
        frozen.requires_grad_(False).grad = None
        (fused_linear_cross_entropy(hidden, weight, labels, budget_bytes=4 * BYTES) / 9).backward()
        assert frozen.grad is None and leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), true, rtol=1e-5, atol=1e-7)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = 100 * torch.randn(8, DIM), 10 * torch.randn(VOCAB, DIM), torch.randint(VOCAB, (8,))
    result = run(LOSSES["in-tree, chunks of 7"], hidden.unsqueeze(0), weight, labels.unsqueeze(0))
    assert all(torch.isfinite(part).all() for part in result)
    torch.testing.assert_close(result.loss.double(), oracle(hidden, weight, labels).loss, rtol=1e-5, atol=0)


def test_the_target_of_a_sure_prediction_keeps_its_gradient() -> None:
    """p - 1 is taken before rounding: in bf16, p itself would round to 1 and the gradient to 0."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)  # p = 0.99909
    result = run(LOSSES["in-tree, one chunk"], hidden.unsqueeze(0), weight, torch.tensor([[0]]))
    true = oracle(hidden, weight, torch.tensor([0])).d_weight
    torch.testing.assert_close(result.d_weight.double(), true, rtol=1e-2, atol=0)


def test_statistics_of_parts_combine_to_those_of_the_whole() -> None:
    logits, labels = 5 * torch.randn(6, VOCAB), torch.randint(VOCAB, (6,))
    labels[2] = IGNORE_INDEX
    bounds = [0, 40, 40, 101]  # the second part is empty
    parts = [row_statistics(logits[:, first:last], labels, start=first) for first, last in pairwise(bounds)]
    lse, losses = combine_statistics(torch.stack(parts), labels)
    torch.testing.assert_close(lse, logits.logsumexp(dim=1))
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))


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


def test_dtypes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        fused_linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3).bfloat16(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels must be int64, got torch\.int32"):
        fused_linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1], dtype=torch.int32))


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
