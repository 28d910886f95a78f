"""Loss, hidden gradient and weight gradient of every loss against float64, over the edge cases."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.components.loss import (
    IGNORE_INDEX,
    CrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    TokenSums,
)
from torchtitan.models.common.model import OutputHead

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
FUSED = [name for name in LOSSES if "standard" not in name]


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


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
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


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_have_no_loss_and_zero_gradients(name: str) -> None:
    result = run(LOSSES[name], torch.randn(2, 0, DIM), torch.randn(VOCAB, DIM), torch.zeros(2, 0, dtype=torch.int64))
    assert result.loss == 0 and result.d_hidden.shape == (2, 0, DIM) and not result.d_weight.any()


@pytest.mark.parametrize("label", [-1, -101, VOCAB, VOCAB + 5])
@pytest.mark.parametrize("name", FUSED)
def test_a_label_outside_the_vocabulary_makes_the_loss_infinite(name: str, label: int) -> None:
    """The host does not wait for the device to raise an error; but no other token's loss is made of it either."""
    head = OutputHead(DIM, VOCAB)
    for labels in ([3, label, 5], [label], [IGNORE_INDEX, label]):
        hidden = torch.randn(1, len(labels), DIM, requires_grad=True)
        loss = LOSSES[name](hidden, head, torch.tensor([labels]), torch.tensor(0.5))
        loss.backward()
        assert loss == float("inf") and torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("name", FUSED)
def test_a_second_backward_is_refused_and_changes_nothing(
    name: str, hooks: Callable[[], AbstractContextManager[None]]
) -> None:
    hidden, head = torch.randn(1, 9, DIM, requires_grad=True), OutputHead(DIM, VOCAB)
    with hooks():
        loss = LOSSES[name](hidden, head, torch.randint(VOCAB, (1, 9)), torch.tensor(1.0))
    gradients = torch.autograd.grad(3 * loss, (hidden, head.weight), retain_graph=True)
    before = [gradient.clone() for gradient in gradients]
    with pytest.raises(RuntimeError, match="goes backward once.*: call the loss again, or go backward through the sum"):
        torch.autograd.grad(2 * loss, (hidden, head.weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_a_second_derivative_is_refused(name: str) -> None:
    hidden = torch.randn(1, 9, DIM, requires_grad=True)
    loss = LOSSES[name](hidden, OutputHead(DIM, VOCAB), torch.randint(VOCAB, (1, 9)), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="no second derivative: leave create_graph off, or use cross_entropy_sum"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_frozen_gets_no_gradient_and_the_other_the_right_one(name: str, frozen: str) -> None:
    hidden, weight, labels = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM), make_labels((2, 25), "some")
    truth = oracle(hidden, weight, labels)
    head = OutputHead(DIM, VOCAB)
    head.weight = torch.nn.Parameter(weight, requires_grad=frozen == "hidden")
    hidden.requires_grad_(frozen == "weight")
    loss = LOSSES[name](hidden, head, labels, 1 / (labels != IGNORE_INDEX).sum().float())
    torch.testing.assert_close(loss.detach().double(), truth.loss, rtol=1e-6, atol=0)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        (2 * loss).backward()
    for leaf, true in ((hidden, truth.d_hidden), (head.weight, truth.d_weight)):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), 2 * true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in FUSED if name.endswith("one chunk")])  # the counter misses sums
def test_ignored_tokens_are_not_computed(name: str) -> None:
    """Of 16 tokens; their products are three."""
    hidden, weight, labels = torch.randn(2, 8, DIM), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (2, 8))
    products = []
    for num_valid in (16, 5, 0):
        labels.view(-1)[num_valid:] = IGNORE_INDEX
        with FlopCounterMode(display=False) as counter:
            run(LOSSES[name], hidden, weight, labels)
        products.append(counter.get_total_flops())
    assert products == [3 * 2 * num_valid * VOCAB * DIM for num_valid in (16, 5, 0)]


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", [name for name in FUSED if "Liger" not in name])
def test_ignored_tokens_have_no_gradient_whatever_comes_from_above(name: str, factor: float) -> None:
    hidden, weight = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM)
    labels = make_labels((2, 25), "a whole sequence")
    d_hidden = run(LOSSES[name], hidden, weight, labels, upstream=factor).d_hidden
    assert not d_hidden[0].any() and not torch.isfinite(d_hidden[1]).any()
    assert not run(LOSSES[name], hidden, weight, make_labels((2, 25), "all"), upstream=factor).d_weight.any()


@pytest.mark.parametrize("name", FUSED)
def test_hidden_states_of_ignored_tokens_may_be_anything(name: str) -> None:
    """They reach neither the loss nor any hidden gradient, but 0 * nan reaches the weight's, as in torch."""
    hidden, weight = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM)
    hidden[0] = float("nan")
    labels = make_labels((2, 25), "a whole sequence")
    result, true = run(LOSSES[name], hidden, weight, labels), oracle(hidden[1:], weight, labels[1:])
    torch.testing.assert_close(result.loss.double(), true.loss, rtol=1e-6, atol=0)
    assert not result.d_hidden[0].any()
    torch.testing.assert_close(result.d_hidden[1:].double(), true.d_hidden, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", [name for name in LOSSES if "Liger" not in name])
def test_a_sure_token_is_as_exact_as_in_torch(name: str, top: float) -> None:
    """One logit leads by 9: the loss near 1e-2 is lost in a logsumexp that is rounded to the size of the top."""
    hidden = torch.eye(DIM)[:2].unsqueeze(0)  # logits are the weight's first two columns, exactly
    weight = torch.full((VOCAB, DIM), top - 9.0) + torch.rand(VOCAB, DIM)
    weight[7] = top
    labels = torch.tensor([[7, 7]])
    result, true = run(LOSSES[name], hidden, weight, labels), oracle(hidden, weight, labels)
    torch.testing.assert_close(result.loss.double(), true.loss, rtol=2e-5, atol=0)
    torch.testing.assert_close(result.d_weight[:, :2].double(), true.d_weight[:, :2], rtol=2e-5, atol=0)


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


@pytest.mark.parametrize("name", ["standard", "in-tree", "Liger"])
def test_the_z_loss_is_told_apart_but_its_gradient_is_in(name: str) -> None:
    hidden, weight, labels = torch.randn(2, 25, DIM), torch.randn(VOCAB, DIM), make_labels((2, 25), "some")
    sums = TokenSums(z_loss=0.01)
    if name == "in-tree":
        loss_fn: Callable[..., Tensor] = FusedLinearCrossEntropyLoss(budget_bytes=7 * BYTES, sums=sums)
    elif name == "Liger":
        if "Liger, one chunk" not in LOSSES:
            pytest.skip("liger-kernel is interpreted without a GPU only")
        loss_fn = LigerFusedLinearLoss(budget_bytes=1 << 20, sums=sums)
    else:
        loss_fn = CrossEntropyLoss(sums=sums)
    result = run(loss_fn, hidden, weight, labels)

    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    log_z = (leaves[0] @ leaves[1].t()).logsumexp(dim=-1)[labels != IGNORE_INDEX]
    plain, added = oracle(hidden, weight, labels), 0.01 * log_z.square().sum()
    assert relative(sums.scaled(torch.tensor(1.0))["z_loss"], added) < 1e-5 and relative(result.loss, plain.loss) < 1e-5
    of_z = torch.autograd.grad(added / len(log_z), leaves)
    truth = Result(plain.loss, plain.d_hidden + of_z[0], plain.d_weight + of_z[1])
    assert max(result.errors(truth)) < 1e-5


def relative(mine: Tensor | float, true: Tensor) -> float:
    return abs(float(mine) / float(true.detach()) - 1)
