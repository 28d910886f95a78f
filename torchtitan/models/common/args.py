"""The shape of a model, and what follows from it by arithmetic. Imports no torch: options are checked fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchtitan.config.sections import Model


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies for contexts longer than those of pretraining.

    Wavelengths above original_max_seq_len / low_freq_factor are stretched by `factor`, those below
    original_max_seq_len / high_freq_factor are kept, and those between are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class TransformerModelArgs:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    given_head_dim: int | None = None
    """Where the heads do not share out `dim`."""
    qk_norm: bool = False
    """Normalise each head's queries and keys."""
    tie_embeddings: bool = False
    """The output projects with the embedding's weight."""
    max_seq_len: int = 131072
    """Rows of the rotary table: no sequence may be longer."""

    @property
    def head_dim(self) -> int:
        return self.given_head_dim or self.dim // self.n_heads

    def for_run(self, model: Model, *, max_seq_len: int) -> TransformerModelArgs:
        """The same shape, with what a run's options decide."""
        scaling = self.rope_scaling
        if model.use_scaled_rope or model.rope_scaling_factor is not None:
            scaling = scaling or RopeScaling()
            scaling = replace(scaling, factor=model.rope_scaling_factor or scaling.factor)
        return replace(self, max_seq_len=max_seq_len, rope_scaling=scaling)

    def num_params(self) -> int:
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.ffn_hidden_dim
        norms = 2 * self.dim + self.qk_norm * 2 * self.head_dim
        vocabulary = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return vocabulary + self.n_layers * (attention + feed_forward + norms) + self.dim

    def get_num_flops_per_token(self, seq_len: int) -> int:
        """Floating point operations of forward and backward, per token of a sequence of seq_len tokens.

        6 for each weight that is multiplied (all but the embedding's, unless it is the output's too), and 12 * heads *
        head_dim * seq_len a layer for attention's two products. As is customary, the causal mask's half and
        recomputation are not subtracted or added.
        """
        num_multiplied = self.num_params() - (not self.tie_embeddings) * self.vocab_size * self.dim
        return 6 * num_multiplied + 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
