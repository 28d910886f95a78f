"""Compact states: exact where bits are joined, unbiased where they are rounded, and AdamW in the end."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit_tests.distributed.layouts import ARGS
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.compact_optimizer import (
    CompactAdamW,
    _draw,
    _get_compiled_update,
    _round,
    _update,
    join_weight,
    split_weight,
)
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import ConfigError
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Optimizer, Parallelism, Training
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import parallelize_transformer

ONE, GO, SALT = torch.tensor(1.0), torch.tensor(False), torch.tensor(5, dtype=torch.int32)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 3)).bfloat16()


def build(model: nn.Module, **options: Any) -> CompactAdamW:
    optimizer = build_optimizer([model], Optimizer(state_precision="compact", **options))
    assert isinstance(optimizer, CompactAdamW)
    return optimizer


def set_grads(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def train(model: nn.Module, optimizer: Any, *seeds: int) -> dict[str, Tensor]:
    for seed in seeds:
        set_grads(model, seed)
        optimizer.step(grad_factor=ONE, skip=GO)
        optimizer.zero_grad()
    return copy.deepcopy({**model.state_dict(), **optimizer.state_dict()})


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def all_kinds_of_weights() -> Tensor:
    torch.manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    weights = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-130, 1e-45])])
    return weights[weights.abs() < 1e38]


def test_weights_of_24_bits_are_joined_without_loss() -> None:
    exact = (all_kinds_of_weights().view(torch.int32) & ~0xFF).view(torch.float32)
    upper, correction = split_weight(exact, _draw(exact, SALT))
    assert_same(upper.bfloat16().float(), upper)
    assert (upper - exact).abs().le((exact.bfloat16().float() - exact).abs()).all()  # the nearest there is
    assert_same(join_weight(upper.bfloat16(), correction), exact)


def test_other_weights_are_rounded_to_a_neighbour_and_on_average_to_themselves() -> None:
    weights = all_kinds_of_weights()
    step = ((weights.view(torch.int32) & ~0xFF) + 0x100).view(torch.float32) - (weights.view(torch.int32) & ~0xFF).view(
        torch.float32
    )
    upper, correction = split_weight(weights, _draw(weights, SALT))
    errors = (join_weight(upper.bfloat16(), correction) - weights) / step
    assert errors.abs().max() < 1
    assert abs(errors.double().mean()) < 5 / len(errors) ** 0.5


@pytest.mark.parametrize("shift", [0, 12])
def test_levels_are_rounded_on_average_to_themselves(shift: int) -> None:
    torch.manual_seed(0)
    for low, high in ((0.2, 0.3), (20.05, 20.5), (254.0, 255.0)):
        x = torch.empty(200_000).uniform_(low, high)
        rounded = _round(x, _draw(x, SALT) >> shift)
        assert rounded.unique().tolist() == [int(low), int(low) + 1]
        assert abs((rounded - x).double().mean()) < 0.005
    whole = torch.arange(256.0)
    assert_same(_round(whole, _draw(whole, SALT)), whole)


def test_follows_adamw_of_float64() -> None:
    """Fifty steps with gradients of a mean and much noise, as in training; judged by how far the weights have moved."""
    config = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    model = make_model()
    reference = copy.deepcopy(model).double()
    start = {name: weight.clone() for name, weight in reference.named_parameters()}
    optimizer = build(model, **config)
    exact = torch.optim.AdamW(
        reference.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(50):
        set_grads(model, seed=step)
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            own.grad += 0.3
            other.grad = own.grad.double() * 0.5
        optimizer.step(grad_factor=torch.tensor(0.5), skip=GO)
        exact.step()
    exported = optimizer.export_weights(dict(model.named_parameters()))
    for name, weight in reference.named_parameters():
        assert exported[name].dtype == torch.float32
        moved = (weight - start[name]).norm()
        assert (exported[name].double() - weight).norm() < 0.02 * moved, name


def test_updates_far_below_a_bf16_step_add_up() -> None:
    model = make_model()
    before = build(model).export_weights(dict(model.named_parameters()))["0.weight"]
    optimizer = build(model, lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(grad_factor=ONE, skip=GO)
    moved = optimizer.export_weights(dict(model.named_parameters()))["0.weight"] - before
    torch.testing.assert_close(moved.mean(), torch.tensor(-1e-4), rtol=0.01, atol=0)


def test_what_is_nearly_zero_in_a_group_takes_no_giant_step() -> None:
    model = nn.Linear(128, 1, bias=False).bfloat16()
    optimizer = build(model, lr=1.0, weight_decay=0.0)
    before = model.weight.detach().clone()
    for step in range(20):
        model.weight.grad = torch.full((1, 128), 1e-7 * (-1) ** step, dtype=torch.bfloat16)
        model.weight.grad[0, 0] = 1e4
        optimizer.step(grad_factor=ONE, skip=GO)
        assert (model.weight.detach() - before).abs().max() < 6
        before = model.weight.detach().clone()


def test_skipped_step_changes_nothing() -> None:
    model = make_model()
    optimizer = build(model)
    before = train(model, optimizer, 1, 2)
    set_grads(model, 3)
    model[0].weight.grad.fill_(float("nan"))
    optimizer.step(grad_factor=torch.tensor(float("nan")), skip=torch.tensor(True))
    assert_same({**model.state_dict(), **optimizer.state_dict()}, before)


def test_restored_optimizer_takes_the_same_steps() -> None:
    model = make_model()
    optimizer = build(model)
    train(model, optimizer, 1, 2)
    saved, resumed_model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    resumed = build(resumed_model)
    resumed.load_state_dict(saved)
    assert_same(train(resumed_model, resumed, 3, 4), train(model, optimizer, 3, 4))


def test_five_bytes_a_parameter() -> None:
    model = nn.Linear(1024, 1024, bias=False).bfloat16()
    states = build(model).state_dict().values()
    assert sum(t.nbytes for t in [model.weight, *states]) / model.weight.numel() == pytest.approx(5.06, abs=0.01)


def test_the_learning_rate_and_the_constants_are_the_configurations() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = build(model, lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert_same(dict(model.state_dict()), dict(before))


def parallelized(dims: ParallelDims, **sizes: int) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ARGS(**sizes)).bfloat16()
    parallelize_transformer(
        model,
        mesh=build_mesh(dims, "cpu"),
        parallel_dims=dims,
        parallelism=Parallelism(),
        training=Training(),
        block_modes=("none",) * len(model.layers),
        loss_parallel=False,
    )
    model.to_empty(device="cpu")
    return model


def sharded_steps(degrees: dict[str, int], **options: bool) -> dict[str, Tensor]:
    """All of a tiny model and its states after two steps, whole."""
    model = parallelized(ParallelDims(**degrees), dim=256, ffn_hidden_dim=256, **options)
    init_parameters(model, seed=3, device="cpu")
    optimizer = build(model, lr=1e-2)
    for seed in (1, 2):
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
            grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = grad
        optimizer.step(grad_factor=ONE, skip=GO)
    exported = optimizer.export_weights(dict(model.named_parameters()))
    state = {**optimizer.state_dict(), **exported}
    return {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in state.items()}


def all_layouts() -> list[dict[str, Tensor]]:
    both = {"dp_shard": 2, "tp": 2}
    return [sharded_steps({"dp_shard": 4}), sharded_steps(both), sharded_steps(both, tie_embeddings=True)]


def test_every_layout_takes_the_same_steps_to_the_bit() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        alone = [sharded_steps({}, tie_embeddings=tied) for tied in (False, False, True)]
    finally:
        dist.destroy_process_group()
    assert alone[0].keys() - alone[2].keys() == {name for name in alone[0] if "output.weight" in name} != set()
    for results in run_processes(all_layouts, 4):
        assert_same(results, alone)


def test_a_group_that_is_cut_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match=r"groups of 32 neighbours.*wo.weight, of shape \(32, 32\), through one"):
            build(parallelized(ParallelDims(tp=2), dim=32, ffn_hidden_dim=64))
    finally:
        dist.destroy_process_group()


def test_a_parameter_has_the_same_kernel_in_every_step() -> None:
    """Also in the first after a resume, where a kernel that another size of groups has made would not be there yet."""
    used: list[int] = []
    kernels: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        number = len(kernels)
        kernels.append(graph)

        def run(*args: Any) -> Any:
            used.append(number)
            return graph(*args)

        return run

    torch._dynamo.reset()
    update = _get_compiled_update(count)
    numbers: dict[str, Any] = {name: torch.tensor(0.5) for name in ("grad_factor", "step_size", "decay", "bias2")}
    numbers |= {"skip": GO, "salt": SALT, "betas": (0.9, 0.95), "eps": 1e-8}
    model = nn.Sequential(nn.Linear(256, 40), nn.Linear(192, 9), nn.Linear(128, 8), nn.Linear(64, 3)).bfloat16()
    states = build(model)._states.values()
    for _ in range(3):
        set_grads(model, 3)
        for state in states:
            update(*state.groups(), **numbers)
    assert used == [0, 1, 2, 1, 0, 1, 2, 1] * 3  # groups of 128, 1, 64, 1, ...


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_update_is_the_eager_one() -> None:
    """But for the last bit of a root or a quotient, on which the rounding by chance depends."""
    torch.manual_seed(0)
    whole = [torch.randn(5000, 128), torch.randn(5000, 128)]
    states = [torch.randint(0, 100, (5000, 128)).to(dtype) for dtype in (torch.int8, torch.int8, torch.uint8)]
    groups = [*(t.bfloat16() for t in whole), *states, torch.rand(5000, 1), torch.rand(5000, 1)]
    eager = [t.cuda() for t in groups]
    compiled = [t.cuda() for t in groups]
    numbers = {"grad_factor": 0.5, "skip": False, "step_size": 1e-3, "decay": 0.999, "bias2": 0.3}
    arguments: dict[str, Any] = {name: torch.tensor(value, device="cuda") for name, value in numbers.items()}
    arguments |= {"salt": SALT.cuda(), "betas": (0.9, 0.95), "eps": 1e-8}
    _update(*eager, **arguments)
    _get_compiled_update()(*compiled, **arguments)
    joined = [join_weight(weight, correction) for _, weight, correction, *_ in (eager, compiled)]
    torch.testing.assert_close(*joined, rtol=2.0**-14, atol=0)
    for left, right in zip(eager[3:5], compiled[3:5], strict=True):
        assert (left.float() - right.float()).abs().max() <= 1
    torch.testing.assert_close(eager[5:], compiled[5:], rtol=1e-6, atol=0)
