from functools import partial
from unittest.mock import patch

import torch

from tests.unit_tests.distributed.layouts import ARGS, get_batch, get_gradients, loss_sum
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mixed_precision import apply_mixed_precision
from torchtitan.models.common.model import Transformer


def build_model() -> Transformer:
    model = Transformer(ARGS())
    init_parameters(model, seed=7, device="cpu")
    return model


def test_forward_equals_that_of_low_precision_weights() -> None:
    tokens, _ = get_batch()
    low = build_model()
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    mixed = build_model()
    apply_mixed_precision(mixed, torch.bfloat16)
    logits = mixed(tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, low(tokens), rtol=0, atol=0)


def test_weights_and_gradients_stay_float32() -> None:
    model, (tokens, labels) = build_model(), get_batch()
    names = list(model.state_dict())
    apply_mixed_precision(model, torch.bfloat16)
    hidden = model(tokens, return_hidden_states=True)
    seen = []

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((hidden.dtype, weight.dtype))
        return loss_sum(hidden @ weight.T, labels)

    model.output.with_weight(loss, hidden).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert list(model.state_dict()) == names
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in get_gradients(model).values()} == {torch.float32}


def test_gradients_are_near_those_of_float32() -> None:
    tokens, labels = get_batch()
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model()
        apply_mixed_precision(model, dtype)
        loss_sum(model(tokens), labels).backward()
        gradients.append(get_gradients(model))
    exact, mixed = gradients
    for name, expected in exact.items():
        error = (mixed[name] - expected).norm() / expected.norm()
        assert 0 < error < 0.05, name


def test_blocks_stay_alike_for_torch_compile() -> None:
    """Each block of its own kind would be compiled of its own, and torch gives up after eight."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Transformer(ARGS(n_layers=12))
    init_parameters(model, seed=7, device="cpu")
    apply_mixed_precision(model, torch.bfloat16)
    with patch("torch.compile", partial(torch.compile, backend="eager")):
        apply_compile(model)
    model(get_batch()[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
