"""One optimizer over all model parts: what it computes, and what it keeps in a checkpoint."""

import copy

import pytest
import torch
from torch import Tensor, nn

from torchtitan.components.optimizer import OptimizersContainer, build_optimizer, get_weight_dtype
from torchtitan.config.sections import Optimizer, Training

ONE, GO = torch.tensor(1.0), torch.tensor(False)
IMPLEMENTATIONS = ["for-loop", "foreach", "fused"]


def make_parts() -> list[nn.Module]:
    """Two stages of one model: the names of their parameters do not meet."""
    torch.manual_seed(0)
    return [nn.ModuleDict({"first": nn.Linear(4, 3)}), nn.ModuleDict({"second": nn.Linear(3, 2)})]


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_bfloat16_weights_have_bfloat16_moments_and_take_the_rounded_step(implementation):
    assert get_weight_dtype(Training(dtype="bfloat16"), Optimizer()) == torch.bfloat16
    assert get_weight_dtype(Training(), Optimizer()) == torch.float32
    torch.manual_seed(0)
    part = nn.Linear(4, 3).bfloat16()
    twin = copy.deepcopy(part).double()
    config = Optimizer(lr=0.1, implementation=implementation)
    for p, q in zip(part.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn(p.shape).bfloat16()
        q.grad = p.grad.double()
    optimizer = build_optimizer([part], config)
    optimizer.step(grad_factor=torch.tensor(1.0), skip=torch.tensor(False))
    torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    moments = {key: value for key, value in optimizer.state_dict().items() if "exp_avg" in key}
    assert {moment.dtype for moment in moments.values()} == {torch.bfloat16}
    for p, q in zip(part.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2**-7, atol=2**-9)


def set_grads(parts: list[nn.Module], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        for parameter in part.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(parts: list[nn.Module], optimizer: OptimizersContainer, *seeds: int) -> list[Tensor]:
    for seed in seeds:
        set_grads(parts, seed)
        optimizer.step(grad_factor=ONE, skip=GO)
        optimizer.zero_grad()
    return weights(parts)


def weights(parts: list[nn.Module]) -> list[Tensor]:
    return [parameter.detach().clone() for part in parts for parameter in part.parameters()]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_all_parts_take_the_step_of_the_textbook(name, implementation):
    config = Optimizer(name=name, lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    config.implementation = implementation
    parts = make_parts()
    before = [weight.double() for weight in weights(parts)]
    optimizer = build_optimizer(parts, config)
    set_grads(parts, seed=1)
    grads = [parameter.grad.double() for part in parts for parameter in part.parameters()]
    optimizer.step(grad_factor=ONE, skip=GO)
    for weight, grad, after in zip(before, grads, weights(parts), strict=True):
        if name == "Adam":
            grad = grad + 0.5 * weight
        else:
            weight = weight * (1 - 0.1 * 0.5)
        # after one step the corrected moments are grad and grad**2
        torch.testing.assert_close(after.double(), weight - 0.1 * grad / (grad.abs() + 1e-3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipped_step_changes_neither_weights_nor_moments(implementation):
    parts = make_parts()
    optimizer = build_optimizer(parts, Optimizer(implementation=implementation))
    train(parts, optimizer, 1)
    weights_before, state_before = weights(parts), copy.deepcopy(optimizer.state_dict())
    set_grads(parts, seed=2)
    parts[0]["first"].weight.grad.fill_(float("nan"))
    optimizer.step(grad_factor=ONE, skip=torch.tensor(True))
    assert_same(weights(parts), weights_before)
    torch.testing.assert_close(optimizer.state_dict(), state_before, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grad_factor_scales_the_gradients(implementation):
    """Adam hardly sees the scale in the weights: the moments do."""
    parts, scaled_parts = make_parts(), make_parts()
    optimizer, scaled = (
        build_optimizer(p, Optimizer(implementation=implementation, eps=1e-2)) for p in (parts, scaled_parts)
    )
    set_grads(scaled_parts, seed=1)
    scaled.step(grad_factor=torch.tensor(0.25), skip=GO)
    set_grads(parts, seed=1)
    for part in parts:
        for parameter in part.parameters():
            parameter.grad *= 0.25
    optimizer.step(grad_factor=ONE, skip=GO)
    assert_same(weights(scaled_parts), weights(parts))
    torch.testing.assert_close(scaled.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_what_follows_a_step_does_not_follow_the_making_of_the_moments():
    parts, seen = make_parts(), []
    optimizer = OptimizersContainer(parts, torch.optim.AdamW, fused=True, after_step=seen.append)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == []
    train(parts, optimizer, 1)
    assert seen == parts


def test_zero_grad_frees_the_gradients_of_all_parts():
    parts = make_parts()
    optimizer = build_optimizer(parts, Optimizer())
    set_grads(parts, seed=1)
    optimizer.zero_grad()
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


def test_state_is_keyed_by_parameter_name_over_all_parts():
    parts = make_parts()
    optimizer = build_optimizer(parts, Optimizer())
    train(parts, optimizer, 1)
    names = ["first.weight", "first.bias", "second.weight", "second.bias"]
    expected = {f"state.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq")}
    assert optimizer.state_dict().keys() == {"state.step", *expected}
    assert optimizer.state_dict()["state.step"] == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_restored_optimizer_takes_the_same_steps(implementation):
    config = Optimizer(implementation=implementation)
    parts = make_parts()
    optimizer = build_optimizer(parts, config)
    train(parts, optimizer, 1, 2)
    saved, resumed_parts = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(parts)
    resumed = build_optimizer(resumed_parts, config)
    resumed.load_state_dict(saved)
    assert_same(train(resumed_parts, resumed, 3, 4), train(parts, optimizer, 3, 4))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(implementation, name):
    parts, untouched_parts = make_parts(), make_parts()
    optimizer = build_optimizer(parts, Optimizer(name=name, implementation=implementation))
    untouched = build_optimizer(untouched_parts, Optimizer(name=name, implementation=implementation))
    state = optimizer.state_dict()
    assert all(not value.any() for value in state.values())
    assert_same(train(parts, optimizer, 1, 2), train(untouched_parts, untouched, 1, 2))


def test_configuration_decides_the_constants_after_a_resume():
    parts = make_parts()
    optimizer = build_optimizer(parts, Optimizer(lr=0.1, weight_decay=0.0))
    train(parts, optimizer, 1)
    resumed = build_optimizer(parts, Optimizer(lr=0.2, weight_decay=0.3, beta1=0.5))
    resumed.load_state_dict(optimizer.state_dict())
    assert {(group["lr"], group["weight_decay"], group["betas"]) for group in resumed.param_groups} == {
        (0.2, 0.3, (0.5, 0.95))
    }


def test_frozen_parameters_stay_as_they_are():
    parts = make_parts()
    parts[0]["first"].weight.requires_grad_(False)
    optimizer = build_optimizer(parts, Optimizer(weight_decay=0.5))
    before = parts[0]["first"].weight.clone()
    train(parts, optimizer, 1)
    assert torch.equal(parts[0]["first"].weight, before)
    assert "state.first.weight.exp_avg" not in optimizer.state_dict()
