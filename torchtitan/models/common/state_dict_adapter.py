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


class TransformerStateDictAdapter:
    def __init__(self, args: TransformerModelArgs, hf_config: HFConfig):
        self.args = args
        self._hf_config = hf_config
        self.hf_names: Mapping[str, str] = hf_config.get_names(args)
        self.hf_copies: Mapping[str, str] = hf_config.get_copies(args)
        self._own_names = {theirs: name for name, theirs in self.hf_names.items()}

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
