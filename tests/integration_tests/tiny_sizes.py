"""Sizes of Llama 3 for which a step takes milliseconds."""

from torchtitan.models.common.args import TransformerModelArgs

TINY = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=64, vocab_size=2000)

ODD = TransformerModelArgs(
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_hidden_dim=48,
    vocab_size=2001,  # the tokenizer's and one: no degree divides it, and 1 MiB of logits makes several chunks
)
