"""Model families for experimental.custom_import. A test that imports it shows them to all later tests."""

from dataclasses import replace
from functools import partial

from tests.integration_tests.tiny_sizes import ODD, QWEN3, TINY
from torchtitan.models import llama3, qwen3
from torchtitan.protocols.train_spec import ModelCode, TrainSpec, register_train_spec


def _load(spec: TrainSpec) -> ModelCode:
    from tests.integration_tests.tiny_model import AttentiveTransformer

    return replace(spec.load(), model_cls=AttentiveTransformer)


register_train_spec("tiny_llama3", TrainSpec({"tiny": TINY, "odd": ODD}, load=partial(_load, llama3.train_spec)))
register_train_spec("tiny_qwen3", TrainSpec({"odd": QWEN3}, load=partial(_load, qwen3.train_spec)))
