"""Llama 3's weights under Hugging Face transformers' names (LlamaForCausalLM), and back.

Beside the names one thing differs: we rotate neighbouring pairs of each head, transformers rotates the first half
against the second, so the rows of wq and wk are in another order.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchtitan.config.errors import CheckpointError
from torchtitan.models.llama3.model.args import RopeScaling, TransformerModelArgs

_HF_NAMES = {  # {} stands for the layer's number
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OWN_NAMES = {hf_name: name for name, hf_name in _HF_NAMES.items()}
_SIZES = (  # in config.json
    "num_attention_heads",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


class Llama3StateDictAdapter:
    def __init__(self, args: TransformerModelArgs):
        self.args = args

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, and reorder the rows of wq and wk. Takes any part of the state dict; whole tensors, not shards."""
        return self._convert(state_dict, _HF_NAMES, self._to_halves)

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of to_hf. Without lm_head, the output starts as a copy of the embedding, to which it was tied.

        Raises:
            CheckpointError: a name that LlamaForCausalLM does not have.
        """
        # Old checkpoints hold the rotary frequencies, which follow from the config.
        weights = {name: weight for name, weight in hf_state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
        state_dict = self._convert(weights, _OWN_NAMES, self._to_pairs)
        if "tok_embeddings.weight" in state_dict and "output.weight" not in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"].clone()
        return state_dict

    def to_hf_config(self) -> dict[str, Any]:
        """config.json of this model, as transformers reads it."""
        args = self.args
        scaling: dict[str, Any] | None = None
        if args.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": args.rope_scaling.factor,
                "low_freq_factor": args.rope_scaling.low_freq_factor,
                "high_freq_factor": args.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": args.vocab_size,
            "hidden_size": args.dim,
            "intermediate_size": args.ffn_hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": args.max_seq_len,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }

    @staticmethod
    def args_from_hf_config(config: dict[str, Any]) -> TransformerModelArgs:
        """The shape that a config.json describes.

        Raises:
            CheckpointError: it is not a Llama, or one with parts that this model lacks.
            KeyError, TypeError, AttributeError: an entry is missing, or of another kind.
        """
        for key in _SIZES:
            if not isinstance(config[key], int) or config[key] < 1:
                raise CheckpointError(f"config.json: {key} is {config[key]!r}; expected a whole number, at least 1")
        n_heads, dim = config["num_attention_heads"], config["hidden_size"]
        # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood at the top
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _require(config, "hidden_act", {"silu"}, default="silu")
        _require(config, "attention_bias", {False}, default=False)
        _require(config, "mlp_bias", {False}, default=False)
        _require(config, "head_dim", {dim // n_heads, None}, default=None)
        _require({"rope_type": rope_type}, "rope_type", {"default", "llama3"})
        scaling = None
        if rope_type == "llama3":
            scaling = RopeScaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_seq_len=rope["original_max_position_embeddings"],
            )
        return TransformerModelArgs(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            ffn_hidden_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            rope_scaling=scaling,
            max_seq_len=config["max_position_embeddings"],
        )

    def _convert(
        self, weights: dict[str, Tensor], names: dict[str, str], reorder: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Tensor]:
        converted = {}
        for name, weight in weights.items():
            pattern, number = re.sub(r"layers\.\d+\.", "layers.{}.", name), re.search(r"layers\.(\d+)\.", name)
            if pattern not in names:
                raise CheckpointError(f"the weight {name!r} has no place in a Llama 3 model")
            if "wq" in pattern or "q_proj" in pattern:
                weight = reorder(weight, self.args.n_heads)
            elif "wk" in pattern or "k_proj" in pattern:
                weight = reorder(weight, self.args.n_kv_heads)
            converted[names[pattern].format(number[1] if number else "")] = weight
        return converted

    @staticmethod
    def _to_halves(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D)
        return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    @staticmethod
    def _to_pairs(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D)
        return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _require(config: dict[str, Any], key: str, allowed: set[Any], default: Any = None) -> None:
    value = config.get(key, default)
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in allowed if choice is not None)
        raise CheckpointError(f"config.json: {key} is {value!r}; Llama 3 here has {expected}")
