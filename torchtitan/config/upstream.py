"""Upstream torchtitan's options and values that this package names otherwise, needs not, or does not have.

Upstream's TOML files and flags are read unedited: those of v0.1.0 (June 2025), of v0.2.0 to v0.2.2, the last release
that reads TOML (February 2026), and of the months between. Each name of its schema is either ours, or stands here in
one of three kinds: another name of an option of ours; without effect here, accepted, and named in one warning unless it
has upstream's default; or restricted to the values that change nothing, while others are refused with what to do
instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtitan.config.schema import Option, get_options, option_of, shown


@dataclass(frozen=True)
class UpstreamOption:
    """Its default asks for nothing, nor do None and an empty text."""

    option: Option
    here: str = ""  # the option of this package that it is, if it is one
    only: bool = False  # whether other values than the default are refused
    instead: str = ""  # why they are, or what to do instead


# Upstream's name: ours.
_RENAMED = {
    "job.print_config": "job.print_args",
    "model.hf_assets_path": "model.tokenizer_path",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "compile.enable": "training.compile",
    "debug.seed": "training.seed",
    "debug.deterministic": "training.deterministic",
    "checkpoint.enable": "checkpoint.enable_checkpoint",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "validation.enable": "validation.enabled",
    **{f"quantize.linear.{name}": name for name in get_options() if name.startswith("float8.")},
}

_DATALOADER = {"num_workers": 0, "persistent_workers": False, "pin_memory": False, "prefetch_factor": None}
_MX = {"mxfp8_dim1_cast_kernel_choice": "triton", "recipe_name": "mxfp8_cublas", "filter_fqns": ["output"]}
# Without effect: by section, each with upstream's default, which tells the type.
_NO_EFFECT: Mapping[str, Mapping[str, Any]] = {
    "job": {"use_for_integration_test": False, "save_config_file": None},  # config.toml is written anyway
    "profiling": {"profiler_active": 1, "profiler_warmup": 3},
    "comm": {"save_traces_file_prefix": "rank_"},
    "memory_estimation": {"disable_fake_mode": False},
    "fault_tolerance": {  # which acts only where it is enabled
        "process_group": "gloo",
        "process_group_timeout_ms": 10000,
        "replica_id": 0,
        "group_size": 0,
        "min_replica_size": 1,
        "semi_sync_method": None,
        "sync_steps": 5,
        "should_quantize": False,
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
    },
    "model": {"print_after_conversion": False},
    "debug": {"deterministic_warn_only": False, "moe_force_load_balance": False},
    "training": {"debug_moe_force_load_balance": False},
    "compile": {"components": ["model", "loss"]},  # training.compile compiles both
    # Batches are read ahead by a thread of the process.
    "training.dataloader": _DATALOADER,
    "validation.dataloader": _DATALOADER,
    # mx and grouped_mm configure converters that are not here (below), and moe_fqns_prototype layers that models lack.
    "float8": {"force_recompute_fp8_weight_in_bwd": False, "moe_fqns_prototype": []},
    "mx": {"use_fp8_dim1_cast_triton_kernel": True, "moe_fqns_prototype": [], **_MX},
    "quantize.linear.mx": _MX,
    "quantize.grouped_mm.float8": {"fqns": []},
    "quantize.grouped_mm.mx": {"recipe_name": "mxfp8", "fqns": []},
    "parallelism": {
        # How context-parallel ranks exchange keys and values, and which parts of a sequence each has: one step.
        "context_parallel_rotate_method": "allgather",
        "context_parallel_load_balancer": "headtail",
        "expert_parallel_comm_backend": "standard",
        "pipeline_parallel_expert_parallel_overlap": True,
    },
    "activation_checkpoint": {
        "per_op_sac_force_recompute_mm_shapes_by_fqns": ["moe.router.gate"],
        "preserve_rng_state": True,  # nothing in a block is drawn
        "early_stop": False,
        "determinism_check": "default",
        "debug": False,
        # of the mode memory_budget (below)
        "memory_budget": 0.5,
        "visualize_memory_budget_pareto": False,
    },
    "checkpoint": {"enable_ft_dataloader_checkpoints": True},
}

_NO_EXPERTS = "the models of this package have no experts"
_ESTIMATE = "python -m torchtitan estimate, with the run's options, tells the memory that it needs"
_OWN_OPTIONS = "options cannot be added; experimental.custom_import registers models and datasets"
# Restricted: the value that changes nothing, upstream's default, and why others are refused or what to do instead.
_ONLY: Mapping[str, tuple[Any, str]] = {
    "job.custom_config_module": ("", _OWN_OPTIONS),
    "experimental.custom_args_module": ("", _OWN_OPTIONS),
    "comm.mode": ("default", _ESTIMATE),
    "memory_estimation.enabled": (False, _ESTIMATE),
    "memory_estimation.enable": (False, _ESTIMATE),
    "fault_tolerance.enable": (False, "TorchFT is not part of this package; --max_restarts restarts runs"),
    "compile.backend": ("inductor", "torch.compile's own backend is the one that is used"),
    "optimizer.early_step_in_backward": (
        False,
        "the optimizer steps after backward, because gradients are clipped by their global norm",
    ),
    "parallelism.enable_compiled_autograd": (
        False,
        "compiled autograd is not supported; training.compile compiles the blocks and the loss",
    ),
    "parallelism.expert_parallel_degree": (1, _NO_EXPERTS),
    "parallelism.expert_tensor_parallel_degree": (1, _NO_EXPERTS),
    "parallelism.pipeline_parallel_split_points": (
        [],
        "name the modules of each stage in parallelism.module_fqns_per_model_part",
    ),
    "parallelism.pipeline_parallel_schedule_csv": (
        None,
        "choose a schedule with parallelism.pipeline_parallel_schedule",
    ),
    "checkpoint.initial_load_in_hf_quantized": (
        False,
        "save the weights unquantised first, by from_pretrained and save_pretrained of transformers",
    ),
}


def _option(name: str, default: Any) -> Option:
    if default is None:
        return option_of(name, int | None if name.endswith("prefetch_factor") else str | None, default)
    return option_of(name, list[str] if isinstance(default, list) else type(default), default)


UPSTREAM_OPTIONS: Mapping[str, UpstreamOption] = {
    **{name: UpstreamOption(replace(get_options()[ours], name=name), ours) for name, ours in _RENAMED.items()},
    **{
        f"{section}.{field}": UpstreamOption(_option(f"{section}.{field}", default))
        for section, fields in _NO_EFFECT.items()
        for field, default in fields.items()
    },
    **{name: UpstreamOption(_option(name, value), only=True, instead=why) for name, (value, why) in _ONLY.items()},
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
    if not entry.only or value in (None, "", entry.option.default):
        return None
    default = entry.option.default
    supported = "nothing" if default in (None, "", []) else f"only {shown(default)}"
    return f"upstream's option, of which {supported} is supported here: {entry.instead}"


def is_worth_a_warning(name: str, value: object) -> bool:
    """Whether an accepted value says what is not done here: upstream's own defaults ask for nothing."""
    entry = UPSTREAM_OPTIONS[name]
    return not entry.only and value not in (None, "", entry.option.default)


def no_effect_warning(names: list[str]) -> str:
    """The one warning about all options of the table that a run gives."""
    return f"Options of upstream torchtitan that have no effect here: {', '.join(names)}"
