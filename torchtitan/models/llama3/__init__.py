"""Llama 3: flavors.py its sizes, train_configs/ ready runs. The rest is what models/common has."""

from functools import partial

from torchtitan.models.common.hf_config import HFConfig
from torchtitan.models.llama3.flavors import llama3_flavors
from torchtitan.protocols.train_spec import ModelCode, TrainSpec

__all__ = ["hf_config", "llama3_flavors", "train_spec"]

hf_config = HFConfig(
    "llama",
    "LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
)


def _load() -> ModelCode:
    from torchtitan.models.common.model import Transformer
    from torchtitan.models.common.parallelize import TENSOR_PARALLEL_PLAN, parallelize_transformer
    from torchtitan.models.common.state_dict_adapter import TransformerStateDictAdapter

    return ModelCode(
        Transformer,
        parallelize_transformer,
        partial(TransformerStateDictAdapter, hf_config=hf_config),
        tensor_parallel_plan=TENSOR_PARALLEL_PLAN,
    )


train_spec = TrainSpec(flavors=llama3_flavors, load=_load, hf_model_type="llama", args_from_hf_config=hf_config.read)
