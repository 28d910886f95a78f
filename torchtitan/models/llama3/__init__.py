"""Llama 3: flavors.py its sizes, model/ the maths, infra/ how it is divided over devices, train_configs/ ready runs."""

from torchtitan.models.llama3.flavors import llama3_flavors
from torchtitan.protocols.train_spec import ModelCode, TrainSpec

__all__ = ["llama3_flavors", "train_spec"]


def _load() -> ModelCode:
    from torchtitan.models.llama3.infra.parallelize import TENSOR_PARALLEL_PLAN, parallelize_llama
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    return ModelCode(
        Transformer,
        parallelize_llama,
        Llama3StateDictAdapter,
        tensor_parallel_plan=TENSOR_PARALLEL_PLAN,
        args_from_hf_config=Llama3StateDictAdapter.args_from_hf_config,
    )


train_spec = TrainSpec(flavors=llama3_flavors, load=_load, hf_model_type="llama")
