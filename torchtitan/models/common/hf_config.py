"""A model in Hugging Face's format: its shape in config.json, the names of its weights. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchtitan.config.errors import CheckpointError
from torchtitan.config.schema import either
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs

_SIZES = {  # in config.json
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "ffn_hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}

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


@dataclass(frozen=True)
class HFConfig:
    """How a family's config.json is read and written, and what its weights are called beside it."""

    model_type: str
    architecture: str
    """Of transformers."""
    defaults: Mapping[str, Any]
    """What a config.json may leave out: transformers' own."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the model has no choice in, and a config.json may leave out too."""
    qk_norm: bool = False

    def read(self, config: Mapping[str, Any]) -> TransformerModelArgs:
        """The shape that a config.json describes.

        Raises:
            CheckpointError: it has parts that this model lacks.
            KeyError, TypeError, ValueError, AttributeError: an entry is missing, or of another kind.
        """
        for key, value in self.fixed.items():
            self._require(key, config.get(key, value), value)
        # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling stood at the top
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        self._require("rope_type", rope_type, "default", "llama3")
        self._require("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1)
        scaling = {ours: rope[theirs] for theirs, ours in _SCALING.items()} if rope_type == "llama3" else None
        given = {**self.defaults, **{key: value for key, value in config.items() if value is not None}}
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
        sizes = {ours: _whole_number(theirs, given[theirs]) for theirs, ours in _SIZES.items()}
        if sizes["n_heads"] % sizes["n_kv_heads"]:
            raise CheckpointError(
                f"config.json: num_attention_heads is {sizes['n_heads']}; expected a multiple of the"
                f" {sizes['n_kv_heads']} of num_key_value_heads"
            )
        head_dim = _whole_number("head_dim", given.get("head_dim", sizes["dim"] // sizes["n_heads"]))
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embeddings need an even number")
        tie_embeddings = given.get("tie_word_embeddings", False)
        self._require("tie_word_embeddings", tie_embeddings, False, True)
        return TransformerModelArgs(
            **sizes,
            given_head_dim=None if head_dim * sizes["n_heads"] == sizes["dim"] else head_dim,
            qk_norm=self.qk_norm,
            tie_embeddings=tie_embeddings,
            norm_eps=float(given["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta", given["rope_theta"])),
            rope_scaling=RopeScaling(**scaling) if scaling is not None else None,
        )

    def write(self, args: TransformerModelArgs) -> dict[str, Any]:
        """config.json of this model, as transformers reads it."""
        scaling = asdict(args.rope_scaling) if args.rope_scaling is not None else {}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{theirs: getattr(args, ours) for theirs, ours in _SIZES.items()},
            "head_dim": args.head_dim,
            "rms_norm_eps": args.norm_eps,
            "rope_theta": args.rope_theta,
            "rope_scaling": {"rope_type": "llama3", **{key: scaling[ours] for key, ours in _SCALING.items()}}
            if scaling
            else None,
            "tie_word_embeddings": args.tie_embeddings,
            **self.fixed,
        }

    def get_names(self, args: TransformerModelArgs) -> dict[str, str]:
        """Theirs for each of the model's weights."""
        return {
            part.format(i): theirs.format(i)
            for part, theirs in _HF_NAMES.items()
            if (args.qk_norm or part not in _QK_NORMS) and not (args.tie_embeddings and part == _OUTPUT)
            for i in range(args.n_layers if "{}" in part else 1)
        }

    def get_copies(self, args: TransformerModelArgs) -> dict[str, str]:
        """A tied output may lie there once more: its name, and that of the embedding."""
        return {_HF_NAMES[_OUTPUT]: _HF_NAMES[_EMBEDDING]} if args.tie_embeddings else {}

    def _require(self, key: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            expected = either(map(repr, allowed))
            raise CheckpointError(f"config.json: {key} is {value!r}; {self.architecture} here has {expected}")


def _whole_number(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a whole number, at least 1")
    return value
