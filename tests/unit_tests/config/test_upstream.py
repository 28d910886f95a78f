"""Upstream's files are read unedited; its options that this package lacks are named, or refused if they ask more."""

import logging
from pathlib import Path

import pytest
import tomli_w

from torchtitan.config import ConfigError
from torchtitan.config.manager import ConfigManager, resolve
from torchtitan.config.schema import get_options
from torchtitan.config.upstream import UPSTREAM_OPTIONS
from torchtitan.protocols.train_spec import validate_run

ASSETS = Path(__file__).parents[2] / "assets" / "upstream"


@pytest.mark.parametrize("name", ["debug_model", "llama3_8b"])
def test_upstreams_files_are_valid(name):
    config, _ = resolve(["--job.config_file", str(ASSETS / f"{name}.toml")])
    validate_run(config, world_size=8, num_gpus=8, liger_installed=True)


def test_upstreams_debug_model_keeps_its_values():
    config, no_effect = resolve(["--job.config_file", str(ASSETS / "debug_model.toml")])
    assert (config.training.steps, config.lr_scheduler.decay_ratio, config.training.dataset) == (10, 0.8, "c4_test")
    assert config.activation_checkpoint.selective_ac_option == "2"
    assert not config.checkpoint.last_save_model_only
    assert no_effect == ["job.use_for_integration_test"]
    assert config.float8.filter_fqns == ["output"]


def test_upstreams_8b_keeps_its_values():
    config, no_effect = resolve(["--job.config_file", str(ASSETS / "llama3_8b.toml")])
    assert (config.model.flavor, config.training.seq_len, config.training.local_batch_size) == ("8B", 8192, 1)
    assert config.activation_checkpoint.selective_ac_option == "op"
    assert no_effect == []


def test_one_warning_names_every_option_without_effect(caplog):
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        ConfigManager().parse_args(
            ["--float8.moe_fqns_prototype", "a", "--mx.filter_fqns", "wq", "--model.converters", ""]
        )
    assert caplog.messages == [
        "Options of upstream torchtitan that have no effect here: float8.moe_fqns_prototype, mx.filter_fqns"
    ]


@pytest.mark.parametrize("name", UPSTREAM_OPTIONS)
def test_upstreams_defaults_are_not_worth_a_warning(tmp_path, name):
    option = UPSTREAM_OPTIONS[name].option
    assert option.check(option.default) == option.default
    if option.default is not None:  # which TOML lacks
        section, field = name.split(".")
        (tmp_path / "run.toml").write_text(tomli_w.dumps({section: {field: option.default}}))
        assert resolve(["--job.config_file", str(tmp_path / "run.toml")])[1] == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--fault_tolerance.enable"], ["--fault_tolerance.enable", "TorchFT"]),
        (["--memory_estimation.enabled"], ["--memory_estimation.enabled", "only false"]),
        (["--optimizer.early_step_in_backward=true"], ["early_step_in_backward=true", "clipped"]),
        (["--parallelism.enable_compiled_autograd"], ["training.compile"]),
        (["--parallelism.context_parallel_rotate_method", "alltoall"], ['only "allgather"', "around a ring"]),
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
        resolve(argv)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_the_value_that_is_used_decides(tmp_path):
    (tmp_path / "run.toml").write_text("[memory_estimation]\nenabled = true")
    argv = ["--job.config_file", str(tmp_path / "run.toml")]
    with pytest.raises(ConfigError, match=r"run.toml: memory_estimation.enabled = true: "):
        resolve(argv)
    assert resolve([*argv, "--memory_estimation.enabled", "false"])[1] == []


def test_no_option_is_both_ours_and_foreign():
    assert not UPSTREAM_OPTIONS.keys() & get_options().keys()


@pytest.mark.parametrize("name", UPSTREAM_OPTIONS)
def test_harmless_values_are_of_the_options_type(name):
    entry = UPSTREAM_OPTIONS[name]
    for value in entry.harmless or ():
        assert entry.option.check(value) == value
