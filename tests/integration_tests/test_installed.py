"""The wheel, installed in a folder of its own and used far from the checkout: it has all that its commands need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.cli.main import COMMANDS
from torchtitan.config.manager import get_ready_files

REPO = Path(__file__).parents[2]
SMALL = ["--training.steps", "2", "--training.seq_len", "32", "--training.local_batch_size", "2"]
SMALL += ["--checkpoint.enable_checkpoint", "--checkpoint.interval", "1", "--checkpoint.async_mode", "async"]
RUN_EACH = """
import contextlib, io, json, sys, torchtitan
from torchtitan.cli.main import main
results = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(words)
    results.append([status, out.getvalue()])
print(json.dumps([torchtitan.__file__, results]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip makes of the checkout; nothing is fetched."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(REPO / "torchtitan", source / "torchtitan", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip, quiet = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps", "--no-index"]
    wheels = folder / "wheels"
    subprocess.run([*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("torchtitan-*.whl")
    subprocess.run([*pip, "install", *quiet, "--no-compile", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site: Path, folder: Path, *words: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("CONFIG_FILE", "NGPU", "RANK")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_command_works_without_the_checkout(site: Path, tmp_path: Path) -> None:
    program = site / "bin/torchtitan"
    help_text = run(site, tmp_path, program, "--help")
    assert all(name in help_text for name in (*COMMANDS, *get_ready_files()))
    said = run(site, tmp_path, program, *SMALL)  # without a command and a TOML file: the debug model
    assert "Llama 3 debug model" in said and "Training completed; to see it: " in said

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text((REPO / "LICENSE").read_text() * 3)
    step = "outputs/checkpoint/step-1"
    commands = {
        "config": ["--job.config_file", "llama3_1b"],
        "tokenizer": ["--dataset_path", str(texts), "--vocab_size", "300", "--output", "mine"],
        "tokenize": ["--dataset_path", str(texts), "--tokenizer_path", "mine", "--output", "tokens"],
        "estimate": ["--job.config_file", "llama3_8b_one_gpu"],
        "generate": ["--checkpoint", step, "--prompt", "def", "--max_new_tokens", "2"],
        "convert": ["to_hf", step, "converted"],
        "report": ["outputs"],
        "compare": ["--baseline", "outputs", "--candidate", "outputs", "--out", "compared", "--tolerance", "0"],
    }
    assert {*commands, "train"} == {*COMMANDS}
    words = json.dumps([[name, *options] for name, options in commands.items()])
    file, results = json.loads(run(site, tmp_path, sys.executable, "-c", RUN_EACH, words).splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert [status for status, _ in results] == [0] * len(commands)
    said_by = dict(zip(commands, (text for _, text in results), strict=True))
    assert 'flavor = "1B"' in said_by["config"] and f'tokenizer_path = "{site}/torchtitan/assets' in said_by["config"]
    assert "llama3 8B on 1 GPU" in said_by["estimate"]
    for made in ("mine/tokenizer.json", "converted/model.safetensors", "outputs/report.html", "compared/report.html"):
        assert (tmp_path / made).stat().st_size > 0, made
