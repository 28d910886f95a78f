"""The loss as torch's compiler and its CUDA graphs see it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy, linear_logprobs
from torchtitan.components.loss.operators import linear_cross_entropy, linear_logprobs_backward
from torchtitan.components.loss.operators import linear_logprobs as logprobs_operator

VOCAB, DIM, TOKENS = 41, 8, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    labels[3] = IGNORE_INDEX
    leaves = [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((TOKENS, DIM), (VOCAB, DIM))]
    return *leaves, torch.randn(VOCAB, device=DEVICE, requires_grad=True), labels


def test_the_loss_passes_torchs_own_checks() -> None:
    hidden, weight, bias, labels = make_problem()
    bias.requires_grad_(False)
    factors, class_weights = torch.rand(TOKENS, device=DEVICE), torch.rand(VOCAB, device=DEVICE)
    options = [5.0, 1e-2, 0.1], True, [True, True, False], torch.float32, 4 * VOCAB * 4, [], ""
    arguments = (hidden, weight, bias, labels, factors, class_weights, *options)
    torch.library.opcheck(linear_cross_entropy, arguments)


def test_log_probabilities_pass_torchs_own_checks() -> None:
    hidden, weight, bias, labels = make_problem()
    arguments = (hidden, weight, bias, labels, [5.0, 0.0, 0.0], torch.float32, 4 * VOCAB * 4, [], "")
    torch.library.opcheck(logprobs_operator, arguments)
    *_, statistics = logprobs_operator(*arguments)
    above = torch.rand(2, TOKENS, device=DEVICE)
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(linear_logprobs_backward, (*above.unbind(), statistics, [True, False, True], *inputs))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_model_and_loss_compile_into_one_graph(backend: str) -> None:
    hidden, weight, bias, labels = make_problem()
    matrix = torch.randn(DIM, DIM, device=DEVICE, requires_grad=True)

    def step(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        states = F.gelu(hidden @ matrix)
        out = fused_linear_cross_entropy(states, weight, labels, scale=0.1, z_loss=1e-2, bias=bias, return_outputs=True)
        logprobs, entropies = linear_logprobs(states, weight, labels)
        return out.loss + (logprobs.exp() * entropies).sum(), out.entropies

    leaves = (hidden, weight, bias, matrix)
    results: list[Any] = []
    for fn in (step, torch.compile(step, fullgraph=True, backend=backend)):
        loss, entropies = fn(hidden, labels)
        results.append((loss.detach(), entropies, *torch.autograd.grad(3 * loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward() -> None:
    hidden, weight, bias, labels = make_problem()
    leaves = (hidden, weight, bias)

    def step() -> list[Tensor]:
        loss = fused_linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=1e-2, softcap=9.0)
        logprobs, _ = linear_logprobs(hidden, weight, labels, bias=bias)
        return [loss.detach(), *torch.autograd.grad(loss + logprobs.exp().sum(), leaves)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.mul_(1.5)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=1e-4, atol=1e-5)


def test_a_distillation_loss_is_that_of_logits() -> None:
    """The student learns what its teacher gives to each token's likeliest words, beyond which nothing counts."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    teacher, words = torch.randn(5, 37).log_softmax(-1).topk(3)  # (T, 3)
    found = linear_logprobs(hidden.unsqueeze(1).expand(-1, 3, -1), weight, words, budget_bytes=4 * 37 * 4).logprobs
    loss = (teacher.exp() * (teacher - found)).sum(-1).mean()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    student = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, words)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    mine = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(mine, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
