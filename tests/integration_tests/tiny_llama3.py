"""A model family for experimental.custom_import. A test that imports it shows it to all later tests."""

from tests.integration_tests.tiny_sizes import ODD, TINY
from torchtitan.models.llama3 import train_spec
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

register_train_spec("tiny_llama3", TrainSpec(flavors={"tiny": TINY, "odd": ODD}, load=train_spec.load))
