from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs
from torchtitan.models.common.model import Transformer, apply_rotary_emb, precompute_freqs_cis
from torchtitan.protocols.sequences import Sequences

ARGS = TransformerModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=101, max_seq_len=16
)


def build_model(args: TransformerModelArgs = ARGS) -> Transformer:
    model = Transformer(args)
    init_parameters(model, seed=0, device="cpu")
    return model


def some_tokens(batch_size: int = 2, seq_len: int = 12) -> Tensor:
    return torch.randint(ARGS.vocab_size, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))


def test_output_of_hidden_states_equals_logits() -> None:
    model, tokens = build_model(), some_tokens()
    hidden = model(tokens, return_hidden_states=True)
    assert hidden.shape == (2, 12, ARGS.dim)
    torch.testing.assert_close(model.output(hidden), model(tokens))


def test_with_weight_hands_over_the_weight() -> None:
    model, tokens = build_model(), some_tokens()
    hidden = model(tokens, return_hidden_states=True)
    logits = model.output.with_weight(lambda x, weight: x @ weight.T + 3.0, hidden)
    torch.testing.assert_close(logits, model(tokens) + 3.0)


def test_no_token_sees_a_later_one() -> None:
    model, tokens = build_model(), some_tokens()
    changed = tokens.clone()
    changed[:, 7] += 1
    before, after = model(tokens), model(changed % ARGS.vocab_size)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_positions_default_to_counting_from_zero() -> None:
    model, tokens = build_model(), some_tokens()
    torch.testing.assert_close(model(tokens, sequences=Sequences(torch.arange(12).expand(2, -1))), model(tokens))


def test_only_distances_between_positions_matter() -> None:
    model, tokens = build_model(), some_tokens()
    shifts = torch.tensor([[1], [4]])  # another one for each sequence
    shifted = Sequences(torch.arange(12) + shifts)
    torch.testing.assert_close(model(tokens, sequences=shifted), model(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(tokens, sequences=Sequences(2 * torch.arange(6).repeat(2, 2))), model(tokens))


def test_rotation_is_computed_in_float32() -> None:
    """At position 4095 a bfloat16 angle would be off by up to 8 radians."""
    freqs_cis = build_model(replace(ARGS, max_seq_len=4096)).freqs_cis[4084:]
    torch.manual_seed(0)
    x = torch.randn(1, 12, ARGS.n_heads, ARGS.dim // ARGS.n_heads).bfloat16()
    rotated = apply_rotary_emb(x, freqs_cis)
    assert torch.equal(rotated, apply_rotary_emb(x.float(), freqs_cis).bfloat16())
    assert not torch.equal(rotated, x)


def test_scaled_rope_keeps_high_and_stretches_low_frequencies() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
    plain, scaled = (precompute_freqs_cis(16, 2, 10000.0, s)[1, :, 1].asin() for s in (None, scaling))
    wavelengths = 2 * torch.pi / plain
    kept, stretched = wavelengths < 64 / 4, wavelengths > 64
    assert kept.any()
    assert stretched.any()
    torch.testing.assert_close(scaled[kept], plain[kept])
    torch.testing.assert_close(scaled[stretched], plain[stretched] / 8)
    between = ~kept & ~stretched
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_a_stage_without_embedding_norm_and_output_maps_hidden_states() -> None:
    model = build_model()
    hidden = torch.randn(2, 12, ARGS.dim)
    expected = model.layers["1"](hidden, model.freqs_cis[None])
    model.tok_embeddings = model.norm = model.output = None
    del model.layers["0"]
    torch.testing.assert_close(model(hidden), expected)
    assert set(model.weight_initializers()) == {name for name, _ in model.named_parameters()}


def test_starting_weights_are_those_of_the_table() -> None:
    model = build_model(replace(ARGS, dim=256, ffn_hidden_dim=256, n_heads=4, n_kv_heads=4, vocab_size=512))
    weights = dict(model.named_parameters())
    expected = {
        "tok_embeddings.weight": 1.0,
        "layers.1.attention.wq.weight": 0.02,
        "layers.1.feed_forward.w1.weight": 0.02,
        "layers.0.attention.wo.weight": 0.02 / 2**0.5,
        "layers.1.attention.wo.weight": 0.02 / 2,
        "layers.1.feed_forward.w2.weight": 0.02 / 2,
        "layers.1.feed_forward.w3.weight": 0.02 / 2,
    }
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.02), name
        assert weights[name].abs().max() > 3.5 * std, f"{name} is cut"
    output = weights["output.weight"]
    assert output.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert output.abs().max() <= 3 * 256**-0.5
    assert all((weight == 1).all() for name, weight in weights.items() if "norm" in name)


def test_model_built_on_meta_equals_one_built_in_place() -> None:
    with torch.device("meta"):
        model = Transformer(ARGS)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    init_parameters(model, seed=0, device="cpu")
    model.init_buffers("cpu")
    torch.testing.assert_close(model(some_tokens()), build_model()(some_tokens()), rtol=0, atol=0)


def test_state_dict_holds_parameters_only() -> None:
    model = Transformer(ARGS)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
