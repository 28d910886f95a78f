"""A model family for experimental.custom_import. A test that imports it shows it to all later tests."""

from dataclasses import replace

from tests.integration_tests.tiny_sizes import ODD, TINY
from torchtitan.models.llama3 import train_spec
from torchtitan.protocols.train_spec import ModelCode, TrainSpec, register_train_spec


def _load() -> ModelCode:
    from tests.integration_tests.tiny_model import AttentiveTransformer

    return replace(train_spec.load(), model_cls=AttentiveTransformer)


register_train_spec("tiny_llama3", TrainSpec(flavors={"tiny": TINY, "odd": ODD}, load=_load))
