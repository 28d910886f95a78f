"""`torchtitan convert`: no bit changes either way, and transformers computes the same with the result."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
from tokenizers import models

from tests.finished_run import REPO, TOKENIZER, load_weights, save_run
from tests.full_disk import limited_files
from torchtitan.checkpoint.pretrained import find_pretrained
from torchtitan.cli.main import main

CONFIG = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def assert_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


def save_theirs(path: Path, dtype: torch.dtype = torch.float32, **config: Any):
    """A random model of transformers in a folder, with a tokenizer; and as loaded from there."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, **config})).to(dtype).save_pretrained(path)
    words = {f"word{i}": i for i in range(CONFIG["vocab_size"])}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(path / "tokenizer.json"))
    return AutoModelForCausalLM.from_pretrained(path)


@torch.no_grad()
def assert_same_logits(path: Path, theirs) -> None:
    found = find_pretrained(path)
    ours = found.build_model(device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(found.args.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = theirs.float()(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)


def fails(capsys, *arguments: object) -> str:
    assert main(["convert", *(str(argument) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_round_trip_from_a_run_is_bit_exact(run_checkpoint, tmp_path):
    hf, back = tmp_path / "hf", tmp_path / "new/checkpoint/step-0"
    # as a user starts it, from any folder
    command = [sys.executable, "-m", "torchtitan", "convert", "to_hf", run_checkpoint, "hf"]
    subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}, check=True
    )
    assert main(["convert", "from_hf", str(hf), str(back)]) == 0
    assert_same(load_weights(back), load_weights(run_checkpoint))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (hf / name).read_bytes() == (TOKENIZER / name).read_bytes()
    assert find_pretrained(back).args == find_pretrained(run_checkpoint).args
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "new"]  # nothing half-written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_from_hugging_face_is_bit_exact(tmp_path, dtype):
    save_theirs(tmp_path / "hf", dtype)
    assert main(["convert", "from_hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["convert", "to_hf", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    theirs = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    assert {weight.dtype for weight in theirs.values()} == {dtype}
    assert_same(safetensors.torch.load_file(tmp_path / "again/model.safetensors"), theirs)
    again = json.loads((tmp_path / "again/config.json").read_bytes())
    assert CONFIG.items() <= again.items()


def test_each_weight_keeps_its_own_dtype(tmp_path):
    save_theirs(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    safetensors.torch.save_file(weights, file)
    assert main(["convert", "from_hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    ours = load_weights(tmp_path / "ours")
    assert {name for name, weight in ours.items() if weight.dtype == torch.bfloat16} == {"norm.weight"}


def test_dtype_of_the_export_can_be_chosen(run_checkpoint, tmp_path):
    assert main(["convert", "to_hf", str(run_checkpoint), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    exported = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    expected = load_weights(run_checkpoint)["output.weight"].bfloat16()
    assert torch.equal(exported["lm_head.weight"], expected)
    assert json.loads((tmp_path / "hf/config.json").read_bytes())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("use_scaled_rope", [False, True])
def test_transformers_computes_the_same_logits_with_our_export(tmp_path, use_scaled_rope):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save_run(tmp_path, use_scaled_rope=use_scaled_rope)
    assert main(["convert", "to_hf", str(path), str(tmp_path / "hf")]) == 0
    assert_same_logits(path, AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 1


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3_ROPE}, {"rms_norm_eps": 1e-2}],
    ids=["plain", "tied", "scaled rope", "eps"],
)
def test_we_compute_the_same_logits_with_their_save(tmp_path, config):
    theirs = save_theirs(tmp_path / "hf", **config)
    assert main(["convert", "from_hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert_same_logits(tmp_path / "hf", theirs)
    assert_same_logits(tmp_path / "ours", theirs)


def test_mistakes_get_one_message_and_leave_nothing(run_checkpoint, tmp_path, capsys):
    save_theirs(tmp_path / "hf")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    new = tmp_path / "new"
    assert f"{tmp_path}/hf exists; name a folder that does not" in fails(
        capsys, "to_hf", run_checkpoint, tmp_path / "hf"
    )
    assert "is in Hugging Face's format already" in fails(capsys, "to_hf", tmp_path / "hf", new)
    assert "is a checkpoint of ours already" in fails(capsys, "from_hf", run_checkpoint, new)
    assert "there is no checkpoint at nowhere" in fails(capsys, "to_hf", "nowhere", new)
    other = tmp_path / "hf/config.json"
    assert "holds another model than this one" in fails(capsys, "to_hf", run_checkpoint, new, "--config", other)
    tokenizer = ("--tokenizer", tmp_path / "none")
    assert "none does not exist; " in fails(capsys, "to_hf", run_checkpoint, new, *tokenizer)
    for nameless in (".", "", "/", ".."):
        assert "exists; name a folder that does not" in fails(capsys, "to_hf", run_checkpoint, nameless)
    with limited_files(10_000):
        to_hf, from_hf = fails(capsys, "to_hf", run_checkpoint, new), fails(capsys, "from_hf", tmp_path / "hf", new)
    assert "model.safetensors was not written: SafetensorError: " in to_hf and "File too large" in to_hf
    assert from_hf.endswith("was not written: File too large\n")
    file = tmp_path / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    assert "model.safetensors" in fails(capsys, "from_hf", tmp_path / "hf", new)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_quantized_are_refused(tmp_path, capsys):
    save_theirs(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    safetensors.torch.save_file({**weights, name: weights[name].to(torch.int8)}, file)
    capsys.readouterr()
    message = fails(capsys, "from_hf", tmp_path / "hf", tmp_path / "ours")
    assert f"{file}: {name} is I8; expected F64, F32, F16 or BF16" in message
