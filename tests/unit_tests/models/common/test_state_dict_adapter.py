import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchtitan.config.errors import CheckpointError
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3 import hf_config, train_spec

build_adapter = train_spec.load().state_dict_adapter

ARGS = TransformerModelArgs(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=2, ffn_hidden_dim=80, vocab_size=101, max_seq_len=64
)
SCALED_ARGS = replace(ARGS, rope_scaling=RopeScaling(original_max_seq_len=16))
OTHER_ARGS = replace(
    ARGS, given_head_dim=32, tie_embeddings=True, rope_scaling=RopeScaling(factor=32.0, original_max_seq_len=16)
)


def build_model(args: TransformerModelArgs) -> Transformer:
    model = Transformer(args)
    init_parameters(model, seed=0, device="cpu")
    return model


def build_hf_model(config: dict[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})).eval()


@pytest.mark.parametrize("args", [ARGS, SCALED_ARGS, OTHER_ARGS], ids=["plain rope", "scaled rope", "tied"])
def test_logits_equal_those_of_transformers(args: TransformerModelArgs) -> None:
    model, adapter = build_model(args), build_adapter(args)
    hf_model = build_hf_model(adapter.to_hf_config())
    unread = hf_model.load_state_dict(adapter.to_hf(model.state_dict()), strict=False)
    assert unread.missing_keys == (["lm_head.weight"] if args.tie_embeddings else []) and not unread.unexpected_keys
    tokens = torch.randint(args.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_weights_of_transformers_load_and_give_its_logits() -> None:
    torch.manual_seed(0)
    hf_model = build_hf_model(build_adapter(SCALED_ARGS).to_hf_config())
    args = hf_config.read(hf_model.config.to_dict())
    assert args == SCALED_ARGS
    model = Transformer(args)
    model.load_state_dict(build_adapter(args).from_hf(hf_model.state_dict()), strict=True)
    tokens = torch.randint(args.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_there_and_back_is_identity() -> None:
    adapter, state_dict = build_adapter(ARGS), build_model(ARGS).state_dict()
    back = adapter.from_hf(adapter.to_hf(state_dict))
    assert back.keys() == state_dict.keys()
    for name, weight in state_dict.items():
        torch.testing.assert_close(back[name], weight, rtol=0, atol=0)


def test_part_of_a_state_dict_converts_alone() -> None:
    adapter, state_dict = build_adapter(ARGS), build_model(ARGS).state_dict()
    whole = adapter.to_hf(state_dict)
    part = adapter.to_hf({"layers.1.attention.wk.weight": state_dict["layers.1.attention.wk.weight"]})
    assert list(part) == ["model.layers.1.self_attn.k_proj.weight"]
    torch.testing.assert_close(part[next(iter(part))], whole[next(iter(part))])


def test_a_tied_weight_has_one_name() -> None:
    args = replace(ARGS, tie_embeddings=True)
    model, adapter = build_model(args), build_adapter(args)
    assert not [name for name in model.state_dict() if name.startswith("output")]
    assert len(list(model.parameters())) == len(model.state_dict()) == len(adapter.hf_names)
    assert "lm_head.weight" not in adapter.to_hf(model.state_dict())
    assert adapter.hf_copies == {"lm_head.weight": "model.embed_tokens.weight"}


def test_unknown_weight_is_named() -> None:
    with pytest.raises(CheckpointError, match="q_norm"):
        build_adapter(ARGS).from_hf({"model.layers.0.self_attn.q_norm.weight": torch.zeros(8)})


@pytest.mark.parametrize("args", [ARGS, SCALED_ARGS, OTHER_ARGS])
def test_config_comes_back_from_a_file(args: TransformerModelArgs, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(build_adapter(args).to_hf_config()))
    ours = json.loads((tmp_path / "config.json").read_text())
    assert hf_config.read(ours) == args
    theirs = LlamaConfig.from_pretrained(tmp_path).to_dict()
    assert hf_config.read(theirs) == args


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    config = build_adapter(ARGS).to_hf_config()
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "head_dim"):
        del config[key]
    theirs = LlamaConfig(**{key: value for key, value in config.items() if key != "architectures"}).to_dict()
    args = hf_config.read({key: value for key, value in config.items() if key not in hf_config.fixed})
    assert args == hf_config.read(theirs)
    assert (args.n_kv_heads, args.max_seq_len, args.norm_eps, args.rope_theta) == (6, 2048, 1e-6, 10000.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("head_dim", 7),
        ("num_key_value_heads", 4),
        ("tie_word_embeddings", "yes"),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ],
)
def test_config_with_parts_that_we_lack_is_refused(key: str, value: Any) -> None:
    config = build_adapter(ARGS).to_hf_config() | {key: value}
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hf_config.read(config)
