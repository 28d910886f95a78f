"""Upstream's files and flags are read unedited; what is not here is named, or refused if it asks for more."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli
import tomli_w

from torchtitan.config import ConfigError
from torchtitan.config.manager import ConfigManager, resolve
from torchtitan.config.schema import get_options
from torchtitan.config.upstream import UPSTREAM_OPTIONS, UPSTREAM_VALUES
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import validate_run

ASSETS = Path(__file__).parents[2] / "assets" / "upstream"
LINES = tomli.loads((ASSETS / "integration_lines.toml").read_text())
VERSIONS = ("v0_1_0", "2025_08", "v0_2_2")


def read_files(version: str) -> dict[str, dict]:
    return tomli.loads((ASSETS / f"{version}.toml").read_text())


def write(folder: Path, version: str, file: str) -> list[str]:
    (folder / f"{file}.toml").write_text(tomli_w.dumps(read_files(version)[file]))
    return ["--job.config_file", str(folder / f"{file}.toml")]


def integration_lines(version: str) -> Iterator[tuple[str, int, list[str]]]:
    """Of each the name, the number of processes, and the options in this version's names."""
    for name, (nproc, options) in (LINES["lines"] | LINES["only"].get(version, {})).items():
        if name not in LINES["not_in"][version]:
            for known, other in LINES["names"].get(version, {}).items():
                options = options.replace(known, other)
            yield name, nproc, options.split()


@pytest.fixture(autouse=True)
def with_torchao(monkeypatch):
    monkeypatch.setattr(train_spec, "is_installed", lambda package: True)


@pytest.mark.parametrize("version", VERSIONS)
def test_upstreams_four_files_are_valid_and_keep_their_values(tmp_path, version):
    files = read_files(version)
    assert list(files) == ["debug_model", "llama3_8b", "llama3_70b", "llama3_405b"]
    for file, sections in files.items():
        config, no_effect = resolve(write(tmp_path, version, file))
        validate_run(config, world_size=512, local_world_size=8, num_gpus=8, liger_installed=True)
        assert no_effect in ([], ["job.use_for_integration_test"])
        ours = config.to_dict()
        same = [(s, name) for s in sections for name in sections[s] if s in ours and name in ours[s]]
        assert len(same) > 30
        assert all(ours[s][name] == sections[s][name] for s, name in same if (s, name) != ("model", "converters"))
        assert config.model.converters == (["float8"] if file == "llama3_405b" else [])
        assert config.training.compile == (file == "llama3_405b")
        assert config.float8.filter_fqns == ["output"]


REFUSED = {
    "pp_custom_csv": "parallelism.pipeline_parallel_schedule",
    "cpu_offload+opt_in_bwd": "clipped by their global norm",
    "fsdp+flex_attn": "training.document_mask",
    "fsdp+flex_attn+per_op_sac": "training.document_mask",
    "fsdp+varlen_attn": "training.document_mask",
    "custom_args_module": "experimental.custom_import",
    "memory_budget": "use auto",
    "fake_backend": "torchtitan estimate",
    "memory_estimation": "torchtitan estimate",
}


@pytest.mark.parametrize(("version", "passing", "of"), [("v0_1_0", 37, 41), ("2025_08", 40, 45), ("v0_2_2", 45, 53)])
def test_upstreams_integration_lines_pass_or_are_refused_with_what_to_do_instead(tmp_path, version, passing, of):
    file = write(tmp_path, version, "debug_model")
    refused = {}
    for name, nproc, options in integration_lines(version):
        try:
            validate_run(resolve([*file, *options])[0], world_size=nproc, num_gpus=8, liger_installed=True)
        except ConfigError as error:
            refused[name] = str(error)
    names = [name for name, _, _ in integration_lines(version)]
    assert refused.keys() == REFUSED.keys() & names
    assert all(
        REFUSED[name] in why and "upstream's" in why and "did you mean" not in why for name, why in refused.items()
    )
    print(f"\n{version}: {len(names) - len(refused)} of {len(names)} lines; refused: {', '.join(refused)}")
    assert (len(names) - len(refused), len(names)) == (passing, of)


def test_one_warning_names_every_option_without_effect(caplog):
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        ConfigManager().parse_args(
            ["--float8.moe_fqns_prototype", "a", "--mx.filter_fqns", "wq", "--model.converters", ""]
        )
    assert caplog.messages == [
        "Options of upstream torchtitan that have no effect here: float8.moe_fqns_prototype, mx.filter_fqns"
    ]


def test_upstreams_defaults_are_not_worth_a_warning(tmp_path):
    tables: dict[str, dict] = {}
    for name, entry in UPSTREAM_OPTIONS.items():
        assert entry.option.check(entry.option.default) == entry.option.default
        if entry.option.default is not None:  # which TOML lacks
            *sections, field = name.split(".")
            table = tables
            for section in sections:
                table = table.setdefault(section, {})
            table[field] = entry.option.default
    (tmp_path / "run.toml").write_text(tomli_w.dumps(tables))
    assert resolve(["--job.config_file", str(tmp_path / "run.toml")])[1] == []


RENAMED = {name: entry.here for name, entry in UPSTREAM_OPTIONS.items() if entry.here}


def test_other_names_set_our_options(tmp_path):
    for name, here in RENAMED.items():
        option = get_options()[here]
        value = {bool: not option.default, int: 7, float: 0.25, str: "rowwise", list[str]: ["wq"]}[option.base]
        *sections, field = name.split(".")
        table: dict = {field: value}
        for section in reversed(sections):
            table = {section: table}
        (tmp_path / "run.toml").write_text(tomli_w.dumps(table))
        text = ",".join(value) if isinstance(value, list) else str(value)
        for argv in (["--job.config_file", str(tmp_path / "run.toml")], [f"--{name}", text]):
            config, no_effect = resolve(argv)
            section, field_here = here.split(".")
            assert config.to_dict()[section][field_here] == value and no_effect == []


def test_of_two_names_the_later_wins_and_the_message_has_the_one_that_was_given():
    config, _ = resolve(["--checkpoint.enable", "--checkpoint.enable_checkpoint", "False"])
    assert not config.checkpoint.enable_checkpoint
    config, _ = resolve(["--checkpoint.enable_checkpoint", "False", "--checkpoint.enable"])
    assert config.checkpoint.enable_checkpoint
    assert (
        resolve(["--quantize.linear.float8.emulate", "--quantize.linear.float8.no-emulate"])[0].float8.emulate is False
    )
    with pytest.raises(ConfigError, match=r"^--debug.seed -1: must be an integer >= 0"):
        resolve(["--debug.seed", "-1"])


def test_values_that_are_called_otherwise_are_translated_in_files_and_on_the_command_line(tmp_path):
    (tmp_path / "run.toml").write_text('[model]\nconverters = ["quantize.linear.float8"]')
    for argv in (
        ["--job.config_file", str(tmp_path / "run.toml")],
        ["--model.converters", "quantize.linear.float8"],
    ):
        assert resolve(argv)[0].model.converters == ["float8"]
    assert all(name in get_options() for name in UPSTREAM_VALUES)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--fault_tolerance.enable"], ["--fault_tolerance.enable", "TorchFT"]),
        (["--memory_estimation.enabled"], ["--memory_estimation.enabled", "only false"]),
        (["--optimizer.early_step_in_backward=true"], ["early_step_in_backward=true", "clipped"]),
        (["--parallelism.enable_compiled_autograd"], ["training.compile"]),
        (["--comm.mode", "local_tensor"], ['only "default"', "torchtitan estimate"]),
        (["--model.converters", "float8,mx"], ["mx is upstream's", "float8"]),
        (["--model.name", "llama4"], ["llama4 is upstream's", "docs/extending.md"]),
        (["--parallelism.expert_parallel_degree", "2"], ["only 1", "experts"]),
        (["--parallelism.pipeline_parallel_split_points", "layers.2"], ["parallelism.module_fqns_per_model_part"]),
        (["--parallelism.pipeline_parallel_schedule_csv", "a.csv"], ["parallelism.pipeline_parallel_schedule"]),
        (["--experimental.custom_args_module", "mine"], ["experimental.custom_import"]),
        # of the right type, too
        (["--parallelism.expert_parallel_degree", "two"], ["--parallelism.expert_parallel_degree two", "an integer"]),
        (["--float8.recipe_name", "rowise"], ["did you mean rowwise?"]),
    ],
)
def test_what_would_change_the_training_is_refused(argv, parts):
    with pytest.raises(ConfigError) as raised:
        validate_run(resolve(argv)[0], world_size=1, liger_installed=True)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_the_value_that_is_used_decides(tmp_path):
    (tmp_path / "run.toml").write_text("[memory_estimation]\nenabled = true")
    argv = ["--job.config_file", str(tmp_path / "run.toml")]
    with pytest.raises(ConfigError, match=r"run.toml: memory_estimation.enabled = true: "):
        resolve(argv)
    assert resolve([*argv, "--memory_estimation.enabled", "false"])[1] == []


def test_no_option_is_both_ours_and_foreign():
    assert not UPSTREAM_OPTIONS.keys() & get_options().keys()


def test_every_option_of_upstreams_schema_is_known():
    """Its names: v0.1.0 had 102 options, v0.2.0 to v0.2.2 had 132, 147 and 149; 175 different ones."""
    schema = (ASSETS / "schema.txt").read_text().split()
    assert len(schema) == len(set(schema)) == 175
    assert [name for name in schema if name not in get_options().keys() | UPSTREAM_OPTIONS.keys()] == []
