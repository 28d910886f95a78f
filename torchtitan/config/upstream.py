"""Options that upstream torchtitan (mid-2025) has and this package does not.

Upstream's TOML files are read unedited. An option of this table that leaves the training as it is is accepted, and
named in one warning unless it has upstream's default; a value that asks for something else is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan.config.schema import Option, option_of, shown


@dataclass(frozen=True)
class UpstreamOption:
    """`harmless` holds the values that change nothing here, upstream's default and its equals; None means that every
    value does."""

    option: Option
    harmless: tuple[Any, ...] | None
    instead: str  # why other values are refused, or what to do instead


def _no_effect(name: str, annotation: Any, default: Any) -> UpstreamOption:
    return UpstreamOption(option_of(name, annotation, default), None, "")


def _only(name: str, annotation: Any, harmless: tuple[Any, ...], instead: str) -> UpstreamOption:
    return UpstreamOption(option_of(name, annotation, harmless[0]), harmless, instead)


_TEXTS = list[str]
_TABLE = (
    _no_effect("job.use_for_integration_test", bool, False),
    _no_effect("model.print_after_conversion", bool, False),
    _only(
        "optimizer.early_step_in_backward",
        bool,
        (False,),
        "the optimizer steps after backward, because gradients are clipped by their global norm",
    ),
    _only(
        "parallelism.enable_compiled_autograd",
        bool,
        (False,),
        "compiled autograd is not supported; training.compile compiles the blocks and the loss",
    ),
    _only(
        "parallelism.context_parallel_rotate_method",
        Literal["allgather", "alltoall"],
        ("allgather",),
        "each rank gathers the keys and values of the whole sequence, and passes none around a ring",
    ),
    _only("parallelism.expert_parallel_degree", int, (1,), "the models of this package have no experts"),
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
    # mx configures a converter that is not here, and moe_fqns_prototype layers that the models lack.
    _no_effect("float8.moe_fqns_prototype", _TEXTS, []),
    _no_effect("mx.mxfp8_dim1_cast_kernel_choice", Literal["triton", "cuda", "torch"], "triton"),
    _no_effect("mx.recipe_name", str, "mxfp8_cublas"),
    _no_effect("mx.filter_fqns", _TEXTS, ["output"]),
    _no_effect("mx.moe_fqns_prototype", _TEXTS, []),
    _only(
        "memory_estimation.enabled",
        bool,
        (False,),
        "a run is not simulated on fake tensors",
    ),
    _no_effect("memory_estimation.disable_fake_mode", bool, False),
    _only("fault_tolerance.enable", bool, (False,), "TorchFT is not part of this package"),
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
    _only(
        "experimental.custom_args_module",
        str,
        ("",),
        "options cannot be added; experimental.custom_import registers models and datasets",
    ),
)
UPSTREAM_OPTIONS: Mapping[str, UpstreamOption] = {entry.option.name: entry for entry in _TABLE}


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
