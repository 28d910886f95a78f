"""Llama 3: flavors.py its sizes, train_configs/ ready runs. The rest is what models/common has."""

from torchtitan.models.common.family import build_train_spec
from torchtitan.models.common.hf_config import HFConfig
from torchtitan.models.llama3.flavors import llama3_flavors

__all__ = ["hf_config", "llama3_flavors", "train_spec"]

hf_config = HFConfig(
    "llama",
    "LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
)
train_spec = build_train_spec(llama3_flavors, hf_config)
