"""A model family that brings its own loss: the trainer uses it, and refuses it where it cannot."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tests.integration_tests.lives import errors, read_steps, train
from tests.integration_tests.tiny_sizes import TINY
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.protocols.model import OutputHead
from torchtitan.protocols.train_spec import ModelCode, TrainSpec, get_train_spec, register_train_spec

OWN = "--model.name doubled --training.steps 2"


def doubled(hidden: Tensor, head: OutputHead, labels: Tensor, scale: Tensor) -> Tensor:
    return 2 * CrossEntropyLoss(compile=False)(hidden, head, labels, scale)


def register() -> None:
    def load() -> ModelCode:
        return replace(get_train_spec("tiny_llama3").load(), build_loss=lambda liger_kernel, **_: doubled)

    register_train_spec("doubled", TrainSpec(flavors={"tiny": TINY}, load=load))


def test_the_loss_of_a_family_is_the_one_that_trains(tmp_path: Path) -> None:
    train(tmp_path / "standard", "--training.steps 2")
    train(tmp_path / "own", OWN, hook=register)
    standard, own = read_steps(tmp_path / "standard")[1], read_steps(tmp_path / "own")[1]
    assert (own.loss, own.grad_norm) == (2 * standard.loss, 2 * standard.grad_norm)


def test_a_pipeline_refuses_it(tmp_path: Path) -> None:
    life = train(
        tmp_path / "run", f"{OWN} --parallelism.pipeline_parallel_degree 2", world_size=2, hook=register, status=1
    )
    assert any("the model has a loss of its own" in line for line in errors(life))
