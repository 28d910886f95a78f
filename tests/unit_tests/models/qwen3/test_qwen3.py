"""Qwen3 here is transformers' Qwen3ForCausalLM: from one set of weights the same logits, loss, steps and text."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from torchtitan.components.generation import Sampling, generate
from torchtitan.components.loss import FusedLinearCrossEntropyLoss
from torchtitan.config.errors import CheckpointError
from torchtitan.config.sections import Model
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.qwen3 import hf_config, qwen3_flavors, train_spec

ARGS = replace(
    qwen3_flavors["0.6B"],
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    given_head_dim=16,
    ffn_hidden_dim=80,
    vocab_size=101,
    max_seq_len=64,
)
UNTIED = replace(ARGS, tie_embeddings=False)
NUM_PARAMS = {
    "debugmodel": 5_234_688,
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


def build_both(args: TransformerModelArgs) -> tuple[Transformer, Qwen3ForCausalLM]:
    """With the same random weights, in which every part counts."""
    model = Transformer(args)
    init_parameters(model, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "layers" in name:
                parameter.mul_(8)
    config = hf_config.write(args)
    theirs = Qwen3ForCausalLM(Qwen3Config(**{key: config[key] for key in config if key != "architectures"})).eval()
    weights = train_spec.load().state_dict_adapter(args).to_hf(model.state_dict())
    result = theirs.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=False)
    assert result.missing_keys == (["lm_head.weight"] if args.tie_embeddings else []) and not result.unexpected_keys
    return model, theirs


@pytest.mark.parametrize("flavor", qwen3_flavors)
def test_flavor_has_its_published_size(flavor: str) -> None:
    args = qwen3_flavors[flavor].for_run(Model(), max_seq_len=8)
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(parameter.numel() for parameter in model.parameters()) == args.num_params() == NUM_PARAMS[flavor]


@pytest.mark.parametrize("args", [ARGS, UNTIED], ids=["tied", "untied"])
def test_logits_loss_gradients_and_six_steps_equal_those_of_transformers(args: TransformerModelArgs) -> None:
    model, theirs = build_both(args)
    adapter = train_spec.load().state_dict_adapter(args)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1) for m in (model, theirs)]
    fused = FusedLinearCrossEntropyLoss(budget_bytes=1 << 10)
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        text = torch.randint(args.vocab_size, (2, 33), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:]
        logits = theirs(tokens).logits
        if step == 0:
            torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=1e-5)
        scale = torch.tensor(1 / labels.numel())
        loss = fused(model(tokens, return_hidden_states=True), model.output, labels, scale)
        their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
        loss.backward()
        their_loss.backward()
        gradients = adapter.to_hf({name: parameter.grad for name, parameter in model.named_parameters()})
        their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        torch.testing.assert_close(gradients, their_gradients, atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_greedy_text_with_the_cache_equals_that_of_transformers() -> None:
    model, theirs = build_both(UNTIED)
    prompt = [3, 1, 4, 1, 5]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    text = list(generate(model.eval(), prompt, max_new_tokens=20, sampling=Sampling(temperature=0)))
    assert text == expected[0, len(prompt) :].tolist()
    assert len(set(text)) > 5  # else it shows nothing


def test_config_comes_back_and_what_it_leaves_out_is_what_transformers_takes() -> None:
    config = json.loads(json.dumps(hf_config.write(ARGS)))
    assert hf_config.read(config) == ARGS
    short = {key: config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")}
    short["num_attention_heads"] = 64
    assert hf_config.read(short) == hf_config.read(Qwen3Config(**short).to_dict())


@pytest.mark.parametrize(("key", "value"), [("use_sliding_window", True), ("attention_bias", True)])
def test_parts_that_we_lack_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} is True; Qwen3ForCausalLM here has False"):
        hf_config.read(hf_config.write(ARGS) | {key: value})
