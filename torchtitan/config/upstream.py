"""Upstream torchtitan's options and values that this package names otherwise, needs not, or does not have.

Upstream's TOML files and flags are read unedited: those of v0.1.0 (June 2025), of v0.2.0 to v0.2.2, the last release
that reads TOML (February 2026), and of the months between. Each name of its schema is either ours, or stands here in
one of three kinds: another name of an option of ours; without effect here, accepted, and named in one warning unless it
has upstream's default; or restricted to the values that change nothing, while others are refused with what to do
instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchtitan.config.schema import Option, get_options, option_of, shown


@dataclass(frozen=True)
class UpstreamOption:
    """`harmless` holds the values that change nothing here, upstream's default and its equals; None means that every
    value does."""

    option: Option
    here: str = ""  # the option of this package that it is, if it is one
    harmless: tuple[Any, ...] | None = None
    instead: str = ""  # why other values are refused, or what to do instead


def _renamed(name: str, here: str) -> UpstreamOption:
    return UpstreamOption(replace(get_options()[here], name=name), here)


def _no_effect(name: str, annotation: Any, default: Any) -> UpstreamOption:
    return UpstreamOption(option_of(name, annotation, default))


def _only(name: str, annotation: Any, harmless: tuple[Any, ...], instead: str) -> UpstreamOption:
    return UpstreamOption(option_of(name, annotation, harmless[0]), harmless=harmless, instead=instead)


_TEXTS = list[str]
_NO_EXPERTS = "the models of this package have no experts"
_ESTIMATE = "python -m torchtitan estimate, with the run's options, tells the memory that it needs"
_OWN_OPTIONS = "options cannot be added; experimental.custom_import registers models and datasets"

_RENAMED = (
    _renamed("job.print_config", "job.print_args"),
    _renamed("model.hf_assets_path", "model.tokenizer_path"),
    _renamed("lr_scheduler.lr_min", "lr_scheduler.min_lr_factor"),
    _renamed("compile.enable", "training.compile"),
    _renamed("debug.seed", "training.seed"),
    _renamed("debug.deterministic", "training.deterministic"),
    _renamed("checkpoint.enable", "checkpoint.enable_checkpoint"),
    _renamed("checkpoint.initial_load_model_weights_only", "checkpoint.initial_load_model_only"),
    _renamed("checkpoint.last_save_model_weights_only", "checkpoint.last_save_model_only"),
    _renamed("validation.enable", "validation.enabled"),
    *(
        _renamed(f"quantize.linear.{name}", name)
        for name in (
            "float8.enable_fsdp_float8_all_gather",
            "float8.precompute_float8_dynamic_scale_for_fsdp",
            "float8.recipe_name",
            "float8.filter_fqns",
            "float8.emulate",
        )
    ),
)

_RUN = (
    _no_effect("job.use_for_integration_test", bool, False),
    _no_effect("job.save_config_file", str | None, None),  # config.toml is written anyway
    _only("job.custom_config_module", str, ("",), _OWN_OPTIONS),
    _only("experimental.custom_args_module", str, ("",), _OWN_OPTIONS),
    _no_effect("profiling.profiler_active", int, 1),
    _no_effect("profiling.profiler_warmup", int, 3),
    _no_effect("comm.save_traces_file_prefix", str, "rank_"),
    _only("comm.mode", Literal["default", "fake_backend", "local_tensor"], ("default",), _ESTIMATE),
    _only("memory_estimation.enabled", bool, (False,), _ESTIMATE),
    _only("memory_estimation.enable", bool, (False,), _ESTIMATE),
    _no_effect("memory_estimation.disable_fake_mode", bool, False),
    _only(
        "fault_tolerance.enable", bool, (False,), "TorchFT is not part of this package; --max_restarts restarts runs"
    ),
    # The rest of fault_tolerance acts only where it is enabled.
    _no_effect("fault_tolerance.process_group", str, "gloo"),
    _no_effect("fault_tolerance.process_group_timeout_ms", int, 10000),
    _no_effect("fault_tolerance.replica_id", int, 0),
    _no_effect("fault_tolerance.group_size", int, 0),
    _no_effect("fault_tolerance.min_replica_size", int, 1),
    _no_effect("fault_tolerance.semi_sync_method", str | None, None),
    _no_effect("fault_tolerance.sync_steps", int, 5),
    _no_effect("fault_tolerance.should_quantize", bool, False),
    _no_effect("fault_tolerance.fragment_sync_delay", int, 0),
    _no_effect("fault_tolerance.fragment_update_alpha", float, 0.0),
)

_LEARNING = (
    _no_effect("model.print_after_conversion", bool, False),
    _no_effect("debug.deterministic_warn_only", bool, False),
    _no_effect("debug.moe_force_load_balance", bool, False),
    _no_effect("training.debug_moe_force_load_balance", bool, False),
    _no_effect("compile.components", _TEXTS, ["model", "loss"]),  # training.compile compiles both
    _only("compile.backend", str, ("inductor",), "torch.compile's own backend is the one that is used"),
    _only(
        "optimizer.early_step_in_backward",
        bool,
        (False,),
        "the optimizer steps after backward, because gradients are clipped by their global norm",
    ),
    # Batches are read ahead by a thread of the process.
    *(
        entry
        for loader in ("training.dataloader", "validation.dataloader")
        for entry in (
            _no_effect(f"{loader}.num_workers", int, 0),
            _no_effect(f"{loader}.persistent_workers", bool, False),
            _no_effect(f"{loader}.pin_memory", bool, False),
            _no_effect(f"{loader}.prefetch_factor", int | None, None),
        )
    ),
    # mx and grouped_mm configure converters that are not here (below), and moe_fqns_prototype layers that models lack.
    _no_effect("float8.force_recompute_fp8_weight_in_bwd", bool, False),
    _no_effect("float8.moe_fqns_prototype", _TEXTS, []),
    _no_effect("mx.use_fp8_dim1_cast_triton_kernel", bool, True),
    *(
        entry
        for mx in ("mx", "quantize.linear.mx")
        for entry in (
            _no_effect(f"{mx}.mxfp8_dim1_cast_kernel_choice", Literal["triton", "cuda", "torch"], "triton"),
            _no_effect(f"{mx}.recipe_name", str, "mxfp8_cublas"),
            _no_effect(f"{mx}.filter_fqns", _TEXTS, ["output"]),
        )
    ),
    _no_effect("mx.moe_fqns_prototype", _TEXTS, []),
    _no_effect("quantize.grouped_mm.float8.fqns", _TEXTS, []),
    _no_effect("quantize.grouped_mm.mx.recipe_name", str, "mxfp8"),
    _no_effect("quantize.grouped_mm.mx.fqns", _TEXTS, []),
)

_LAYOUT = (
    _only(
        "parallelism.enable_compiled_autograd",
        bool,
        (False,),
        "compiled autograd is not supported; training.compile compiles the blocks and the loss",
    ),
    # How context-parallel ranks exchange keys and values, and which parts of a sequence each has: the step is the same.
    _no_effect("parallelism.context_parallel_rotate_method", Literal["allgather", "alltoall"], "allgather"),
    _no_effect("parallelism.context_parallel_load_balancer", str | None, "headtail"),
    _only("parallelism.expert_parallel_degree", int, (1,), _NO_EXPERTS),
    _only("parallelism.expert_tensor_parallel_degree", int, (1,), _NO_EXPERTS),
    _no_effect("parallelism.expert_parallel_comm_backend", Literal["standard", "deepep"], "standard"),
    _no_effect("parallelism.pipeline_parallel_expert_parallel_overlap", bool, True),
    _only(
        "parallelism.pipeline_parallel_split_points",
        _TEXTS,
        ([],),
        "name the modules of each stage in parallelism.module_fqns_per_model_part",
    ),
    _only(
        "parallelism.pipeline_parallel_schedule_csv",
        str | None,
        ("", None),
        "choose a schedule with parallelism.pipeline_parallel_schedule",
    ),
    _no_effect("activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns", _TEXTS, ["moe.router.gate"]),
    _no_effect("activation_checkpoint.early_stop", bool, False),
    _no_effect("activation_checkpoint.preserve_rng_state", bool, True),  # nothing in a block is drawn
    _no_effect("activation_checkpoint.determinism_check", str, "default"),
    _no_effect("activation_checkpoint.debug", bool, False),
    # of the mode memory_budget (below)
    _no_effect("activation_checkpoint.memory_budget", float, 0.5),
    _no_effect("activation_checkpoint.visualize_memory_budget_pareto", bool, False),
    _no_effect("checkpoint.enable_ft_dataloader_checkpoints", bool, True),
    _only(
        "checkpoint.initial_load_in_hf_quantized",
        bool,
        (False,),
        "save the weights unquantised first, by from_pretrained and save_pretrained of transformers",
    ),
)

UPSTREAM_OPTIONS: Mapping[str, UpstreamOption] = {
    entry.option.name: entry for entry in (*_RENAMED, *_RUN, *_LEARNING, *_LAYOUT)
}


@dataclass(frozen=True)
class UpstreamValue:
    """What upstream's value of an option of both is here, or what to do instead."""

    here: str = ""
    instead: str = ""


_NO_SCHEDULE = UpstreamValue(
    instead="use GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble or ZBVZeroBubble, which take the same step"
)
_NO_CONVERTER = UpstreamValue(instead="the converter that there is is float8; leave it out")
UPSTREAM_VALUES: Mapping[str, Mapping[str, UpstreamValue]] = {
    "activation_checkpoint.mode": {
        "memory_budget": UpstreamValue(instead="use auto, which recomputes as little as fits the device's memory"),
    },
    "model.converters": {
        "quantize.linear.float8": UpstreamValue(here="float8"),
        "mx": _NO_CONVERTER,
        "quantize.linear.mx": _NO_CONVERTER,
        "quantize.grouped_mm.float8": _NO_CONVERTER,
        "quantize.grouped_mm.mx": _NO_CONVERTER,
    },
    "parallelism.pipeline_parallel_schedule": dict.fromkeys(
        ("LoopedBFS", "DualPipeV", "PipelineScheduleSingle", "PipelineScheduleMulti"), _NO_SCHEDULE
    ),
}

_FAMILIES = ("deepseek_v3", "flux", "gpt_oss", "llama3_ft", "llama4")
_MASKED = UpstreamValue(
    instead="use the flavour without _flex or _varlen, which has the same weights, and training.document_mask"
)
UPSTREAM_NAMES: Mapping[str, Mapping[str, UpstreamValue]] = {
    "model.name": {
        name: UpstreamValue(instead="an own family can be registered, by docs/extending.md") for name in _FAMILIES
    },
    "model.flavor": dict.fromkeys(("debugmodel_flex_attn", "debugmodel_varlen_attn", "8B_flex", "8B_varlen"), _MASKED),
}
"""As UPSTREAM_VALUES, of options whose values are registered: to be asked only where there is no such name."""


def here(name: str) -> str:
    """The name that an option has here."""
    entry = UPSTREAM_OPTIONS.get(name)
    return entry.here or name if entry else name


def value_here(name: str, value: object) -> object:
    """What is given for an option, as this package calls it: one text, several with commas between, or a list.

    Raises ValueError where it is upstream's and has no counterpart.
    """
    values = UPSTREAM_VALUES.get(name)
    if values is None:
        return value
    if isinstance(value, list):
        return [value_here(name, part) for part in value]
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        if part in values and not values[part].here:
            raise ValueError(_about(part, values[part]))
    return ",".join(values[part].here if part in values else part for part in parts)


def about_unknown_name(name: str, value: str) -> str | None:
    """What to say of a name that nothing is registered under, if it is one of upstream's."""
    entry = UPSTREAM_NAMES[name].get(value)
    return _about(value, entry) if entry else None


def _about(value: str, entry: UpstreamValue) -> str:
    return f"{value} is upstream's, and not supported here: {entry.instead}"


def refusal(name: str, value: object) -> str | None:
    """Why an option of the table cannot have this value; None if it can."""
    entry = UPSTREAM_OPTIONS[name]
    if entry.harmless is None or value in entry.harmless:
        return None
    return f"upstream's option, of which only {shown(entry.harmless[0])} is supported here: {entry.instead}"


def is_worth_a_warning(name: str, value: object) -> bool:
    """Whether an accepted value says what is not done here: upstream's own defaults ask for nothing."""
    entry = UPSTREAM_OPTIONS[name]
    return entry.harmless is None and value != entry.option.default


def no_effect_warning(names: list[str]) -> str:
    """The one warning about all options of the table that a run gives."""
    return f"Options of upstream torchtitan that have no effect here: {', '.join(names)}"
