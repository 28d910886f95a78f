"""The Triton kernels against their plain torch twins: interpreted without a GPU, compiled with one."""

from itertools import product

import pytest
import torch

from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy, softmax_gradient

pytest.importorskip("triton")
from torchtitan.components.loss import softmax_gradient_triton
from torchtitan.components.loss.terms import Coefficients, Terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_chunk(rows: int, columns: int, dtype: torch.dtype, *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    storage = 5 * torch.randn(rows, columns + padding, generator=generator)
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[rows // 2] = IGNORE_INDEX
    return storage.to(dtype).to(DEVICE)[:, :columns], labels.to(DEVICE)


def terms(logits: torch.Tensor, start: int = 0) -> Terms:
    return Terms(vocab_size=logits.shape[1], start=start)


def losses_of(statistics: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return softmax_gradient.cross_entropies(statistics, labels, terms(logits)).cpu()


def assert_one_rounding_apart(mine: torch.Tensor, other: torch.Tensor) -> None:
    tolerance = 2 * torch.finfo(mine.dtype).eps
    torch.testing.assert_close(mine.cpu(), other.cpu(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "padding"), [(5, 101, 0), (3, 128, 24), (2, 1, 0), (2, 40_001, 0)])
def test_loss_and_gradient(rows: int, columns: int, padding: int, dtype: torch.dtype) -> None:
    logits, labels = make_chunk(rows, columns, dtype, padding=padding)
    scale = torch.tensor(0.37, device=DEVICE).expand(rows)
    expected_statistics, expected = torch.empty(3, rows), logits.cpu().clone()
    softmax_gradient.statistics_and_gradient_(expected, labels.cpu(), scale.cpu(), expected_statistics, terms(expected))
    statistics = torch.full((3, rows), float("nan"), device=DEVICE)
    softmax_gradient_triton.statistics_and_gradient_(logits, labels, scale, statistics, terms(logits))
    losses, expected_losses = (losses_of(s, labels.to(s.device), logits) for s in (statistics, expected_statistics))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert_one_rounding_apart(logits, expected)


@pytest.mark.parametrize("start", [0, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_statistics_and_gradient(dtype: torch.dtype, start: int) -> None:
    logits, labels = make_chunk(6, 101, dtype)
    labels[labels != IGNORE_INDEX] += 40
    on_cpu, cpu_labels = logits.cpu().clone(), labels.cpu()
    statistics = softmax_gradient_triton.row_statistics(logits, labels, terms(logits, start)).cpu()
    expected = softmax_gradient.row_statistics(on_cpu, cpu_labels, terms(logits, start))
    is_valid = cpu_labels != IGNORE_INDEX
    torch.testing.assert_close(statistics[:, is_valid], expected[:, is_valid], rtol=1e-5, atol=1e-5)

    row_max, row_sum = logits.float().amax(dim=1) + 1, logits.float().sub(logits.max()).exp().sum(dim=1) + 1
    coefficients = Coefficients(factor=0.37 / row_sum, target=row_sum)
    softmax_gradient_triton.write_gradient_(logits, labels, row_max, coefficients, terms(logits, start))
    coefficients = Coefficients(factor=0.37 / row_sum.cpu(), target=row_sum.cpu())
    softmax_gradient.write_gradient_(on_cpu, cpu_labels, row_max.cpu(), coefficients, terms(logits, start))
    assert_one_rounding_apart(logits, on_cpu)


@pytest.mark.parametrize("factor", [1.0, -0.3])
@pytest.mark.parametrize("size", [0, 1, 4096, 50_001])
def test_multiply_unless_one(size: int, factor: float) -> None:
    tensor = torch.randn(size, device=DEVICE)
    expected = tensor * factor
    softmax_gradient_triton.multiply_unless_one_(tensor, torch.tensor(factor, device=DEVICE))
    torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_zeros_stay_zeros_whatever_they_are_multiplied_by(factor: float) -> None:
    tensor = torch.tensor([0.0, 2.0, 0.0], device=DEVICE)
    softmax_gradient_triton.multiply_unless_one_(tensor, torch.tensor(factor, device=DEVICE))
    torch.testing.assert_close(tensor.cpu(), torch.tensor([0.0, factor, 0.0]), equal_nan=True)


@pytest.mark.parametrize("top", [1.0, 100.0, 1000.0])
def test_a_sure_token_is_as_exact_as_in_torch(top: float) -> None:
    """Logits of which one leads by 9: a loss near 1e-2, which is lost in a logsumexp rounded to the size of the top."""
    logits = torch.full((2, 101), top - 9.0) + torch.rand(2, 101, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = top
    labels, leaf = torch.tensor([7, 7]), logits.double().requires_grad_()
    true = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    (d_true,) = torch.autograd.grad(true.sum(), leaf)
    here, together, on_device = logits.to(DEVICE), torch.empty(3, 2, device=DEVICE), labels.to(DEVICE)
    apart, d_apart, scale = softmax_gradient_triton.row_statistics(here, on_device, terms(here)), here.clone(), 1.0
    coefficients = softmax_gradient.loss_coefficients(apart, on_device, torch.tensor(scale), terms(here))
    softmax_gradient_triton.write_gradient_(d_apart, on_device, apart[0], coefficients, terms(here))
    softmax_gradient_triton.statistics_and_gradient_(
        here, on_device, torch.full((2,), scale, device=DEVICE), together, terms(here)
    )
    for statistics, d_mine in ((together, here), (apart, d_apart)):
        mine = losses_of(statistics, on_device, here)
        torch.testing.assert_close(mine.double(), true.detach(), rtol=2e-5, atol=0)
        torch.testing.assert_close(d_mine.cpu().double(), d_true, rtol=2e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1001, 32_001), (129, 128_257), (70_001, 32_003)])
def test_gpu_path_equals_plain_torch_to_bfloat16_rounding(num_tokens: int, vocab_size: int) -> None:
    """V and T odd; the last case passes 2**31 logits in one chunk, so that 32-bit offsets would fail."""
    dim = 64
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab_size, dim, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens, 2), device="cuda")[:, 1]  # with gaps
    labels[::7] = IGNORE_INDEX
    loss = fused_linear_cross_entropy(hidden, weight, labels, scale=1 / num_tokens, budget_bytes=8 << 30)
    loss.backward()

    total = torch.zeros((), device="cuda")
    d_weight = torch.zeros(vocab_size, dim, device="cuda")
    for rows in torch.arange(num_tokens, device="cuda").split(4096):
        h = hidden.detach()[rows].float().requires_grad_()
        w = weight.detach().float().requires_grad_()
        logits = (h @ w.t()).bfloat16().float()  # the same rounding as the product's
        part = torch.nn.functional.cross_entropy(logits, labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
        d_h, d_w = torch.autograd.grad(part / num_tokens, (h, w))
        assert hidden.grad is not None
        assert (hidden.grad[rows].float() - d_h).norm() < 6e-3 * d_h.norm()
        total += part.detach() / num_tokens
        d_weight += d_w
    torch.testing.assert_close(loss.detach(), total, rtol=1e-4, atol=0)
    assert weight.grad is not None
    assert (weight.grad.float() - d_weight).norm() < 6e-3 * d_weight.norm()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    hidden = torch.randn(2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    on_host = torch.randint(1000, (2048,)).pin_memory()
    on_host[::2] = IGNORE_INDEX
    factor = torch.tensor(3.0, device="cuda")
    scales = (None, 1.0), (torch.float32, torch.tensor(0.01, device="cuda"))
    all_labels = (on_host, on_host.cuda(), torch.full_like(on_host, IGNORE_INDEX))  # the last: pinned nowhere
    # one chunk, two
    for (accum_dtype, scale), budget, labels in product(scales, (8 << 20, 1100 * 2000), all_labels):
        for debug_mode in ("default", "error"):  # the first round compiles the kernels
            torch.cuda.set_sync_debug_mode(debug_mode)
            try:
                loss = fused_linear_cross_entropy(
                    hidden, weight, labels, scale=scale, budget_bytes=budget, accum_dtype=accum_dtype
                )
                (loss * factor).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    gradients = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        hidden = torch.randn(50, 16).to(device).requires_grad_()
        weight = torch.randn(101, 16).to(device).requires_grad_()
        labels = torch.randint(101, (50,)).to(device)
        (2 * fused_linear_cross_entropy(hidden, weight, labels, budget_bytes=1 << 12)).backward()
        assert hidden.grad is not None and weight.grad is not None
        gradients.append((hidden.grad.cpu(), weight.grad.cpu()))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.gpu
def test_float64_on_a_gpu_is_computed_in_float64_and_waits_for_nothing() -> None:
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, device="cuda", requires_grad=True) for n in (50, 101))
    labels = torch.randint(101, (50,), device="cuda")
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = fused_linear_cross_entropy(hidden, weight, labels, budget_bytes=8 * 101 * 20)
        gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, expected)
    for mine, true in zip(gradients, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("label", [-1, -101, 10, 13])
def test_a_label_outside_the_vocabulary_reads_no_other_row(label: int) -> None:
    """Ten logits of 0 between rows of other values: the loss is infinite, and not made of the neighbours."""
    logits = torch.tensor([777.0, 0.0, 1000.0], device=DEVICE).unsqueeze(1).repeat(1, 10)
    labels, scale = torch.tensor([0, label, 0], device=DEVICE), torch.ones(3, device=DEVICE)
    statistics = softmax_gradient_triton.row_statistics(logits, labels, terms(logits))
    losses = {"apart": losses_of(statistics, labels, logits)}
    softmax_gradient_triton.statistics_and_gradient_(logits, labels, scale, statistics, terms(logits))
    losses["in one pass"] = losses_of(statistics, labels, logits)
    for name, found in losses.items():
        torch.testing.assert_close(
            found, torch.tensor([10.0, float("inf"), 10.0]).log(), msg=name, rtol=1e-4, atol=1e-4
        )
