"""`torchtitan generate`: the text is that of transformers, of one process and of two; a mistake gets one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.finished_run import CONTEXT, REPO, TOKENIZER, save_run
from torchtitan.cli import generate as script
from torchtitan.cli.main import main
from torchtitan.components.tokenizer import build_tokenizer

PROMPT = "def naïve(x):"
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def hf_checkpoint(run_checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    assert main(["convert", "to_hf", str(run_checkpoint), str(path)]) == 0
    return path


def arguments(checkpoint: Path, *more: object) -> list[str]:
    options = ["--checkpoint", checkpoint, "--prompt", PROMPT, "--max_new_tokens", NUM_TOKENS, "--device", "cpu", *more]
    return [str(option) for option in options]


def make(capsys, checkpoint: Path, *more: object) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments(checkpoint, *more)]) == 0
    return capsys.readouterr().out


def start(*launcher: str, checkpoint: Path, more: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "torchtitan", "generate", *arguments(checkpoint, *more)],
        cwd=checkpoint,  # any folder will do
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def theirs_text(path: Path) -> str:
    """What transformers makes of the prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    assert len(made) == ids.size(1) + NUM_TOKENS
    return tokenizer.decode(made, skip_special_tokens=True) + "\n"


def test_greedy_text_is_that_of_transformers(run_checkpoint, hf_checkpoint, capsys):
    expected = theirs_text(hf_checkpoint)
    assert make(capsys, run_checkpoint, "--temperature", 0) == expected
    assert make(capsys, hf_checkpoint, "--temperature", 0) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_text_of_their_save_is_that_of_transformers(tmp_path, tied, capsys):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(2)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=2000,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = make(capsys, tmp_path, "--temperature", 0)
    assert text == theirs_text(tmp_path)
    assert len(set(text)) > 20


def test_two_processes_make_the_text_of_one_and_it_comes_as_it_is_made(run_checkpoint):
    more = ["--seed", "5", "--top_k", "50", "--top_p", "0.9", "--temperature", "0.9"]
    one = start(checkpoint=run_checkpoint, more=more)
    two = start("-m", "torch.distributed.run", "--nproc_per_node=2", checkpoint=run_checkpoint, more=more)
    pieces = []
    while piece := os.read(one.stdout.fileno(), 10**6):
        pieces.append(piece)
    text, (text_of_two, errors) = b"".join(pieces), two.communicate()
    assert (one.wait(), two.wait()) == (0, 0), errors.decode()
    assert text_of_two == text
    assert text.decode().startswith(PROMPT)
    assert len(text.decode()) > len(PROMPT) + NUM_TOKENS
    assert pieces[0] == PROMPT.encode()
    assert len(pieces) > 5
    report = one.stderr.read().decode()
    assert report.startswith("40 tokens, ") and report.endswith(" tokens/s, seed 5\n")


def test_a_seed_repeats_the_text_and_the_seed_of_any_text_is_told(run_checkpoint, capsys):
    text = make(capsys, run_checkpoint, "--seed", 1)
    assert make(capsys, run_checkpoint, "--seed", 1) == text
    assert make(capsys, run_checkpoint, "--seed", 2) != text
    assert main(["generate", *arguments(run_checkpoint)]) == 0
    drawn, report = capsys.readouterr()
    assert make(capsys, run_checkpoint, "--seed", report.split()[-1]) == drawn


def test_stops_at_the_end_token(run_checkpoint, tmp_path, capsys):
    """By a tokenizer that calls the fifth token of the text its end."""
    text = make(capsys, run_checkpoint, "--temperature", 0)
    shipped = build_tokenizer(TOKENIZER)
    ids = shipped.encode(PROMPT, add_bos=True, add_eos=False)
    model = script.find_pretrained(run_checkpoint).build_model(device=torch.device("cpu"), dtype=torch.float32)
    made = list(script.generate(model, ids, max_new_tokens=5, sampling=script.Sampling(temperature=0)))
    word = shipped._backend.id_to_token(made[4])
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"bos_token": "<|begin_of_text|>", "eos_token": "{word}"}}')
    short = make(capsys, run_checkpoint, "--temperature", 0, "--tokenizer", tmp_path)
    assert short == PROMPT + shipped.decode(made[: made.index(made[4])]) + "\n"
    assert len(short) < len(text)


def test_without_a_prompt_a_text_begins(run_checkpoint, capsys):
    assert len(make(capsys, run_checkpoint, "--prompt", "", "--seed", 1)) > 20


def test_without_a_length_the_context_is_filled(run_checkpoint, capsys):
    options = ["--checkpoint", str(run_checkpoint), "--prompt", PROMPT, "--seed", "3", "--device", "cpu"]
    assert main(["generate", *options]) == 0
    num_prompt_tokens = len(build_tokenizer(TOKENIZER).encode(PROMPT, add_bos=True, add_eos=False))
    assert capsys.readouterr().err.startswith(f"{CONTEXT - num_prompt_tokens} tokens, ")


def test_bfloat16_on_cpu(run_checkpoint, capsys):
    assert make(capsys, run_checkpoint, "--dtype", "bfloat16", "--seed", 1).startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "CheckpointError: there is no checkpoint at nowhere"),
        (["--temperature", "-1"], "ConfigError: temperature=-1.0: expected 0"),
        (["--max_new_tokens", "64"], "ConfigError: max_new_tokens=64 after a prompt of"),
        (["--prompt", "x = 1\n" * 50], "ConfigError: the prompt has"),
        (["--tokenizer", "nowhere"], "TokenizerError: nowhere does not exist; "),
        (["--prompt", "def na\udcefve"], "ConfigError: the prompt is not UTF-8 after 'def na'; give it in UTF-8"),
        (["--seed", "-1"], "ConfigError: seed=-1: expected 0 or more"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message(run_checkpoint, options, message, capsys):
    assert main(["generate", *arguments(run_checkpoint, *options)]) == 1
    out, error = capsys.readouterr()
    assert error.startswith(message)
    assert (error.count("\n"), out) == (1, "")


def test_device_that_is_not_there_is_refused(run_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["generate", *arguments(run_checkpoint, "--device", "cuda")]) == 1
    assert capsys.readouterr().err == "ConfigError: 1 processes on this machine need a GPU each, and it has 0\n"


def test_a_mistake_is_reported_by_the_first_process_alone(run_checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, report in {"1": "", "0": "3 processes cannot share n_kv_heads=16 and n_heads=16 equally"}.items():
        monkeypatch.setenv("RANK", rank)
        assert main(["generate", *arguments(run_checkpoint)]) == 1
        error = capsys.readouterr().err
        assert error.removeprefix("ConfigError: ").startswith(report) and error.count("\n") == bool(report)


def test_a_reader_that_leaves_is_no_error(run_checkpoint):
    process = start(checkpoint=run_checkpoint, more=[])
    os.read(process.stdout.fileno(), 5)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
