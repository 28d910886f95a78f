"""A dense decoder's family from what is its own. Imports no torch until its code is loaded."""

from collections.abc import Mapping
from functools import partial

from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.hf_config import HFConfig
from torchtitan.protocols.train_spec import ModelCode, TrainSpec


def build_train_spec(flavors: Mapping[str, TransformerModelArgs], hf_config: HFConfig) -> TrainSpec:
    return TrainSpec(flavors, partial(_load, hf_config), hf_config)


def _load(hf_config: HFConfig) -> ModelCode:
    from torchtitan.models.common.model import Transformer
    from torchtitan.models.common.parallelize import TENSOR_PARALLEL_PLAN, parallelize_transformer
    from torchtitan.models.common.state_dict_adapter import TransformerStateDictAdapter

    return ModelCode(
        Transformer,
        parallelize_transformer,
        partial(TransformerStateDictAdapter, hf_config=hf_config),
        tensor_parallel_plan=TENSOR_PARALLEL_PLAN,
    )
