"""Every option of the in-tree loss and every output against float64 from logits: plain torch, and Triton's kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy, linear_logprobs, softmax_gradient

VOCAB, DIM, TOKENS = 101, 16, 9
BYTES = 4 * VOCAB  # of one row of float32 logits
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator().manual_seed(0)
BIAS = torch.randn(VOCAB, generator=GENERATOR)
TOKEN_WEIGHTS = torch.rand(TOKENS, generator=GENERATOR)
CLASS_WEIGHTS = torch.rand(VOCAB, generator=GENERATOR) + 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "token weights": {"token_weights": TOKEN_WEIGHTS},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "label smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "class weights": {"class_weights": CLASS_WEIGHTS},
    "class weights, smoothed": {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.2},
    "bias": {"bias": BIAS},
    "z-loss and softcap": {"z_loss": 1e-2, "softcap": 3.0, "scale": 0.3},
    "all": {
        "token_weights": TOKEN_WEIGHTS,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "label_smoothing": 0.1,
        "class_weights": CLASS_WEIGHTS,
        "bias": BIAS,
        "scale": 0.3,
    },
}


@pytest.fixture(params=["plain torch", "Triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the loss runs; Triton's kernels are interpreted without a GPU."""
    if request.param == "plain torch":
        return "cpu"
    pytest.importorskip("triton")
    monkeypatch.setattr(softmax_gradient, "runs_on_triton", lambda tensor: tensor.dtype != torch.float64)
    return DEVICE


def make_problem(num_tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCAB, (num_tokens,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return (*(torch.randn(n, DIM, generator=generator) for n in (num_tokens, VOCAB)), labels)


def make_logits(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, softcap: float = 0.0) -> Tensor:
    logits = hidden @ weight.t() + (bias if bias is not None else 0.0)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def oracle(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    **of_logits: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the cross entropies of the tokens, and their logits."""
    logits = make_logits(hidden, weight, **of_logits)
    losses = F.cross_entropy(
        logits,
        labels,
        weight=class_weights,
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    z_losses = torch.where(labels == IGNORE_INDEX, 0.0, z_loss * logits.logsumexp(dim=1) ** 2)
    weights = token_weights if token_weights is not None else 1.0
    return scale * (weights * (losses + z_losses)).sum(), losses, logits


def double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def leaf(tensor: Tensor, device: str) -> Tensor:
    return tensor.detach().to(device, copy=True).requires_grad_()


def relative_error(mine: Tensor, true: Tensor) -> float:
    return float((mine.cpu().double() - true).norm() / (true.norm() or 1.0))


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_gradients_and_outputs_equal_float64(name: str, device: str) -> None:
    """In two chunks, one of 7 tokens and one of 2."""
    budget_bytes = 7 * BYTES
    hidden, weight, labels = make_problem()
    exact = {key: double(value) for key, value in OPTIONS[name].items()}
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    if "bias" in exact:
        leaves.append(exact["bias"].requires_grad_())
    expected, losses, logits = oracle(*leaves[:2], labels, **exact)
    gradients = torch.autograd.grad(expected, leaves)

    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in OPTIONS[name].items()}
    mine = [leaf(hidden, device), leaf(weight, device)]
    if "bias" in options:
        mine.append(leaf(options["bias"], device))
        options["bias"] = mine[2]
    found = fused_linear_cross_entropy(
        mine[0], mine[1], labels.to(device), budget_bytes=budget_bytes, return_outputs=True, **options
    )
    (2 * found.loss).backward()
    assert relative_error(found.loss.detach(), expected.detach()) < 2e-6
    for own, true in zip(mine, gradients, strict=True):
        assert own.grad is not None and relative_error(own.grad, 2 * true) < 2e-6

    is_valid, p = labels != IGNORE_INDEX, logits.softmax(dim=1)
    arg_max = logits.argmax(dim=1)
    outputs = {
        "token_losses": losses,
        "log_sum_exps": logits.logsumexp(dim=1),
        "entropies": -(p * p.log()).sum(dim=1),
        "correct": (arg_max == labels).double(),
    }
    for output, true in outputs.items():
        assert relative_error(getattr(found, output), torch.where(is_valid, true.detach(), 0.0)) < 2e-6, output
    assert torch.equal(found.arg_max.cpu(), torch.where(is_valid, arg_max, IGNORE_INDEX))

    without = fused_linear_cross_entropy(mine[0], mine[1], labels.to(device), budget_bytes=budget_bytes, **options)
    torch.testing.assert_close(without, found.loss, rtol=1e-6, atol=0)
    with torch.no_grad():  # and of the walk that computes no gradient
        alone = fused_linear_cross_entropy(mine[0], mine[1], labels.to(device), budget_bytes=budget_bytes, **options)
    torch.testing.assert_close(alone, found.loss, rtol=1e-6, atol=0)


def test_the_first_of_equal_logits_is_the_arg_max(device: str) -> None:
    """Also where they are far apart; the label must be the one."""
    weight, hidden = torch.ones(40_000, 1, device=device), torch.ones(2, 1, device=device)
    weight[[7, 20, 39_999]] = 2.0
    labels = torch.tensor([7, 20], device=device)
    found = fused_linear_cross_entropy(hidden, weight, labels, return_outputs=True)
    assert found.arg_max.tolist() == [7, 7] and found.correct.tolist() == [True, False]


def test_words_excluded_by_the_bias(device: str) -> None:
    """-inf also for a whole block of a kernel: they have neither a probability nor a gradient."""
    vocab = 40_000
    hidden, weight = torch.randn(3, 4, device=device), torch.randn(vocab, 4, device=device)
    bias = torch.full((vocab,), -float("inf"), device=device)
    bias[-50:] = 0
    labels = torch.tensor([vocab - 1, vocab - 50, IGNORE_INDEX], device=device)
    hidden.requires_grad_()
    found = fused_linear_cross_entropy(hidden, weight, labels, bias=bias, return_outputs=True)
    logits = hidden[:2] @ weight[-50:].t()
    expected = F.cross_entropy(logits, labels[:2] - vocab + 50, reduction="none")
    torch.testing.assert_close(found.token_losses[:2], expected.detach(), rtol=1e-5, atol=1e-6)
    p = logits.detach().softmax(dim=1)
    torch.testing.assert_close(found.entropies[:2], -(p * p.log()).sum(dim=1), rtol=1e-5, atol=1e-6)
    (mine,), (true,) = (torch.autograd.grad(loss, hidden, retain_graph=True) for loss in (found.loss, expected.sum()))
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    results = linear_logprobs(hidden, weight, labels, bias=bias)
    (mine,), (true,) = (
        torch.autograd.grad(value.sum(), hidden, retain_graph=True)
        for value in (results.entropies, -(logits.softmax(dim=1) * logits.log_softmax(dim=1)))
    )
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": BIAS, "softcap": 3.0}], ids=["plain", "bias and softcap"])
def test_logprobs_and_entropies_of_any_function_equal_float64(options: dict[str, Any], device: str) -> None:
    hidden, weight, labels = make_problem()
    is_valid, chosen = labels != IGNORE_INDEX, labels.clamp(min=0).unsqueeze(1)
    leaves = [t.double().requires_grad_() for t in (hidden, weight, BIAS)]
    bias = {"bias": leaves[2]} if "bias" in options else {}
    logits = make_logits(leaves[0], leaves[1], softcap=options.get("softcap", 0.0), **bias)
    logp = logits.log_softmax(dim=1)
    true_logprobs = torch.where(is_valid, logp.gather(1, chosen).squeeze(1), 0.0)
    true_entropies = torch.where(is_valid, -(logp.exp() * logp).sum(dim=1), 0.0)

    mine = [t.to(device).requires_grad_() for t in (hidden, weight, BIAS.clone())]
    own = options | ({"bias": mine[2]} if "bias" in options else {})
    logprobs, entropies = linear_logprobs(mine[0], mine[1], labels.to(device), budget_bytes=7 * BYTES, **own)
    assert relative_error(logprobs.detach(), true_logprobs.detach()) < 2e-6
    assert relative_error(entropies.detach(), true_entropies.detach()) < 2e-6

    def objective(logprobs: Tensor, entropies: Tensor) -> Tensor:
        return (logprobs.sigmoid() * torch.arange(TOKENS, device=logprobs.device)).sum() + (entropies**2).sum()

    count = 3 if bias else 2
    for retain in (True, False):  # nothing is handed out: backward may come again
        found = torch.autograd.grad(objective(logprobs, entropies), mine[:count], retain_graph=retain)
        expected = torch.autograd.grad(objective(true_logprobs, true_entropies), leaves[:count], retain_graph=retain)
        assert all(relative_error(g, true) < 3e-6 for g, true in zip(found, expected, strict=True))


def test_gradcheck_in_float64() -> None:
    """Of all options together; numbers against the gradients of one forward pass, and of logprobs."""
    hidden, weight, labels = (double(t) for t in make_problem(5))
    hidden, weight, bias = hidden[:, :4].contiguous(), weight[:11, :4].contiguous(), double(BIAS[:11])
    labels = labels.clamp(max=10)
    options = OPTIONS["all"] | {"class_weights": CLASS_WEIGHTS[:11], "token_weights": TOKEN_WEIGHTS[:5]}
    options = {key: double(value) for key, value in options.items() if key != "bias"}

    class Repeatable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *leaves: Tensor) -> Tensor:
            ctx.save_for_backward(*leaves)
            return fused_linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
            with torch.enable_grad():
                loss = fused_linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
            return torch.autograd.grad(loss, leaves, grad)

    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(Repeatable.apply, leaves)
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(linear_logprobs(h, w, labels, bias=b, softcap=4.0, budget_bytes=8 * 11 * 2)), leaves
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["z-loss and softcap", "all"])
def test_half_precision_errors_are_those_of_logits(name: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = (t.to(dtype) if t.is_floating_point() else t for t in make_problem())
    truth = [double(t).requires_grad_() for t in (hidden, weight)]
    true = torch.autograd.grad(oracle(*truth, labels, **{k: double(v) for k, v in OPTIONS[name].items()})[0], truth)
    standard, mine = ([t.detach().clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    logits = F.linear(*standard).float()  # rounded, as those of the fused loss
    eye = torch.eye(VOCAB)
    theirs = torch.autograd.grad(oracle(logits, eye, labels, **OPTIONS[name])[0], standard)
    options = OPTIONS[name] | ({"bias": BIAS} if name == "all" else {})
    found = torch.autograd.grad(fused_linear_cross_entropy(*mine, labels, **options), mine)
    for g, t, exact in zip(found, theirs, true, strict=True):
        assert relative_error(g, exact) <= 1.1 * relative_error(t, exact) + 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(VOCAB + 1)}, r"bias must have the shape \(101,\), got \(102,\)"),
        ({"class_weights": torch.zeros(3)}, r"class_weights must have the shape \(101,\), got \(3,\)"),
        ({"token_weights": torch.zeros(3)}, r"token_weights must have the shape \(9,\), got \(3,\)"),
        ({"softcap": -1.0}, "softcap and z_loss must be finite and at least 0, .*got -1.0, 0.0 and 0.0"),
        ({"z_loss": float("nan")}, "softcap and z_loss must be finite"),
        ({"label_smoothing": 1.5}, "label_smoothing between 0 and 1, got 0.0, 0.0 and 1.5"),
        ({"scale": torch.ones(TOKENS)}, "0-dim tensor, got the shape .*use token_weights"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(*make_problem(), **options)
