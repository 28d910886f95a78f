"""What is checked before processes start: on this machine, without a word if all is well, and without torch."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from torchtitan.config.errors import ConfigError
from torchtitan.config.manager import resolve
from torchtitan.datasets.local import KNOWN
from torchtitan.launch.environment import describe_upstream_variables
from torchtitan.launch.preflight import about_other_numbers, check, get_vocab_size
from torchtitan.models.llama3 import hf_config, llama3_flavors
from torchtitan.protocols.train_spec import get_run_args

ROOT = Path(__file__).parents[3]
DATASET_ADVICE = f"data are a file or a folder on this machine, of {KNOWN}"


def write_tokenizer(folder: Path, num_tokens: int, num_added: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    added = [{"id": num_tokens + i, "content": f"<{i}>"} for i in range(num_added)]
    vocab = {f"t{i}": i for i in range(num_tokens)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added})
    )
    return folder


@pytest.fixture
def valid(tmp_path: Path) -> list[str]:
    """Options of a run that can start."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 100)
    return ["--model.tokenizer_path", str(tokenizer), "--job.dump_folder", str(tmp_path / "out" / "puts")]


@pytest.fixture
def refused(valid):
    """Runs the preflight with more options and returns its one message."""

    def run(*argv: str, nproc: int = 1, **launch: int) -> str:
        with pytest.raises(ConfigError) as raised:
            check([*valid, *argv], nproc=nproc, **launch)
        return raised.value.report()

    return run


def test_a_run_that_can_start_gets_no_word_and_its_folder(valid, capsys, tmp_path):
    check([*valid, "--job.use_for_integration_test"], nproc=2)
    assert capsys.readouterr() == ("", "")
    assert list((tmp_path / "out" / "puts").iterdir()) == []


def test_options_and_rules_are_checked(refused):
    assert refused("--training.seqlen", "5").startswith("ConfigError: --training.seqlen 5: unknown option")
    assert "world size 6" in refused("--parallelism.data_parallel_shard_degree", "5", nproc=2, nnodes=3)
    assert "it has 2" in refused(nproc=4, num_gpus=2)


def test_numbers_of_machines_that_the_batch_cannot_go_on_with_are_named(valid):
    options = [*valid, "--training.local_batch_size", "2"]
    assert list(about_other_numbers([*options, "--training.global_batch_size", "32"], nproc=2, nodes=range(2, 3))) == []
    (told,) = about_other_numbers([*options, "--training.global_batch_size", "32"], nproc=2, nodes=range(2, 5))
    assert told.startswith("--nnodes 2:4: the run cannot go on with 3 machines: training.global_batch_size=32 is")
    (told,) = about_other_numbers(options, nproc=2, nodes=range(2, 5))
    assert told.startswith("--nnodes 2:4: training.global_batch_size is not set, so each number of machines has")


def test_the_documented_errors_keep_their_names(refused, monkeypatch):
    fused = "--liger_kernel.enable_fused_linear_cross_entropy"
    monkeypatch.setattr("torchtitan.tools.packages.find_spec", lambda name: None)
    assert refused(fused) == (
        "ImportError: Liger-Kernel is not installed. Please install it with: pip install liger-kernel"
    )
    native = ("--liger_kernel.implementation", "native")
    assert refused(fused, *native, "--parallelism.pipeline_parallel_degree", "2").startswith(
        "RuntimeError: Liger-Kernel fused linear cross entropy loss is not compatible with Pipeline Parallelism"
    )


def test_tokenizer_missing_broken_or_too_large(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "tokenizer.model").touch()
    os.mkfifo(tmp_path / "pipe")
    large = write_tokenizer(tmp_path / "large", 1999, num_added=2)
    for path, part in {
        "nowhere": "does not exist",
        "empty": "holds no tokenizer.json",
        "broken": "is not in the format",
        "other.json": "is not in the format",
        "tokenizer.model": "is a tokenizer of another format",
        "pipe": "is neither a file nor a folder",
    }.items():
        text = refused("--model.tokenizer_path", str(tmp_path / path))
        assert text.startswith("TokenizerError: ")
        assert "model.tokenizer_path" in text
        assert f"{tmp_path / path} {part}" in text
    text = refused("--model.tokenizer_path", str(large))
    assert "token ids up to 2000" in text
    assert "llama3 debugmodel has a vocabulary of 2000" in text


def test_a_tokenizer_that_just_fits(valid, tmp_path):
    just = write_tokenizer(tmp_path / "just", 1998, num_added=2)
    for path in (just, just / "tokenizer.json"):
        check([*valid, "--model.tokenizer_path", str(path)], nproc=1)


def test_vocab_size_of_either_form(tmp_path):
    (tmp_path / "unigram.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert get_vocab_size(tmp_path / "unigram.json") == 2
    assert get_vocab_size(write_tokenizer(tmp_path / "bpe", 5, num_added=3) / "tokenizer.json") == 8


def test_dataset_missing_or_empty(refused, valid, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, part in {
        "nowhere": f"does not exist; {DATASET_ADVICE}",
        "pipe": "is neither a file nor a folder: data is read more than once, as a pipe or a device cannot be;"
        " write it to a file",
        "empty.txt": "is empty",
        "folder": "is empty; hidden files are passed over",
    }.items():
        text = refused("--training.dataset_path", str(tmp_path / path))
        assert text == f"DatasetError: training.dataset_path={tmp_path / path} {part}"
    text = refused("--validation.enabled", "--validation.dataset_path", str(tmp_path / "nowhere"))
    assert text == f"DatasetError: validation.dataset_path={tmp_path / 'nowhere'} does not exist; {DATASET_ADVICE}"
    check([*valid, "--validation.dataset_path", str(tmp_path / "nowhere")], nproc=1)
    (tmp_path / "folder" / "data.txt").write_text("text")
    check([*valid, "--training.dataset_path", str(tmp_path / "folder")], nproc=1)


def test_data_behind_links_to_folders_counts(refused, valid, tmp_path):
    for folder in ("data", "top"):
        (tmp_path / folder).mkdir()
    (tmp_path / "top/to_data").symlink_to(tmp_path / "data")
    for circle in ("first", "second"):
        (tmp_path / "top" / circle).symlink_to(tmp_path / "top")
    argv = ["--training.dataset_path", str(tmp_path / "top")]
    assert " is empty; " in refused(*argv)
    (tmp_path / "data/data.txt").write_text("text")
    check([*valid, *argv], nproc=1)


def test_where_a_relative_path_was_looked_for_is_said(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = f"dataset_path=no/data does not exist in {tmp_path}; {DATASET_ADVICE}"
    assert refused("--training.dataset_path", "no/data") == f"DatasetError: training.{given}"
    text = refused("--model.tokenizer_path", "nowhere")
    assert f"nowhere does not exist in {tmp_path} or {ROOT}; model.tokenizer_path takes a tokenizer.json" in text


def test_a_dataset_that_is_not_registered(refused, valid, tmp_path):
    text = refused("--training.dataset", "python_stdlb")
    assert text == "DatasetError: training.dataset=python_stdlb is unknown; did you mean python_stdlib?"
    text = refused("--validation.enabled", "--validation.dataset", "qqqq")
    assert text.startswith("DatasetError: validation.dataset=qqqq is unknown; known are python_stdlib, ")
    (tmp_path / "data.txt").write_text("text")
    path = ["--training.dataset_path", str(tmp_path / "data.txt")]
    assert "training.dataset=qqqq is unknown" in refused("--training.dataset", "qqqq", *path)
    # the one may not be read, the other may be registered later
    check([*valid, "--validation.dataset", "qqqq"], nproc=1)
    custom = ["--experimental.custom_import", "torchtitan.models"]
    check([*valid, "--training.dataset", "qqqq", *custom], nproc=1)


def test_what_a_mixture_names_is_a_dataset_or_a_path(refused, valid, tmp_path):
    text = refused("--training.datasets", "python_stdlb=1,c4=2")
    assert (
        text == "DatasetError: training.datasets has python_stdlb, no dataset and no path; did you mean python_stdlib?"
    )
    text = refused("--training.datasets", f"c4=2,{tmp_path}/nowhere=1")
    assert text.startswith(f"DatasetError: training.datasets: {tmp_path}/nowhere does not exist; data are a")
    (tmp_path / "data.txt").write_text("text")
    check([*valid, "--training.datasets", f"python_stdlib=0.7, {tmp_path}=0.3"], nproc=1)


def test_c4_test_needs_a_path(refused, valid, tmp_path):
    text = refused("--training.dataset", "c4_test")
    assert text.startswith("DatasetError: training.dataset=c4_test: c4_test, a small sample of C4, is not part")
    (tmp_path / "c4.jsonl").write_text('{"text": "text"}')
    argv = ["--training.dataset", "c4_test", "--training.dataset_path", str(tmp_path / "c4.jsonl")]
    check([*valid, *argv], nproc=1)


def test_weights_and_biases_must_be_installed(refused, monkeypatch):
    monkeypatch.setattr("torchtitan.tools.packages.find_spec", lambda name: None)
    assert refused("--metrics.enable_wandb") == (
        "ConfigError: metrics.enable_wandb needs the package wandb: pip install wandb"
    )


@pytest.fixture
def bare_home(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torchtitan.launch.preflight.is_installed", lambda name: True)
    return tmp_path


def test_weights_and_biases_without_a_key(refused, valid, bare_home, monkeypatch):
    assert refused("--metrics.enable_wandb").startswith(
        "ConfigError: metrics.enable_wandb needs a key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
    )
    (bare_home / ".netrc").write_text("machine example.com\n  login user\n  password 1\n")
    refused("--metrics.enable_wandb")
    (bare_home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 1\n")
    check([*valid, "--metrics.enable_wandb"], nproc=1)
    (bare_home / ".netrc").unlink()
    for name, value in {"WANDB_API_KEY": "1", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
        check([*valid, "--metrics.enable_wandb"], nproc=1)
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("num_gpus", "variable", "compiler", "said"),
    [(0, "CXX", "g++", "a C++ compiler, and there is no g++"), (1, "CC", "gcc", "a C compiler, and there is no gcc")],
)
def test_compilation_without_a_compiler(refused, valid, tmp_path, monkeypatch, num_gpus, variable, compiler, said):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"training.compile needs {said}" in refused("--training.compile", num_gpus=num_gpus)
    check(valid, nproc=1, num_gpus=num_gpus)
    monkeypatch.setenv(variable, "my-compiler -x")
    assert f"{variable}=my-compiler is not there" in refused("--training.compile", num_gpus=num_gpus)
    for name in ("my-compiler", compiler):
        (tmp_path / name).touch(mode=0o755)
        check([*valid, "--training.compile"], nproc=1, num_gpus=num_gpus)
        (tmp_path / name).unlink()
        monkeypatch.delenv(variable, raising=False)


def test_variables_that_only_upstream_reads_are_named(monkeypatch):
    for name in ("TRAIN_FILE", "COMM_MODE", "TORCHFT_LIGHTHOUSE", "WANDB_TEAM", "WANDB_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert describe_upstream_variables() is None
    monkeypatch.setenv("COMM_MODE", "fake_backend")
    monkeypatch.setenv("WANDB_TEAM", "us")
    assert describe_upstream_variables() == (
        "Environment variables of upstream torchtitan that do nothing here: COMM_MODE (--dry_run tells"
        " what a run on any number of ranks will be, and starts nothing); WANDB_TEAM (wandb's own variable is"
        " WANDB_ENTITY)"
    )


def test_initial_checkpoint_missing(refused, valid, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    argv = ["--checkpoint.initial_load_path", nowhere]
    given = f"checkpoint.initial_load_path={nowhere}"
    told = f"CheckpointError: {given} does not exist; it takes the folder of a checkpoint"
    assert refused(*argv) == told
    (tmp_path / "out" / "puts" / "checkpoint" / "step-5").mkdir(parents=True)
    assert refused(*argv) == told
    # a run that continues from its own checkpoint does not read it
    check([*valid, *argv, "--checkpoint.enable_checkpoint"], nproc=1)


@pytest.mark.parametrize("option", ["model.tokenizer_path", "training.dataset_path", "checkpoint.initial_load_path"])
def test_what_cannot_be_looked_at_is_said_with_the_reason(refused, option):
    path = "x" * 256  # a longer name than file systems take; a folder without permission is the same to us
    assert refused(f"--{option}", path).endswith(f"Error: {option}={path} cannot be read: File name too long")


def test_a_folder_that_may_not_be_read_is_not_called_empty(refused, tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("torchtitan.datasets.local.os.scandir", refuse)  # nothing is forbidden to root
    text = refused("--training.dataset_path", str(tmp_path))
    assert (
        text
        == f"DatasetError: training.dataset_path={tmp_path} cannot be read: Permission denied; check its permissions"
    )


def test_a_module_that_is_not_there(refused):
    text = refused("--experimental.custom_import", "no_such_module")
    assert text.startswith("ConfigError: experimental.custom_import=no_such_module: there is no such module")


@pytest.mark.parametrize("below", ["", "/below"])
def test_output_folder_that_cannot_be_written(refused, tmp_path, below):
    (tmp_path / "file").touch()
    text = refused("--job.dump_folder", f"{tmp_path}/file{below}")
    assert text.startswith(f"ConfigError: job.dump_folder={tmp_path}/file{below} cannot be written: ")
    assert text.endswith("; name another folder")


def test_faults_of_the_machine_are_reported_together(refused, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    lines = refused("--training.dataset_path", nowhere, "--model.tokenizer_path", nowhere).split("\n")
    assert lines[0] == "ConfigError: 2 mistakes:"
    assert len(lines) == 3


def test_no_torch_is_imported(valid):
    code = (
        "import sys; from torchtitan.launch.preflight import check; check(sys.argv[1:], nproc=2);"
        "assert not {'torch', 'datasets', 'pyarrow'} & sys.modules.keys()"
    )
    argv = [*valid, "--parallelism.tensor_parallel_degree", "2"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_is_shown_and_nothing_is_checked(capsys):
    with pytest.raises(SystemExit) as left:
        check(["--help", "--training.seqlen"], nproc=1)
    assert left.value.code == 0
    assert "--training.seq_len" in capsys.readouterr().out


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model of Hugging Face's, but for its weights."""
    folder = write_tokenizer(tmp_path / "model", 100)
    (folder / "config.json").write_text(json.dumps(hf_config.write(replace(llama3_flavors["3.2-1B"], vocab_size=100))))
    return folder


def test_a_model_by_its_folder_brings_its_shape_tokenizer_and_weights(model_folder, tmp_path):
    options = ["--model.hf_folder", str(model_folder), "--job.dump_folder", str(tmp_path / "out")]
    check(options, nproc=2)
    config = resolve([*options, "--checkpoint.initial_load_in_hf"])[0]
    assert (config.model.tokenizer_path, config.checkpoint.initial_load_path) == (str(model_folder),) * 2
    args = get_run_args(config.model, max_seq_len=77)
    assert (args.dim, args.rope_scaling.factor, args.tie_embeddings, args.max_seq_len) == (2048, 32.0, True, 77)
    named = resolve([*options, "--model.tokenizer_path", "other", "--checkpoint.initial_load_path", "another"])[0]
    assert (named.model.tokenizer_path, named.checkpoint.initial_load_path) == ("other", "another")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "config.json: quantized weights are not supported"),
        ({"attention_bias": True}, "config.json: attention_bias is True; LlamaForCausalLM here has False"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "config.json: rope_type is 'yarn'; LlamaForCausalLM here has 'default'",
        ),
        ({"model_type": "mistral"}, "config.json: model_type is 'mistral'; the families of this package have 'llama'"),
        ({"vocab_size": 99}, "model has a vocabulary of 99"),
        ({"num_key_value_heads": 1}, "does not divide n_heads=32 and n_kv_heads=1"),
    ],
)
def test_what_a_folder_describes_is_checked(model_folder, refused, change, message):
    file = model_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    options = ["--model.hf_folder", str(model_folder), "--parallelism.tensor_parallel_degree", "2"]
    assert message in refused(*options, nproc=2)


def test_weights_that_are_not_the_models_are_named(model_folder, refused, tmp_path):
    """Before any process starts: no file of theirs is opened but for its list of names."""
    args = get_run_args(resolve(["--model.hf_folder", str(model_folder)])[0].model, max_seq_len=1)
    names = list(hf_config.get_names(args).values())
    options = ["--model.hf_folder", str(model_folder), "--checkpoint.initial_load_in_hf"]

    def write(*names: str) -> None:
        save_file({name: np.zeros(1, np.float16) for name in names}, model_folder / "model.safetensors")

    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused(*options)
    write(*names, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    check([*options, "--job.dump_folder", str(tmp_path / "out")], nproc=1)
    write(*names, "model.layers.16.mlp.up_proj.weight", "model.layers.16.mlp.down_proj.weight")
    assert "holds model.layers.16.mlp.down_proj.weight and 1 more, which has no place in this model" in refused(
        *options
    )
    write(*names[1:])
    assert f"{model_folder} lacks {names[0]}" in refused(*options)
    by_name = ["--checkpoint.initial_load_path", str(model_folder), "--checkpoint.initial_load_in_hf"]
    assert "config.json: hidden_size is 2048, and 256 in this model" in refused(*by_name)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names" in refused(*options)


def test_a_folder_without_a_model_is_named(refused, tmp_path):
    given = f"model.hf_folder={tmp_path / 'none'}"
    assert f"{given} holds no config.json" in refused("--model.hf_folder", str(tmp_path / "none"))
