"""What the trainer refuses without the check before the start: one message and status 1, not a traceback."""

from dataclasses import replace
from pathlib import Path

from tests.integration_tests.lives import errors, train
from tests.integration_tests.tiny_sizes import TINY
from torchtitan.models.llama3 import train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec


def register() -> None:
    flavors = {"tiny": replace(TINY, vocab_size=1999)}  # the tokenizer has 2000 ids
    register_train_spec("small", TrainSpec(flavors=flavors, load=train_spec.load))


def test_a_tokenizer_that_is_too_large_for_a_family_of_the_user(tmp_path: Path) -> None:
    life = train(tmp_path / "run", "--model.name small", hook=register, status=1)
    (error,) = errors(life)
    assert "TokenizerError: model.tokenizer_path=" in error
    assert error.endswith(
        "makes token ids up to 1999, and small tiny has a vocabulary of 1999;"
        " use a smaller tokenizer or a model.flavor with a larger vocabulary"
    )


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    life = train(tmp_path / "run", "--experimental.custom_import no_such_module", status=1)
    (error,) = errors(life)
    assert "ConfigError: experimental.custom_import=no_such_module: there is no such module" in error
