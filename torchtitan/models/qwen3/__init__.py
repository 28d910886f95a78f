"""Qwen3, dense: flavors.py its sizes, train_configs/ ready runs. The rest is what models/common has.

It differs from Llama 3 in the norms of each head's queries and keys, in heads of 128 whatever the width, and in tying
the output to the embedding up to 4B.
"""

from torchtitan.models.common.family import build_train_spec
from torchtitan.models.common.hf_config import HFConfig
from torchtitan.models.qwen3.flavors import qwen3_flavors

__all__ = ["hf_config", "qwen3_flavors", "train_spec"]

hf_config = HFConfig(
    "qwen3",
    "Qwen3ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False},
    qk_norm=True,
)
train_spec = build_train_spec(qwen3_flavors, hf_config)
