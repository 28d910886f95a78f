"""Each feature of the in-tree loss in every dtype, in one chunk and in several, with each side frozen.

The features are those that Liger's and Apple CCE's own tests vary; docs/liger_kernel.md has how many cases each has.
Gradients and outputs are held to float64, and may be as far off as what plain torch makes of logits, which are rounded.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit_tests.components.loss.test_terms import (
    CLASS_WEIGHTS,
    OPTIONS,
    TOKENS,
    VOCAB,
    double,
    make_logits,
    make_problem,
    oracle,
    relative_error,
)
from torchtitan.components.loss import IGNORE_INDEX, fused_linear_cross_entropy, linear_logprobs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FEATURES = OPTIONS | {
    "mean": {"scale": 1 / TOKENS},
    "class weights and softcap": {"class_weights": CLASS_WEIGHTS, "softcap": 3.0},
}
OUTPUTS = ["token losses", "log-sum-exps", "entropies", "predictions", "logprobs"]
CHUNKS = {"one chunk": TOKENS, "chunks of 4": 4}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_size = pytest.mark.parametrize("chunks", CHUNKS)


def budget_of(chunks: str, dtype: torch.dtype) -> int:
    return CHUNKS[chunks] * VOCAB * dtype.itemsize


def assert_as_exact(mine: Tensor, of_logits: Tensor, exact: Tensor, dtype: torch.dtype, *, num_chunks: int = 1) -> None:
    """As what plain torch makes of the logits, but for one more rounding a chunk of a sum over chunks."""
    allowed = 1.2 * num_chunks**0.5 * relative_error(of_logits, exact)
    assert relative_error(mine, exact) <= allowed + {torch.float64: 1e-13}.get(dtype, 3e-6)


@pytest.mark.parametrize("frozen", ["nothing frozen", "hidden frozen", "weight frozen"])
@every_size
@every_dtype
@pytest.mark.parametrize("feature", FEATURES)
def test_loss_and_gradients(feature: str, dtype: torch.dtype, chunks: str, frozen: str) -> None:
    hidden, weight, labels = make_problem()
    given = [t.to(dtype) for t in (hidden, weight)]
    options = FEATURES[feature]
    needs = [frozen != "hidden frozen", frozen != "weight frozen"]

    def run(leaves: list[Tensor], loss: Any) -> list[Tensor]:
        leaves = [leaf.detach().clone().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
        total = loss(*leaves)
        return [total.detach(), *torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])]

    def of_logits(h: Tensor, w: Tensor) -> Tensor:
        own = {key: value for key, value in options.items() if key != "bias"}
        logits = F.linear(h, w)  # rounded to the dtype, then as in float32
        computed = logits.to(torch.promote_types(dtype, torch.float32)) + options.get("bias", 0.0)
        eye = torch.eye(VOCAB, dtype=computed.dtype)
        return oracle(computed, eye, labels, **{key: _as(value, computed.dtype) for key, value in own.items()})[0]

    exact_options = {key: double(value) for key, value in options.items()}
    exact = run([double(t) for t in given], lambda h, w: oracle(h, w, labels, **exact_options)[0])
    standard = run(given, of_logits)
    mine = run(
        given,
        lambda h, w: fused_linear_cross_entropy(h, w, labels, budget_bytes=budget_of(chunks, dtype), **options),
    )
    for found, other, true in zip(mine, standard, exact, strict=True):
        assert_as_exact(found, other, true, dtype, num_chunks=-(-TOKENS // CHUNKS[chunks]))


@every_size
@every_dtype
@pytest.mark.parametrize("feature", ["plain", "softcap", "bias", "z-loss"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs(output: str, feature: str, dtype: torch.dtype, chunks: str) -> None:
    hidden, weight, labels = make_problem()
    given = [t.to(dtype) for t in (hidden, weight)]
    options = FEATURES[feature] | {"budget_bytes": budget_of(chunks, dtype)}
    found = fused_linear_cross_entropy(*given, labels, return_outputs=True, **options)
    is_valid = labels != IGNORE_INDEX
    of_logits = {key: double(value) for key, value in FEATURES[feature].items() if key in ("bias", "softcap")}
    exact = make_logits(*map(double, given), **of_logits)
    rounded = make_logits(double(F.linear(*given)), torch.eye(VOCAB, dtype=torch.float64), **of_logits)
    if output == "predictions":
        likeliest = exact.gather(1, found.arg_max.clamp(min=0).unsqueeze(1)).squeeze(1)
        assert bool((likeliest >= exact.amax(1) * (1 - 4 * torch.finfo(dtype).eps))[is_valid].all())
        assert torch.equal(found.correct, is_valid & (found.arg_max == labels))
        return

    def of(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(1)
        chosen = logp.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        values = {
            "token losses": -chosen,
            "log-sum-exps": logits.logsumexp(1),
            "entropies": -(logp.exp() * logp).sum(1),
            "logprobs": chosen,
        }
        return torch.where(is_valid, values[output], 0.0)

    mine = {
        "token losses": found.token_losses,
        "log-sum-exps": found.log_sum_exps,
        "entropies": found.entropies,
        "logprobs": linear_logprobs(
            *given, labels, **{key: value for key, value in options.items() if key != "z_loss"}
        ).logprobs,
    }[output]
    assert_as_exact(mine, of(rounded), of(exact), dtype)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value
