"""Runners of a microbatch; what those of pipelines compute is in test_pipeline_parallel.py."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit_tests.distributed.layouts import ARGS
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss, EvalLoss, cross_entropy_sum
from torchtitan.components.runner import EagerRunner, Runner, build_runner
from torchtitan.config import ConfigError
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.pipeline_parallel import PipelineRunner
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import parallelize_transformer
from torchtitan.protocols.sequences import Sequences


def test_validation_uses_the_standard_path() -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("validation called the loss of training")

    model, tokens = build_model(), some_tokens()
    loss = EagerRunner(model, refuse).eval_loss(tokens[:, :-1], tokens[:, 1:], None)
    one = torch.tensor(1.0)
    expected = EagerRunner(model, CrossEntropyLoss()).forward_backward(tokens[:, :-1], tokens[:, 1:], None, one)
    torch.testing.assert_close(loss, expected)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes, views aside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_validation_never_holds_more_logits_than_its_budget(dtype: torch.dtype) -> None:
    vocab_size, rows = 5000, 3
    budget_bytes = rows * vocab_size * 4 * dtype.itemsize  # beside the logits, three copies
    model = Transformer(replace(ARGS(), vocab_size=vocab_size)).to(dtype)
    init_parameters(model, seed=1, device="cpu")
    tokens, labels = torch.randint(vocab_size, (2, 3, 7))
    labels[0, :4] = IGNORE_INDEX
    runner = EagerRunner(model, CrossEntropyLoss(), eval_loss=EvalLoss(budget_bytes=budget_bytes))
    with LargestTensor() as made:
        loss = runner.eval_loss(tokens, labels, None)
    assert made.numel == rows * vocab_size < labels.numel() * vocab_size
    torch.testing.assert_close(loss, cross_entropy_sum(model(tokens), labels).detach())


def test_positions_reach_the_model() -> None:
    model, tokens = build_model(), some_tokens()
    runner, one = EagerRunner(model, CrossEntropyLoss()), torch.tensor(1.0)
    sequences = Sequences(torch.arange(8).flip(0).expand(2, -1))
    training = [runner.forward_backward(tokens[:, :-1], tokens[:, 1:], s, one) for s in (None, sequences)]
    evaluation = [runner.eval_loss(tokens[:, :-1], tokens[:, 1:], s) for s in (None, sequences)]
    for in_order, reversed_order in (training, evaluation):
        assert not torch.isclose(in_order, reversed_order, rtol=1e-4)
    torch.testing.assert_close(training, evaluation)


def build_model() -> Transformer:
    model = Transformer(ARGS())
    init_parameters(model, seed=1, device="cpu")
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(8)  # so that attention counts
    return model


def some_tokens() -> torch.Tensor:
    return torch.randint(ARGS().vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def last_of_two() -> Iterator[None]:
    """A process group that only pretends: this is rank 1 of 2."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("last_of_two")
def test_a_pipeline_sums_with_the_loss_that_it_is_given() -> None:
    dims = ParallelDims(pp=2)
    mesh = build_mesh(dims, "cpu")
    parallelism, training = Parallelism(pipeline_parallel_degree=2), Training(local_batch_size=2, seq_len=16)
    loss = CrossEntropyLoss()
    runner = build_runner(
        partial(Transformer, ARGS()),
        ARGS(),
        loss,
        parallelize=partial(
            parallelize_transformer,
            mesh=mesh,
            parallel_dims=dims,
            parallelism=parallelism,
            training=training,
            block_modes=("none",) * ARGS().n_layers,
            loss_parallel=False,
        ),
        mesh=mesh,
        parallelism=parallelism,
        training=training,
        device=torch.device("cpu"),
        seed=7,
    )
    assert isinstance(runner, PipelineRunner)
    assert runner.loss.sum is loss.sum


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build_alone(
    model_cls: type[Transformer] = Transformer, *, training: Training | None = None, **options: Any
) -> Runner:
    """Of one process."""
    dims, training = ParallelDims(), training or Training()
    mesh = build_mesh(dims, "cpu")
    return build_runner(
        partial(model_cls, ARGS()),
        ARGS(),
        CrossEntropyLoss(),
        parallelize=partial(
            parallelize_transformer,
            mesh=mesh,
            parallel_dims=dims,
            parallelism=Parallelism(),
            training=training,
            block_modes=("none",) * ARGS().n_layers,
            loss_parallel=False,
        ),
        mesh=mesh,
        parallelism=Parallelism(),
        training=training,
        device=torch.device("cpu"),
        seed=7,
        **options,
    )


@pytest.mark.usefixtures("alone")
def test_documents_need_a_model_that_keeps_them_apart() -> None:
    class Averager(Transformer):
        keeps_documents_apart = False

    masked = Training(document_mask=True)
    build_alone(Averager)
    build_alone(training=masked)
    with pytest.raises(ConfigError, match=r"^training.document_mask needs .* Averager does not say"):
        build_alone(Averager, training=masked)


@pytest.mark.usefixtures("alone")
def test_weights_of_another_dtype_are_the_float32_ones_rounded() -> None:
    weights = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = build_alone(weight_dtype=dtype)
        (model,) = runner.model_parts
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
        weights.append([weight.detach().bfloat16() for weight in model.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)
