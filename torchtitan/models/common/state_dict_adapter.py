"""A decoder's weights under Hugging Face transformers' names, and back.

Beside the names one thing differs: we rotate neighbouring pairs of each head, transformers rotates the first half
against the second, so the rows of wq and wk, and the weights of their norms, are in another order.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchtitan.config.errors import CheckpointError
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.hf_config import HFConfig

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_QK_NORMS = ("layers.{}.attention.q_norm.weight", "layers.{}.attention.k_norm.weight")
_HF_NAMES = {  # {} stands for the layer's number
    _EMBEDDING: "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    **{part: part.replace("layers", "model.layers").replace("attention", "self_attn") for part in _QK_NORMS},
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    _OUTPUT: "lm_head.weight",
}


class TransformerStateDictAdapter:
    def __init__(self, args: TransformerModelArgs, hf_config: HFConfig):
        self.args = args
        self._hf_config = hf_config
        self.hf_names: Mapping[str, str] = {
            part.format(i): theirs.format(i)
            for part, theirs in _HF_NAMES.items()
            if (args.qk_norm or part not in _QK_NORMS) and not (args.tie_embeddings and part == _OUTPUT)
            for i in range(args.n_layers if "{}" in part else 1)
        }
        self._own_names = {theirs: name for name, theirs in self.hf_names.items()}
        self.hf_copies: Mapping[str, str] = {_HF_NAMES[_OUTPUT]: _HF_NAMES[_EMBEDDING]} if args.tie_embeddings else {}

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, and reorder the rows of wq and wk. Takes any part of the state dict; whole tensors, not shards."""
        return {self.hf_names[name]: self._reorder(name, weight, _to_halves) for name, weight in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of to_hf. Raises CheckpointError for a name that the model does not have."""
        state_dict = {}
        for hf_name, weight in hf_state_dict.items():
            if hf_name not in self._own_names:
                raise CheckpointError(f"the weight {hf_name!r} has no place in this model")
            name = self._own_names[hf_name]
            state_dict[name] = self._reorder(name, weight, _to_pairs)
        return state_dict

    def to_hf_config(self) -> dict[str, Any]:
        """config.json of this model, as transformers reads it."""
        return self._hf_config.write(self.args)

    def _reorder(self, name: str, weight: Tensor, reorder: Callable[[Tensor, int], Tensor]) -> Tensor:
        match name.split(".")[-2]:
            case "wq":
                return reorder(weight, self.args.n_heads)
            case "wk":
                return reorder(weight, self.args.n_kv_heads)
            case "q_norm" | "k_norm":  # all heads have the same
                return reorder(weight, 1)
        return weight


def _to_halves(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D), or of a norm (E,)
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _to_pairs(weight: Tensor, n_heads: int) -> Tensor:  # (H * E, D), or of a norm (E,)
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
