"""The sizes of Qwen3's dense models, by name. Imports no torch, so that options are checked fast."""

from functools import partial

from torchtitan.models.common.args import TransformerModelArgs

_qwen3 = partial(
    TransformerModelArgs,
    n_kv_heads=8,
    given_head_dim=128,
    vocab_size=151936,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    max_seq_len=40960,
)

qwen3_flavors: dict[str, TransformerModelArgs] = {
    # 5,234,688 parameters: trains on a laptop's CPU, with the tokenizer of the package
    "debugmodel": _qwen3(
        dim=256,
        n_layers=6,
        n_heads=8,
        n_kv_heads=4,
        given_head_dim=64,
        ffn_hidden_dim=512,
        vocab_size=2000,
        tie_embeddings=True,
    ),
    # 596,049,920
    "0.6B": _qwen3(dim=1024, n_layers=28, n_heads=16, ffn_hidden_dim=3072, tie_embeddings=True),
    # 1,720,574,976
    "1.7B": _qwen3(dim=2048, n_layers=28, n_heads=16, ffn_hidden_dim=6144, tie_embeddings=True),
    # 4,022,468,096
    "4B": _qwen3(dim=2560, n_layers=36, n_heads=32, ffn_hidden_dim=9728, tie_embeddings=True),
    # 8,190,735,360
    "8B": _qwen3(dim=4096, n_layers=36, n_heads=32, ffn_hidden_dim=12288),
    # 14,768,307,200
    "14B": _qwen3(dim=5120, n_layers=40, n_heads=40, ffn_hidden_dim=17408),
    # 32,762,123,264
    "32B": _qwen3(dim=5120, n_layers=64, n_heads=64, ffn_hidden_dim=25600),
}
