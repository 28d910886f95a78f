"""The sizes of Llama 3, by name. Imports no torch, so that options are checked fast."""

from dataclasses import replace

from torchtitan.models.common.args import RopeScaling, TransformerModelArgs

_1B = TransformerModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_hidden_dim=8192, vocab_size=128256)
_3B = TransformerModelArgs(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_hidden_dim=8192, vocab_size=128256)

llama3_flavors: dict[str, TransformerModelArgs] = {
    # 6,139,136 parameters: trains on a laptop's CPU, with the tokenizer of the package
    "debugmodel": TransformerModelArgs(
        dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_hidden_dim=768, vocab_size=2000
    ),
    # 1,498,482,688 and 3,606,752,256: the shapes of Llama 3.2, but the output has a weight of its own
    "1B": _1B,
    "3B": _3B,
    # 8,030,261,248
    "8B": TransformerModelArgs(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_hidden_dim=14336, vocab_size=128256
    ),
    # 70,553,706,496
    "70B": TransformerModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_hidden_dim=28672, vocab_size=128256
    ),
    # 405,853,388,800
    "405B": TransformerModelArgs(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_hidden_dim=53248, vocab_size=128256
    ),
    # 1,235,814,400 and 3,212,749,824: Llama 3.2
    "3.2-1B": replace(_1B, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True),
    "3.2-3B": replace(_3B, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True),
}
