"""Every rule across options: what breaks it, what the message says, and the neighbour that does not break it."""

import copy
import json
from pathlib import Path

import pytest

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.errors import FusedLossWithPipelineError, LigerNotInstalledError
from torchtitan.config.manager import resolve
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.protocols.train_spec import validate_run

TRAIN_CONFIGS = Path(__file__).parents[3] / "torchtitan" / "models"
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
TP, CP, PP = (f"--parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline"))
SHARD, REPLICATE = "--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
FLOAT8 = "--model.converters float8"
COMPACT = "--optimizer.state_precision compact"
PARTS = "--parallelism.module_fqns_per_model_part"
# the debug model, which has six layers, in two and in four parts
HALVES = ["tok_embeddings,layers.0,layers.1,layers.2", "layers.3,layers.4,layers.5,norm,output"]
QUARTERS = ["tok_embeddings,layers.0", "layers.1,layers.2", "layers.3,layers.4", "layers.5,output,norm"]


def config_of(argv: str | list[str]) -> JobConfig:
    return resolve(argv.split() if isinstance(argv, str) else argv)[0]


def check(argv, *, world_size=1, num_gpus=None, liger_installed=True, local_world_size=None) -> None:
    config = config_of(argv)
    before = copy.deepcopy(config)
    try:
        validate_run(
            config,
            world_size=world_size,
            num_gpus=num_gpus,
            liger_installed=liger_installed,
            local_world_size=local_world_size,
        )
    finally:
        assert config == before


def test_the_defaults_are_valid():
    check([])


def test_what_is_asked_of_float8_is_not_asked_without_it():
    check("--training.seq_len 100 --training.local_batch_size 3")
    check("--float8.enable_fsdp_float8_all_gather --float8.recipe_name rowwise")


def test_float8_without_torchao_names_the_package(monkeypatch):
    monkeypatch.setattr("torchtitan.protocols.train_spec.is_installed", lambda name: name != "torchao")
    with pytest.raises(ConfigError, match=r'model.converters=float8 needs .* torchao: pip install "torchao>=0.17"'):
        check(FLOAT8)
    check([])


@pytest.mark.parametrize(
    ("world_size", "argv", "parts"),
    [
        # model
        (1, "--model.name llama", ["model.name=llama", "did you mean llama3?"]),
        (1, "--model.flavor 8b", ["model.flavor=8b", "did you mean 8B?"]),
        (
            1,
            "--model.flavor 9B --experimental.custom_import my_models",
            ["model.flavor=9B", "known are debugmodel, 1B, 3B, 8B"],
        ),
        (
            1,
            "--model.flavor huge",
            ["model.flavor=huge", "known are debugmodel, 1B, 3B, 8B, 70B, 405B, 3.2-1B"],
        ),
        # float8
        (1, f"{FLOAT8},float9", ["model.converters has 'float9'", "did you mean float8?"]),
        (
            1,
            f"{FLOAT8} --float8.enable_fsdp_float8_all_gather --float8.recipe_name rowwise",
            ["enable_fsdp_float8_all_gather", "recipe_name=rowwise", "use tensorwise"],
        ),
        (1, f"{FLOAT8} --training.local_batch_size 3 --training.seq_len 100", ["300 tokens", "multiple of 16"]),
        (2, f"{FLOAT8} {PP} 2 --training.seq_len 100", ["microbatch of 100 tokens", "multiple of 16"]),
        # states
        (1, f"{COMPACT} --optimizer.name Adam", ["state_precision=compact", "AdamW"]),
        (1, f"{COMPACT} --optimizer.implementation foreach", ["state_precision=compact", "fused"]),
        (1, f"{COMPACT} --training.mixed_precision_param float32", ["state_precision=compact", "bfloat16"]),
        (1, f"{COMPACT} --training.enable_cpu_offload", ["state_precision=compact", "enable_cpu_offload"]),
        (
            2,
            f"{COMPACT} {FLOAT8} --float8.enable_fsdp_float8_all_gather",
            ["state_precision=compact", "enable_fsdp_float8_all_gather"],
        ),
        # degrees
        (8, f"{TP} 3", ["tensor_parallel_degree=3", "their product is 3", "world size 8", "product divides 8"]),
        (8, f"{SHARD} 2 {REPLICATE} 2", ["their product is 4", "world size 8", "data_parallel_shard_degree=4"]),
        # batch
        (
            2,
            "--training.global_batch_size 20",
            ["global_batch_size=20", "16", "local_batch_size=8", "2 data", "16 or 32"],
        ),
        (2, "--training.global_batch_size 4 --training.local_batch_size 3", ["global_batch_size=4", "use 6"]),
        # length
        (2, f"{TP} 2 --training.seq_len 101", ["training.seq_len=101", "multiple of 2", "use 100 or 102"]),
        (2, f"{CP} 2 --training.seq_len 102", ["training.seq_len=102", "multiple of 4", "use 100 or 104"]),
        (16, f"{CP} 4 {TP} 4 --training.seq_len 24", ["multiple of 16", "context_parallel_degree=4", "use 16 or 32"]),
        (2, f"{TP} 2 --validation.enabled --validation.seq_len 7", ["validation.seq_len=7", "use 6 or 8"]),
        # tensor parallel
        (3, f"{TP} 3 --training.seq_len 300", ["tensor_parallel_degree=3", "n_heads=16", "1, 2, 4, 8 or 16"]),
        (16, f"{TP} 16 --model.flavor 8B", ["tensor_parallel_degree=16", "n_heads=32", "n_kv_heads=8", "1, 2, 4 or 8"]),
        (2, f"{TP} 2 --parallelism.enable_async_tensor_parallel", ["async", "--training.compile"]),
        # fused loss
        (2, f"{FUSED} {TP} 2 --liger_kernel.implementation liger", ["implementation=liger", "degree=2", "native"]),
        (2, f"{TP} 2 --training.feed_forward_pieces 48", ["feed_forward_pieces=48", "1024 tokens", "16 or 32"]),
        # activation checkpointing
        (
            1,
            "--activation_checkpoint.selective_ac_option 0",
            ["selective_ac_option=0", "op, attention or a positive integer"],
        ),
        (1, "--activation_checkpoint.selective_ac_option -1", ["selective_ac_option=-1"]),
        (
            1,
            "--activation_checkpoint.offload --activation_checkpoint.mode none",
            ["offload", "mode=none keeps too much"],
        ),
        (
            1,
            "--activation_checkpoint.offload --activation_checkpoint.selective_ac_option op",
            ["mode=selective with op", "use auto, full, or activation_checkpoint.selective_ac_option=attention"],
        ),
        (2, "--activation_checkpoint.offload --parallelism.pipeline_parallel_degree 2", ["pipelines hold several"]),
        (1, "--activation_checkpoint.selective_ac_option ops", ["selective_ac_option=ops"]),
        # checkpoint
        (
            1,
            "--checkpoint.enable_checkpoint --checkpoint.last_save_in_hf --checkpoint.no-last_save_model_only",
            ["last_save_model_only=true"],
        ),
        (1, "--checkpoint.last_save_in_hf", ["last_save_in_hf needs checkpoint.enable_checkpoint=true"]),
        (1, "--checkpoint.load_step 7", ["load_step=7 needs checkpoint.enable_checkpoint=true"]),
        (1, "--checkpoint.initial_load_in_hf", ["initial_load_path, which is not set"]),
        (
            1,
            "--checkpoint.initial_load_in_hf --checkpoint.initial_load_path a --checkpoint.no-initial_load_model_only",
            ["initial_load_model_only=true"],
        ),
        (1, "--checkpoint.create_seed_checkpoint", ["checkpoint.enable_checkpoint=true"]),
        (2, "--checkpoint.create_seed_checkpoint --checkpoint.enable_checkpoint", ["one process, not on 2", "NGPU=1"]),
        (1, "--checkpoint.exclude_from_loading dataloader,optimiser", ["'optimiser'", "did you mean optimizer?"]),
        (1, "--training.datasets c4", ["has 'c4'; each entry is", "such as c4=0.7"]),
        (1, "--training.datasets c4=1,a=-2", ["has 'a=-2'"]),
        (1, "--training.datasets c4=1,c4=2", ["names c4 twice; give it once"]),
        (1, "--training.datasets c4=1 --training.dataset_path a", ["dataset_path=a both say what is read"]),
        (1, "--checkpoint.exclude_from_loading model", ["'model'", "optimizer, lr_scheduler, dataloader, train_state"]),
        # pipeline: stages
        (16, f"{PP} 16 --training.local_batch_size 16", ["degree=16", "16 stages", "has 6 layers", "use fewer stages"]),
        (8, f"{PP} 8 {SCHEDULE} Interleaved1F1B", ["degree=8 with Interleaved1F1B", "16 stages", "has 6 layers"]),
        (
            4,
            f"{PP} 4 --parallelism.pipeline_parallel_last_stage_less_layers 5",
            ["4 stages", "last_stage_less_layers=5", "at most 3 for embedding and output"],
        ),
        (
            4,
            f"{PP} 4 --parallelism.pipeline_parallel_first_stage_less_layers 5",
            ["4 stages", "first_stage_less_layers=5", "at most 3 for embedding and output"],
        ),
        (2, f"{PP} 2 --parallelism.pipeline_parallel_layers_per_stage 3", ["stage=3 makes 3 stages", "takes 2"]),
        (
            2,
            f"{PP} 2 {SCHEDULE} Interleaved1F1B --parallelism.pipeline_parallel_layers_per_stage 4",
            ["makes 2 stages", "takes 4, 6, 8, ..."],
        ),
        (
            2,
            f"{PP} 2 {SCHEDULE} ZBVZeroBubble --parallelism.pipeline_parallel_layers_per_stage 1",
            ["makes 8 stages", "takes 4"],
        ),
        (
            2,
            f"{PP} 2 --model.flavor 3.2-1B",
            ["pipeline_parallel_degree=2", "llama3 3.2-1B has one weight for both; use a degree of 1"],
        ),
        # pipeline: named modules
        (2, [PP, "2", PARTS, *QUARTERS], ["makes 4 stages", "1F1B", "takes 2"]),
        (2, [PP, "2", SCHEDULE, "ZBVZeroBubble", PARTS, *HALVES], ["makes 2 stages", "takes 4"]),
        (2, [PP, "2", PARTS, "tok_embeddings,layer.0", HALVES[1]], ["'layer.0'", "did you mean layers.0"]),
        (2, [PP, "2", PARTS, "tok_embeddings,layers.0,layers.1", HALVES[1]], ["leaves out layers.2"]),
        (2, [PP, "2", PARTS, *HALVES[::-1]], ["in the model's order: tok_embeddings, layers.0"]),
        (2, [PP, "2", PARTS, f"{HALVES[0]},layers.3", HALVES[1]], ["each module once"]),
        (2, "--profiling.ranks 1,2", ["profiling.ranks names [2]", "use 0 to 1"]),
        # pipeline: microbatches
        (
            2,
            f"{PP} 2 --parallelism.pipeline_parallel_microbatch_size 3",
            ["size=3", "local_batch_size=8", "1, 2, 4 or 8"],
        ),
        (4, f"{PP} 4 --training.local_batch_size 3", ["schedule=1F1B", "at least 4 microbatches", "makes 3"]),
        (
            2,
            f"{PP} 2 {SCHEDULE} Interleaved1F1B --training.local_batch_size 5",
            ["schedule=Interleaved1F1B", "rounds of 2", "makes 5", "use 4 or 6"],
        ),
        (2, f"{PP} 2 {SCHEDULE} ZBVZeroBubble {FLOAT8}", ["ZBVZeroBubble", "float8 layers cannot", "use 1F1B"]),
        (2, f"{PP} 2 {SCHEDULE} ZBVZeroBubble --training.compile", ["ZBVZeroBubble", "training.compile"]),
        (
            2,
            f"{PP} 2 {SCHEDULE} ZBVZeroBubble --parallelism.fsdp_reshard_after_forward always",
            ["ZBVZeroBubble", "fsdp_reshard_after_forward=always", "use default or never"],
        ),
        (
            2,
            f"{PP} 2 {SCHEDULE} ZBVZeroBubble --activation_checkpoint.mode selective"
            " --activation_checkpoint.selective_ac_option op",
            ["ZBVZeroBubble", "keep some results", "activation_checkpoint.mode full or none"],
        ),
        (
            2,
            f"{PP} 2 {SCHEDULE} InterleavedZeroBubble --training.compile",
            ["InterleavedZeroBubble", "training.compile"],
        ),
    ],
)
def test_a_broken_rule_names_the_options_and_a_way_out(world_size, argv, parts):
    with pytest.raises(ConfigError) as raised:
        check(argv, world_size=world_size)
    text = str(raised.value)
    for part in parts:
        assert any(way in text for way in part.split("|")), f"{part!r} is not in {text!r}"


@pytest.mark.parametrize(
    ("world_size", "argv"),
    [
        (8, f"{TP} 2 {CP} 2 {SHARD} 2"),
        (8, f"{REPLICATE} 2 {SHARD} -1"),
        (2, "--training.global_batch_size 32"),
        (3, "--training.seq_len 101"),
        (2, f"{TP} 2 --training.seq_len 102"),
        (2, f"{CP} 2 --training.seq_len 104"),
        (2, f"{TP} 2 --validation.seq_len 7"),
        (8, f"{TP} 8 --model.flavor 405B"),
        (2, f"{TP} 2 --parallelism.enable_async_tensor_parallel --training.compile"),
        (1, "--parallelism.enable_async_tensor_parallel"),
        (2, f"{FUSED} {TP} 2"),
        (2, f"{FUSED} {TP} 2 --liger_kernel.implementation native"),
        (2, f"{TP} 2 --liger_kernel.implementation liger"),
        (1, "--activation_checkpoint.selective_ac_option op"),
        (1, "--activation_checkpoint.selective_ac_option attention"),
        (1, "--activation_checkpoint.selective_ac_option 3"),
        (1, "--checkpoint.last_save_in_hf --checkpoint.enable_checkpoint --checkpoint.load_step 7"),
        (1, "--checkpoint.initial_load_in_hf --checkpoint.initial_load_path a"),
        (1, "--checkpoint.create_seed_checkpoint --checkpoint.enable_checkpoint"),
        (1, "--checkpoint.exclude_from_loading optimizer,lr_scheduler,dataloader,train_state"),
        (1, "--training.steps 5 --lr_scheduler.warmup_steps 200"),  # the scheduler shortens the warm-up, and says so
        (8, f"{PP} 8"),
        (4, f"{PP} 4 --parallelism.pipeline_parallel_first_stage_less_layers 3"),
        (2, f"{PP} 2 --parallelism.pipeline_parallel_microbatch_size 4 --validation.enabled"),
        (4, f"{PP} 4 {SCHEDULE} GPipe --training.local_batch_size 3"),
        (4, f"{PP} 4 {SCHEDULE} Interleaved1F1B"),
        (2, f"{PP} 2 --parallelism.pipeline_parallel_layers_per_stage 4"),
        (2, f"{PP} 2 {SCHEDULE} Interleaved1F1B --parallelism.pipeline_parallel_layers_per_stage 1"),
        (2, f"{PP} 2 {SCHEDULE} Interleaved1F1B --training.local_batch_size 3"),
        (2, f"{PP} 2 {SCHEDULE} ZBVZeroBubble"),
        (2, f"{PP} 2 {SCHEDULE} Interleaved1F1B --training.compile"),
        (2, [PP, "2", PARTS, *HALVES]),
        (2, [PP, "2", SCHEDULE, "ZBVZeroBubble", PARTS, *QUARTERS]),
        (2, [PARTS, "nothing"]),  # without pipeline parallelism
        (1, "--parallelism.pipeline_parallel_microbatch_size 3"),
        (1, "--model.name mine --model.flavor small --experimental.custom_import my_models"),
        (2, f"--model.name mine --experimental.custom_import my_models {TP} 2"),
        (1, "--training.seq_len 200000"),  # the rotary table is made as long as the run needs
    ],
)
def test_what_the_rules_allow(world_size, argv):
    check(argv, world_size=world_size)


def test_every_part_of_a_pipeline_needs_modules(tmp_path):
    parts = [[name for half in HALVES for name in half.split(",")], []]
    (tmp_path / "run.toml").write_text(f"[parallelism]\nmodule_fqns_per_model_part = {json.dumps(parts)}\n")
    with pytest.raises(ConfigError, match="module_fqns_per_model_part has a part without modules"):
        check(f"{PP} 2 --job.config_file {tmp_path / 'run.toml'}", world_size=2)


def test_tensor_parallel_ranks_share_the_feed_forward_layer_equally(monkeypatch):
    small = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_hidden_dim=62, vocab_size=64)
    monkeypatch.setattr("torchtitan.protocols.train_spec.find_model", lambda config: small)
    with pytest.raises(ConfigError, match="degree=4 does not divide ffn_hidden_dim=62 of llama3 .*; use 1 or 2$"):
        check(f"{TP} 4", world_size=4)
    check(f"{TP} 2", world_size=2)


def test_every_tensor_parallel_rank_needs_words(monkeypatch):
    small = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_hidden_dim=64, vocab_size=5)
    monkeypatch.setattr("torchtitan.protocols.train_spec.find_model", lambda config: small)
    with pytest.raises(
        ConfigError, match="tensor_parallel_degree=4 leaves a rank without words of the 5 of .*; use 1 or 2$"
    ):
        check(f"{TP} 4", world_size=4)
    check(f"{TP} 2", world_size=2)


def test_several_broken_rules_are_reported_together():
    with pytest.raises(ConfigError) as raised:
        check(f"{TP} 3 --training.seq_len 100 --checkpoint.create_seed_checkpoint", world_size=2)
    first, *others = str(raised.value).split("\n")
    assert first == "5 mistakes:"
    for part in ("create_seed_checkpoint needs", "on one process", "seq_len=100", "n_heads=16", "world size 2"):
        assert any(part in line for line in others), part


def test_more_processes_than_gpus():
    with pytest.raises(ConfigError, match=r"4 processes on this machine.*it has 2.*NGPU=2"):
        check([], world_size=4, num_gpus=2)
    check([], world_size=2, num_gpus=2)
    check([], world_size=4, num_gpus=0)  # on CPU
    check([], world_size=4)
    check([], world_size=16, num_gpus=8, local_world_size=8)
    with pytest.raises(ConfigError, match="9 processes on this machine"):
        check([], world_size=18, num_gpus=8, local_world_size=9)


def test_async_tensor_parallel_is_refused_on_cpu():
    with pytest.raises(ConfigError, match="needs GPUs"):
        check(f"{TP} 2 --parallelism.enable_async_tensor_parallel --training.compile", world_size=2, num_gpus=0)
    with pytest.raises(ConfigError, match="activation_checkpoint.offload needs GPUs"):
        check(["--activation_checkpoint.offload"], num_gpus=0)
    check(["--activation_checkpoint.offload"], num_gpus=1)


@pytest.mark.parametrize("implementation", ["auto", "liger"])
def test_a_missing_liger_is_the_documented_import_error(implementation):
    argv = f"{FUSED} --liger_kernel.implementation {implementation}"
    with pytest.raises(ImportError) as raised:
        check(argv, liger_installed=False)
    assert isinstance(raised.value, LigerNotInstalledError)
    assert isinstance(raised.value, ConfigError)
    assert raised.value.report() == (
        "ImportError: Liger-Kernel is not installed. Please install it with: pip install liger-kernel"
    )
    check(argv, liger_installed=True)


def test_liger_is_not_needed_by_the_native_loss_or_without_the_flag():
    check(f"{FUSED} --liger_kernel.implementation native", liger_installed=False)
    check("--liger_kernel.implementation liger", liger_installed=False)


@pytest.mark.parametrize("implementation", ["auto", "liger", "native"])
def test_the_fused_loss_with_pipeline_is_the_documented_runtime_error(implementation):
    with pytest.raises(RuntimeError) as raised:
        # although other rules are broken as well
        check(f"{FUSED} {PP} 2 --liger_kernel.implementation {implementation} {TP} 3", world_size=2)
    assert isinstance(raised.value, FusedLossWithPipelineError)
    assert isinstance(raised.value, ConfigError)
    text = raised.value.report()
    assert text.startswith(
        "RuntimeError: Liger-Kernel fused linear cross entropy loss is not compatible with Pipeline Parallelism"
    )
    assert "--parallelism.pipeline_parallel_degree 1" in text
    assert "--liger_kernel.enable_fused_linear_cross_entropy False" in text


@pytest.mark.parametrize("path", sorted(TRAIN_CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path):
    config, no_effect = resolve(["--job.config_file", str(path)])
    axes = config.parallelism
    ranks = 8 * axes.tensor_parallel_degree * axes.context_parallel_degree * axes.pipeline_parallel_degree
    validate_run(config, world_size=ranks * axes.data_parallel_replicate_degree, liger_installed=True)
    assert no_effect == []
