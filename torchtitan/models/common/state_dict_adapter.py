"""A decoder's weights under Hugging Face transformers' names, and back.

Beside the names one thing differs: we rotate neighbouring pairs of each head, transformers rotates the first half
against the second, so the rows of wq and wk are in another order.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchtitan.config.errors import CheckpointError
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.hf_config import HFConfig

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


class TransformerStateDictAdapter:
    def __init__(self, args: TransformerModelArgs, hf_config: HFConfig):
        self.args = args
        self._hf_config = hf_config

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, and reorder the rows of wq and wk. Takes any part of the state dict; whole tensors, not shards."""
        return self._convert(state_dict, _HF_NAMES, _to_halves)

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of to_hf. Without lm_head, the output starts as a copy of the embedding, to which it was tied.

        Raises:
            CheckpointError: a name that the model does not have.
        """
        # Old checkpoints hold the rotary frequencies, which follow from the config.
        weights = {name: weight for name, weight in hf_state_dict.items() if not name.endswith("rotary_emb.inv_freq")}
        state_dict = self._convert(weights, _OWN_NAMES, _to_pairs)
        if "tok_embeddings.weight" in state_dict and "output.weight" not in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"].clone()
        return state_dict

    def to_hf_config(self) -> dict[str, Any]:
        """config.json of this model, as transformers reads it."""
        return self._hf_config.write(self.args)

    def _convert(
        self, weights: dict[str, Tensor], names: dict[str, str], reorder: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Tensor]:
        converted = {}
        for name, weight in weights.items():
            pattern, number = re.sub(r"layers\.\d+\.", "layers.{}.", name), re.search(r"layers\.(\d+)\.", name)
            if pattern not in names:
                raise CheckpointError(f"the weight {name!r} has no place in this model")
            if "wq" in pattern or "q_proj" in pattern:
                weight = reorder(weight, self.args.n_heads)
            elif "wk" in pattern or "k_proj" in pattern:
                weight = reorder(weight, self.args.n_kv_heads)
            converted[names[pattern].format(number[1] if number else "")] = weight
        return converted


def _to_halves(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D)
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _to_pairs(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D)
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
