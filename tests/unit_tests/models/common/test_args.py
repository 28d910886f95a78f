import pytest
import torch

from torchtitan.config.sections import Model
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3.flavors import llama3_flavors

NUM_PARAMS = {
    "debugmodel": 6_139_136,
    "3.2-1B": 1_235_814_400,
    "3.2-3B": 3_212_749_824,
    "1B": 1_498_482_688,
    "3B": 3_606_752_256,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


@pytest.mark.parametrize("flavor", llama3_flavors)
def test_flavor_has_its_published_size(flavor: str) -> None:
    args = llama3_flavors[flavor].for_run(Model(), max_seq_len=8)
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMS[flavor]
    assert args.num_params() == NUM_PARAMS[flavor]


@pytest.mark.parametrize(
    ("flavor", "seq_len", "flops"),
    [("debugmodel", 2048, 71.5e6), ("8B", 8192, 57.91e9), ("70B", 2048, 433.1e9), ("405B", 8192, 2.625e12)],
)
def test_flops_per_token_are_those_users_know(flavor: str, seq_len: int, flops: float) -> None:
    assert llama3_flavors[flavor].get_num_flops_per_token(seq_len) == pytest.approx(flops, rel=1e-3)


def test_flops_are_counted_by_products() -> None:
    """2 for each multiplication of a weight or in attention, forward; twice that, backward."""
    args = TransformerModelArgs(
        dim=8, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden_dim=12, vocab_size=10, max_seq_len=16
    )
    seq_len = 5
    norms = 8 * (2 * 3 + 1)
    linear = args.num_params() - 10 * 8 - norms
    attention = 3 * 2 * 4 * 2 * seq_len  # layers, two products, heads, head dim, keys
    assert args.get_num_flops_per_token(seq_len) == 6 * (linear + norms + attention)


def test_for_run_changes_only_what_it_is_given() -> None:
    args = llama3_flavors["8B"].for_run(Model(use_scaled_rope=True), max_seq_len=77)
    assert (args.max_seq_len, args.rope_scaling) == (77, RopeScaling())
    assert args.num_params() == llama3_flavors["8B"].num_params()
    assert args.for_run(Model(), max_seq_len=8).rope_scaling == RopeScaling()
