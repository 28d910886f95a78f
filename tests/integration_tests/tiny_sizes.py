"""Sizes of models for which a step takes milliseconds."""

from dataclasses import replace

from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.qwen3 import qwen3_flavors

TINY = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=64, vocab_size=2000)

ODD = TransformerModelArgs(
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_dim=48,
    vocab_size=2001,  # the tokenizer's and one: no degree divides it, and 1 MiB of logits makes several chunks
)

# tied, with norms of queries and keys and heads of their own size
QWEN3 = replace(
    qwen3_flavors["0.6B"],
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    given_head_dim=12,
    ffn_hidden_dim=48,
    vocab_size=2001,
)
