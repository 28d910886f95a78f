"""Models as people have them: from a folder of transformers, some steps by the trainer, and back to transformers.

The oracle trains the same weights on the same batches with transformers' model and torch's AdamW. With `pytest -s` the
largest differences are shown.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.integration_tests.tiny_runs import GLOBAL_BATCH, Result, Run, global_batch, train_all
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.config.sections import LRScheduler

LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 2001,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": [1, 5],
    "initializer_range": 0.1,
}
ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


LR, EPS = 1e-3, 1e-6  # so large that Adam does not make much of what is nearly zero, and differs in its last bits
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
COMPACT = "--optimizer.state_precision compact --training.mixed_precision_param bfloat16"
FLOAT8 = "--model.converters float8 --float8.emulate"


@dataclass(frozen=True)
class Kind:
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    is_qwen3: bool = False
    steps: int = 2
    options: str = FUSED
    tolerance: float = 1e-4
    """Of each step's loss and gradient norm, relative."""
    logits_tolerance: float = 1e-5

    def build(self) -> PreTrainedModel:
        torch.manual_seed(3)
        if self.is_qwen3:
            return Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=32, tie_word_embeddings=True)).to(self.dtype)
        return LlamaForCausalLM(LlamaConfig(**LLAMA, **self.config)).to(self.dtype)


KINDS = {
    "untied": Kind(),
    "tied": Kind({"tie_word_embeddings": True}),
    "tied-six-steps": Kind({"tie_word_embeddings": True}, steps=6, options="", logits_tolerance=1e-4),
    "tied-in-8-bits": Kind(
        {"tie_word_embeddings": True}, options=f"{FUSED} {COMPACT} {FLOAT8}", tolerance=0.05, logits_tolerance=0.5
    ),
    "bf16-in-8-shards": Kind(dtype=torch.bfloat16, shard_size="16KB"),
    "head-dim-32": Kind({"head_dim": 32}),
    "rope-factor-32": Kind(
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e5, "factor": 32.0, **ROPE}}
    ),
    "qwen3-tied": Kind(is_qwen3=True),
}
SHARD2, TP2 = "--parallelism.data_parallel_shard_degree 2", "--parallelism.tensor_parallel_degree 2"
LAYOUTS = {  # beside one process: processes, sequences at once, options
    "shard2": (2, GLOBAL_BATCH // 2, SHARD2),
    "tp2": (2, GLOBAL_BATCH, TP2),
    "tp2-shard2": (4, GLOBAL_BATCH // 2, f"{TP2} {SHARD2} {FUSED}"),
}


@dataclass(frozen=True)
class Trained:
    """By the trainer, one run of each kind, and what it exported."""

    folder: Path
    results: dict[str, Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("models")
    runs = []
    for name, kind in KINDS.items():
        source = folder / name / "source"
        model = kind.build()
        model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
        model.save_pretrained(source, max_shard_size=kind.shard_size)
        if kind.shard_size != "1GB":
            assert len(list(source.glob("*.safetensors"))) >= 8
        saving = f"--checkpoint.enable_checkpoint --checkpoint.folder {folder / name / 'checkpoint'}"
        saving += " --checkpoint.last_save_in_hf --checkpoint.last_save_model_only"
        runs.append(Run(name, options=f"{get_options(source, kind)} {saving} {kind.options}"))
    return Trained(folder, train_all(runs))


def get_options(source: Path, kind: Kind) -> str:
    return (
        f"--model.hf_folder {source} --model.tokenizer_path ./torchtitan/assets/tokenizer"
        f" --checkpoint.initial_load_in_hf --training.steps {kind.steps} --optimizer.lr {LR} --optimizer.eps {EPS}"
    )


def train_with_transformers(source: Path, steps: int) -> tuple[nn.Module, list[tuple[float, float]]]:
    """As the options of tiny_runs.py say; the loss and the gradient norm of each step."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1)
    scheduler = build_lr_scheduler(optimizer, LRScheduler(warmup_steps=2), steps)
    found = []
    for step in range(steps):
        batch = global_batch(step)
        loss = nn.functional.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.35)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        found.append((loss.item(), norm.item()))
    return model, found


@pytest.mark.parametrize("name", KINDS)
def test_steps_and_logits_are_those_of_transformers(name: str, trained: Trained) -> None:
    kind, result = KINDS[name], trained.results[name]
    folder = trained.folder / name
    reference, steps = train_with_transformers(folder / "source", kind.steps)
    differences = compare(result, steps, kind.tolerance)
    export = folder / "checkpoint" / f"step-{kind.steps}"
    model, info = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = global_batch(9).tokens[: GLOBAL_BATCH // 4]
    tolerance = kind.logits_tolerance
    with torch.no_grad():
        logits, expected = model(tokens).logits, reference(tokens).logits
    print(f"\n{name:16} {differences}, logits by {(logits - expected).abs().max():.1e}")
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


def compare(result: Result, expected: list[tuple[float, float]], tolerance: float) -> str:
    """The largest relative differences, in words."""
    if isinstance(result, Exception):
        raise result
    steps = [(step.loss, step.grad_norm) for step in result]
    assert len(steps) == len(expected)
    loss, norm = (torch.tensor(steps) / torch.tensor(expected) - 1).abs().amax(0).tolist()
    assert max(loss, norm) < tolerance
    return f"loss by {loss:.1e}, gradient norm by {norm:.1e}"


def test_a_tied_model_takes_transformers_steps_in_every_layout(trained: Trained) -> None:
    kind, source = KINDS["tied-six-steps"], trained.folder / "tied-six-steps/source"
    _, expected = train_with_transformers(source, kind.steps)
    for world_size in (2, 4):
        runs = [
            Run(name, num_processes, batch_size, f"{get_options(source, kind)} {options}")
            for name, (num_processes, batch_size, options) in LAYOUTS.items()
            if num_processes == world_size
        ]
        for name, result in train_all(runs).items():
            print(f"\n{name:16} {compare(result, expected, kind.tolerance)}")


@pytest.mark.parametrize("name", ["tied", "qwen3-tied"])
def test_an_export_keeps_what_the_model_was_made_for(name: str, trained: Trained) -> None:
    """Though it was trained at 64 tokens."""
    folder = trained.folder / name
    export = folder / "checkpoint" / f"step-{KINDS[name].steps}"
    config = json.loads((export / "config.json").read_bytes())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (512, [1, 5])
    assert config["tie_word_embeddings"] is True
    assert json.loads((export / "generation_config.json").read_bytes())["temperature"] == 0.6
