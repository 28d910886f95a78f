"""Every way to give an option, and every way to get it wrong."""

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.manager import ConfigManager, main, to_toml, write_resolved
from torchtitan.config.schema import get_options

ROOT = Path(__file__).parents[3]

parse = ConfigManager().parse_args


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def toml(tmp_path: Path):
    """Writes a TOML file and returns the arguments that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return ["--job.config_file", str(path)]

    return write


def message(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(argv)
    return str(raised.value)


def test_defaults_are_the_schemas():
    assert parse([]) == JobConfig()


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--training.compile"], True),
        (["--training.compile", "True"], True),
        (["--training.compile", "true"], True),
        (["--training.compile=True"], True),
        (["--training.compile=true"], True),
        (["--training.no-compile"], False),
        (["--training.no_compile"], False),
        (["--training.compile", "False"], False),
        (["--training.compile", "false"], False),
        (["--training.compile=False"], False),
        (["--training.compile=false"], False),
        (["--training.compile", "--training.steps", "3"], True),
        (["--training.no-compile", "--training.compile"], True),
        (["--training.compile", "--training.compile", "False"], False),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_boolean_forms(toml, argv, value, in_file):
    config = parse([*toml(f"[training]\ncompile = {str(in_file).lower()}"), *argv])
    assert config.training.compile is value


@pytest.mark.parametrize(
    "flag", ["--liger_kernel.enable_fused_linear_cross_entropy", "--liger-kernel.enable-fused-linear_cross-entropy"]
)
def test_the_documented_flag_and_its_opposite(flag):
    assert parse([flag]).liger_kernel.enable_fused_linear_cross_entropy
    assert not parse([flag, "False"]).liger_kernel.enable_fused_linear_cross_entropy


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--training.seq_len", "64"], "training.seq_len", 64),
        (["--training.seq-len=64"], "training.seq_len", 64),
        (["--training.seq_len=1", "--training.seq_len", "64"], "training.seq_len", 64),
        (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
        (["--training.max_norm", "2"], "training.max_norm", 2.0),
        (["--optimizer.lr=3e-4"], "optimizer.lr", 3e-4),
        (["--profiling.ranks", "0,8"], "profiling.ranks", [0, 8]),
        (["--lr_scheduler.decay_type", "cosine"], "lr_scheduler.decay_type", "cosine"),
        (["--lr-scheduler.decay-ratio", "0.5"], "lr_scheduler.decay_ratio", 0.5),
        (["--training.seed", "None"], "training.seed", None),
        (["--training.dataset_path", "None"], "training.dataset_path", None),
        (["--job.description=a=b --c"], "job.description", "a=b --c"),
        (["--job.description", ""], "job.description", ""),
        (["--", "--training.seq_len", "64"], "training.seq_len", 64),
        (["--training.steps", str(2**63 - 1)], "training.steps", 2**63 - 1),
        (["--training.max_norm", "inf"], "training.max_norm", math.inf),
    ],
)  # fmt: skip
def test_values(argv, name, value):
    section, field = name.split(".")
    given = getattr(getattr(parse(argv), section), field)
    assert given == value
    assert type(given) is type(value)


@pytest.mark.parametrize(("given", "value"), [("", []), ("a", ["a"]), ("a,b", ["a", "b"]), ("a, b", ["a", "b"])])
def test_lists(given, value):
    assert parse(["--checkpoint.exclude_from_loading", given]).checkpoint.exclude_from_loading == value
    assert parse([f"--checkpoint.exclude_from_loading={given}"]).checkpoint.exclude_from_loading == value


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["a,b c"], [["a", "b"], ["c"]]),
        (["a,b", "c"], [["a", "b"], ["c"]]),
        (["a", "b"], [["a"], ["b"]]),
        (["None"], None),
    ],
)
def test_lists_of_lists(given, value):
    argv = ["--parallelism.module_fqns_per_model_part", *given, "--training.compile"]
    assert parse(argv).parallelism.module_fqns_per_model_part == value


def test_command_line_wins_over_file_over_defaults(toml):
    config = parse([*toml("[training]\nsteps = 7\nseq_len = 128"), "--training.steps", "9"])
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (9, 128, 8)


def test_an_option_that_the_file_sets_can_be_unset(toml):
    assert parse([*toml("[training]\nseed = 7"), "--training.seed", "None"]).training.seed is None


def test_the_last_config_file_is_read(toml, tmp_path):
    (tmp_path / "other.toml").write_text("[training]\nsteps = 5")
    config = parse([*toml("[training]\nsteps = 7"), f"--job.config-file={tmp_path / 'other.toml'}"])
    assert config.training.steps == 5


def test_toml_values(toml):
    config = parse(
        toml(
            """
            [training]
            max_norm = 2
            compile = true
            [checkpoint]
            exclude_from_loading = ["optimizer"]
            [parallelism]
            module_fqns_per_model_part = [["tok_embeddings", "layers.0"], ["norm", "output"]]
            """
        )
    )
    assert config.training.max_norm == 2.0
    assert type(config.training.max_norm) is float
    assert config.training.compile is True
    assert config.checkpoint.exclude_from_loading == ["optimizer"]
    assert config.parallelism.module_fqns_per_model_part == [["tok_embeddings", "layers.0"], ["norm", "output"]]


def test_toml_is_read_by_version_1_1(toml):
    """Inline tables over several lines, with a comma at their end; the escapes \\e and \\x."""
    config = parse(toml('training = {\n  steps = 7,  # few\n  seq_len = 64,\n}\n[job]\ndescription = "\\e[1m\\x41"'))
    assert (config.training.steps, config.training.seq_len, config.job.description) == (7, 64, "\x1b[1mA")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        # what was given, what is allowed, what is near
        (["--training.seq_len", "abc"], ["--training.seq_len abc", "an integer >= 1"]),
        (["--training.seq_len=1.5"], ["--training.seq_len=1.5", "an integer >= 1"]),
        (["--training.seq_len", "0"], ["--training.seq_len 0", "an integer >= 1"]),
        (["--training.seq_len", "None"], ["--training.seq_len None", "an integer >= 1"]),
        (["--training.seq_len"], ["--training.seq_len", "needs a value", "an integer >= 1"]),
        (["--training.seq_len", "--training.compile"], ["--training.seq_len", "needs a value"]),
        (["--training.global_batch_size", "-2"], ["an integer >= 1, or -1"]),
        (["--checkpoint.keep_latest_k", "1"], ["--checkpoint.keep_latest_k 1", "an integer >= 2, or 0"]),
        (["--training.seed", "x"], ["an integer >= 0", "or None"]),
        (["--training.max_norm", "0"], ["--training.max_norm 0", "a number > 0"]),
        (["--training.max_norm", "nan"], ["a number > 0, or inf"]),
        (["--optimizer.lr", "inf"], ["--optimizer.lr inf", "a number >= 0, and finite"]),
        (["--optimizer.eps", "1e400"], ["--optimizer.eps 1e400", "a number >= 0, and finite"]),
        (["--optimizer.weight_decay", "nan"], ["a number >= 0"]),
        (["--fault_tolerance.fragment_update_alpha", "nan"], ["a number, and finite"]),
        (["--training.steps", str(2**63)], ["an integer >= 1; the largest is 2**63 - 1"]),
        (["--training.seed", str(2**63)], ["an integer >= 0, or None; the largest is 2**63 - 1"]),
        (["--comm.init_timeout_seconds", str(10**10)], ["an integer >= 1 and <= 1000000000"]),
        (["--job.description", "bad\udcff"], ["--job.description bad\\xff", "must be text; these bytes are not UTF-8"]),
        (["--checkpoint.exclude_from_loading", "a,\udcff"], ["a,\\xff", "these bytes are not UTF-8"]),
        (["--job.\udcff", "1"], ["--job.\\xff 1", "unknown option"]),
        (["--job.config_file", ""], ['--job.config_file ""', "must be a path, or None"]),
        (["--job.dump_folder", ""], ['--job.dump_folder ""', "must be a path"]),
        (["--model.tokenizer_path="], ["--model.tokenizer_path=", "must be a path"]),
        (["--training.dataset_path", ""], ["must be a path, or None"]),
        (["--validation.dataset_path", ""], ["must be a path, or None"]),
        (["--checkpoint.initial_load_path", ""], ["must be a path, or None"]),
        (["--optimizer.beta1", "1"], ["--optimizer.beta1 1", "a number >= 0 and < 1"]),
        (["--lr_scheduler.decay_ratio", "1.5"], ["a number >= 0 and <= 1, or None"]),
        (["--lr_scheduler.decay_type", "cosin"], ["linear, sqrt or cosine", "did you mean cosine?"]),
        (["--liger_kernel.implementation", "Liger"], ["auto, liger or native", "did you mean liger?"]),
        (["--training.compile", "maybe"], ["--training.compile maybe", "true or false"]),
        (["--training.compile="], ["--training.compile=", "true or false"]),
        (["--training.compile", "1"], ["--training.compile 1", "true or false"]),
        (["--training.no-compile=True"], ["--training.no-compile=True", "--training.compile True or False"]),
        (["--training.no-compile", "True"], ["--training.no-compile True: takes no value; there is"]),
        (["--checkpoint.exclude_from_loading", "a", "b"], ["b: unexpected argument", "a,b,c"]),
        (["training.compile=True"], ["training.compile=True", "did you mean --training.compile=True?"]),
        (["stray"], ["stray: unexpected argument"]),
        (["-x"], ["-x: unexpected argument"]),
        (["-training.steps", "5"], ["-training.steps 5: unexpected argument", "did you mean --training.steps?"]),
        (["training.steps", "5"], ["training.steps 5: unexpected argument", "did you mean --training.steps?"]),
        (["--training.seqlen", "64"], ["--training.seqlen 64", "did you mean --training.seq_len?"]),
        (["--training.no-seq_len"], ["--training.no-seq_len: unknown option"]),
        (["--trainign.seq_len=64"], ["--trainign.seq_len=64", "did you mean --training.seq_len?"]),
        (["--training.lr", "1"], ["--training.lr 1", "did you mean --optimizer.lr?"]),
        (["--lr", "1"], ["--lr 1", "did you mean --optimizer.lr?"]),
        (["--compile"], ["--compile: unknown", "did you mean --training.compile?"]),
        (["--no-training.compile"], ["--no-training.compile", "did you mean --training.no-compile?"]),
        (["--checkpoint.enabled"], ["--checkpoint.enabled", "did you mean --checkpoint.enable_checkpoint or"]),
        (["--liger_kernel.enabled"], ["did you mean --liger_kernel.enable_fused_linear_cross_entropy or"]),
        (["--seq_len", "1"], ["did you mean --training.seq_len or --validation.seq_len?"]),
        (["--trainer.seed", "1"], ["did you mean --training.seed?"]),
        (["--training.batch_size", "1"], ["--training.local_batch_size or --training.global_batch_size?"]),
        (["--checkpoint.xyz", "1"], ["--checkpoint.xyz 1", "[checkpoint] has enable_checkpoint, folder, interval"]),
        (["--qqqq.xyz", "1"], ["--qqqq.xyz 1", "unknown section", "job, profiling, metrics, model"]),
        (["--help", "trainin"], ["--help trainin", "did you mean [training]?"]),
        (["--job.config_file", "x.toml", "--help", "training", "qqqq"], ["--help qqqq", "there are job, profiling"]),
        (["--job.config_file"], ["--job.config_file", "needs a value"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(argv, parts):
    text = message(argv)
    assert all(part in text for part in parts), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[training]\nseqlen = 64", ["training.seqlen = 64", "did you mean training.seq_len?"]),
        ("[training]\nlr = 1.0", ["training.lr = 1.0", "did you mean optimizer.lr?"]),
        ("[trainnig]\nsteps = 1", ["trainnig.steps = 1", "did you mean training.steps?"]),
        ("[trainnig]", ["[trainnig]", "did you mean [training]?"]),
        ("[qqqq]\nxyz = 1", ["qqqq.xyz = 1", "unknown section; there are job"]),
        ("seq_len = 64", ["seq_len = 64", "outside the sections", "training.seq_len or validation.seq_len?"]),
        ("training = 64", ["training = 64", "did you mean [training]?"]),
        ('[training]\nseq_len = "64"', ['training.seq_len = "64"', "an integer >= 1"]),
        ("[training]\nseq_len = 64.0", ["training.seq_len = 64.0", "an integer >= 1"]),
        ("[training]\nseq_len = true", ["training.seq_len = true", "an integer >= 1"]),
        ("[training]\nseq_len = -3", ["training.seq_len = -3", "an integer >= 1"]),
        ("[training]\nseq_len = [64]", ["training.seq_len = [64]", "an integer >= 1"]),
        ("[training.seq_len]\na = 1", ["training.seq_len = {", "an integer >= 1"]),
        ("[training]\ncompile = 1", ["training.compile = 1", "true or false"]),
        ('[training]\ncompile = "true"', ['training.compile = "true"', "true or false"]),
        ("[activation_checkpoint]\nselective_ac_option = 2", ["selective_ac_option = 2", "text"]),
        ("[optimizer]\nlr = inf", ["optimizer.lr = Infinity", "a number >= 0, and finite"]),
        (f"[training]\nsteps = 0x{'f' * 5000}", ["training.steps = ...", "the largest is 2**63 - 1"]),
        (f"[training]\nsteps = {'9' * 5000}", ["cannot be read", "value has 5000 digits"]),
        (f"[training]\nsteps = {'[' * 5000}{']' * 5000}", ["cannot be read", "nested too deep"]),
        (f"[{'.'.join(['training'] * 900)}]\na = 1", ["training.training = ", "unknown option"]),
        (f"[{'.'.join(['training'] * 5000)}]\na = 1", ["cannot be read", "nested too deep"]),
        ('[job]\ndump_folder = "a\\u0000"', ["job.dump_folder", "must be a path"]),
        ("[optimizer]\nlr = nan", ["optimizer.lr = NaN", "a number >= 0"]),
        ('[optimizer]\nname = "adamw"', ['optimizer.name = "adamw"', "Adam or AdamW", "did you mean AdamW?"]),
        ('[checkpoint]\nexclude_from_loading = "a"', ["a list of texts"]),
        ("[checkpoint]\nexclude_from_loading = [1]", ["a list of texts"]),
        ("[training]\nseed = 1979-05-27", ["training.seed", "1979-05-27", "an integer"]),
        (f"[optimizer]\nlr = 1{'0' * 400}", ["optimizer.lr", "must be a number"]),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(toml, text, parts):
    argv = toml(text)
    found = message(argv)
    assert all(part in found for part in [argv[1], *parts]), found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("[training]\nsteps 5", 2, 7),
        ("[training]\nsteps = ", 2, 9),
        ("[training\nsteps = 5", 1, 10),
        ('[job]\n\ndescription = "open', 3, 20),
        ("[training]\nsteps = 1\nsteps = 2\n[job]\n", 3, 10),
    ],
)
def test_broken_toml_names_file_line_and_column(toml, text, line, column):
    argv = toml(text)
    assert message(argv).startswith(f"{argv[1]}, line {line}, column {column}: not valid TOML: ")


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    assert "run.toml: not valid TOML: byte 0" in message(["--job.config_file", str(tmp_path / "run.toml")])


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "run.toml").write_text("[training]\nsteps = 7\n", encoding="utf-8-sig")
    assert ConfigManager().parse_args(["--job.config_file", str(tmp_path / "run.toml")]).training.steps == 7


def test_a_missing_file_and_the_one_that_was_meant(tmp_path):
    (tmp_path / "debug_model.toml").touch()
    assert f"did you mean {tmp_path / 'debug_model.toml'}?" in message(
        [f"--job.config_file={tmp_path}/debug_modle.toml"]
    )
    assert "No such file" in message(["--job.config_file", str(tmp_path / "other")])


def test_a_config_file_that_is_no_file_is_one_line_and_not_read(tmp_path):
    """A pipe would be waited for, and /dev/full read until the memory is full."""
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", "/dev/full", "/dev/stdin"):
        assert message(["--job.config_file", str(path)]) == (
            f"cannot read job.config_file {path}: a pipe or a device, which not every process of a run can read;"
            " name a file"
        )
    (tmp_path / "folder.toml").mkdir()
    told = f"cannot read job.config_file {tmp_path / 'folder.toml'}: Is a directory"
    assert message(["--job.config_file", str(tmp_path / "folder.toml")]) == told


def test_a_path_may_begin_with_the_home_folder(toml, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('[training]\ndataset_path = "~/texts"\n[job]\ndescription = "~"')
    config = parse(["--job.config_file=~/run.toml", "--job.dump_folder", "~", "--checkpoint.folder", "~/a"])
    assert config.training.dataset_path == f"{tmp_path}/texts"
    assert config.job.dump_folder == str(tmp_path)
    assert (config.job.description, config.checkpoint.folder) == ("~", "~/a")  # no paths of their own
    assert parse(["--job.dump_folder", "./~"]).job.dump_folder == "./~"
    assert message(["--job.dump_folder", "~no.such.user/a"]) == (
        "--job.dump_folder ~no.such.user/a: must be a path; no user has that home, and a name is ./~no.such.user/a"
    )


def test_all_mistakes_are_reported_together(toml):
    argv = [*toml("[training]\nseqlen = 64\n[optimizer]\nlr = -1.0"), "--training.compile", "maybe", "stray"]
    first, *others = message(argv).split("\n")
    assert first == "4 mistakes:"
    assert [line.startswith("- ") for line in others] == [True] * 4
    for line, part in zip(
        others, ["training.seqlen", "optimizer.lr", "--training.compile maybe", "stray"], strict=True
    ):
        assert part in line


def test_a_value_that_is_like_an_option_is_told_as_both():
    first, second = message(["--job.description", "--compile"]).split("\n")[1:]
    assert first.endswith("one that begins with -- is written --job.description=...")
    assert second.endswith("did you mean --training.compile?")
    first, second = message(["--job.description", "--weird"]).split("\n")[1:]
    assert first.endswith("one that begins with -- is written --job.description=...")
    assert second.startswith("- --weird: unknown section")
    assert message(["--job.description", "--training.compile"]).startswith("--job.description: needs a value, text; ")


def test_a_tokenizer_is_looked_for_in_the_working_directory_and_then_in_the_repository(tmp_path, monkeypatch):
    default = JobConfig().model.tokenizer_path
    monkeypatch.chdir(tmp_path)
    elsewhere = parse([])
    assert elsewhere.model.tokenizer_path == str(ROOT / default)
    assert parse(["--model.tokenizer_path", "nowhere"]).model.tokenizer_path == "nowhere"
    write_resolved(elsewhere, tmp_path / "resolved.toml")
    (tmp_path / default).mkdir(parents=True)
    assert parse([]).model.tokenizer_path == default
    assert parse(["--job.config_file", "resolved.toml"]).model == elsewhere.model


def test_a_mistake_in_the_file_is_one_even_if_overridden(toml):
    assert "training.steps" in message([*toml("[training]\nsteps = 0"), "--training.steps", "5"])


CHANGED = [
    *("--training.seed", "5"),
    *("--training.max_norm", "inf"),
    *("--optimizer.eps", "1e-15"),
    *("--lr_scheduler.decay_ratio", "0.8"),
    *("--job.description", 'quote " backslash \\ and ü'),
    *("--checkpoint.exclude_from_loading", "optimizer,dataloader"),
    *("--parallelism.module_fqns_per_model_part", "tok_embeddings,layers.0", "norm,output"),
    "--training.compile",
]


@pytest.mark.parametrize("argv", [[], CHANGED], ids=["defaults", "changed"])
def test_what_is_printed_can_be_run_again(toml, argv, capsys):
    assert main(argv) == 0
    saved = toml(capsys.readouterr().out)
    first, again = parse(argv), parse(saved)
    again.job.config_file = None
    assert again == first


def test_what_a_run_saves_can_be_run_again(tmp_path):
    config = parse(CHANGED)
    path = tmp_path / "new" / "folder" / "resolved.toml"
    write_resolved(config, path)
    assert path.read_text(encoding="utf-8") == to_toml(config)
    again = parse(["--job.config_file", str(path)])
    assert again.job.config_file == str(path)
    again.job.config_file = None
    assert again == config


def test_options_that_cannot_be_written_are_told_in_one_line(tmp_path):
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.toml, for the options in force, cannot be written: Is a directory"):
        write_resolved(JobConfig(), tmp_path / "config.toml")


def test_a_python_without_the_packages_says_what_to_do():
    command = [sys.executable, "-S", "-m", "torchtitan", "--help"]  # no site-packages
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith(
        f"{sys.executable} lacks tomli, which torchtitan needs. In a checkout `./run_train.sh"
    )
    assert len(result.stderr.splitlines()) == 1


def test_help_lists_every_option_with_default_and_documentation(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for part in ("[training]", "--training.seq_len (an integer >= 1; default: 2048)", "Tokens per sequence.", "[comm]"):
        assert part in text
    for name, option in get_options().items():
        assert f"--{name} ({option.allowed()}; default: " in text


def test_help_for_one_section(capsys):
    with pytest.raises(SystemExit):
        parse(["--help", "liger_kernel"])
    text = capsys.readouterr().out
    assert "--liger_kernel.implementation (auto, liger or native" in text
    assert "--training.seq_len" not in text
    with pytest.raises(SystemExit):
        parse(["--job.config_file", "training", "--help", "comm.trace_buf_size", "job"])
    text = capsys.readouterr().out
    assert "[comm]" in text
    assert "[job]" in text
    assert "[training]" not in text


def test_a_run_warns_and_a_check_does_not(caplog):
    with caplog.at_level(logging.WARNING):
        parse(["--job.use_for_integration_test"], warn=False)
        assert caplog.messages == []
        parse(["--job.use_for_integration_test"])
    assert len(caplog.messages) == 1


def test_the_module_prints_one_message_and_fails():
    command = [sys.executable, "-m", "torchtitan.config.manager"]
    failed = subprocess.run(
        [*command, "--training.seq_len", "abc"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr == "ConfigError: --training.seq_len abc: must be an integer >= 1\n"
    passed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert passed.returncode == 0
    assert passed.stderr == ""
    assert passed.stdout == to_toml(JobConfig())
