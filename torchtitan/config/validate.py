"""Every rule that an option alone cannot know: across sections, against the model's shape and the number of processes.

A rule is a generator of messages that name the options, their values and what would work. Nothing here changes the
configuration, looks at the machine (launch/preflight.py does) or imports torch. Who has a whole configuration calls
`validate_run` of protocols/train_spec.py, which knows the models.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from torchtitan.config.block_modes import SELECTIVE_MODES
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError, FusedLossWithPipelineError, LigerNotInstalledError, raise_all
from torchtitan.config.job_config import JobConfig
from torchtitan.config.mixture import parse_mixture
from torchtitan.config.pipeline_split import ONE_STAGE, TWO_STAGES, ZERO_BUBBLE, get_num_stages
from torchtitan.config.schema import either, meant_or_known
from torchtitan.config.sections import FLOAT8_MULTIPLE

_CHECKPOINT_STATES = ("optimizer", "lr_scheduler", "dataloader", "train_state")
_CONVERTERS = ("float8",)


class ModelShape(Protocol):
    """What the rules ask of a model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int


def validate(
    config: JobConfig,
    *,
    world_size: int,
    model: ModelShape | None,
    problems: Sequence[str],
    num_gpus: int | None,
    liger_installed: bool,
    local_world_size: int | None,
) -> None:
    """Raise ConfigError with every rule that the configuration breaks.

    model: None if it is not known, or not yet; problems: what is wrong with its name.
    num_gpus: GPUs of this machine; 0 means that the run is on CPU, None that it is not known.
    local_world_size: processes on this machine; None means all of them.
    The two errors that the fused loss documents come first, and alone.
    """
    _check_fused_loss(config, liger_installed)
    found = [
        *_about_devices(num_gpus, local_world_size or world_size),
        *_about_profiling(config, world_size),
        *problems,
        *_about_activation_checkpoint(config, num_gpus),
        *_about_tensor_parallel(config, num_gpus),
        *_about_converters(config),
        *_about_state_precision(config),
        *_about_checkpoint(config, world_size),
        *_about_length(config),
        *_about_pieces(config),
        *_about_data(config),
        *(_about_heads(config, model) if model else ()),
        *(_about_pipeline(config, model) if model else ()),
    ]
    try:
        found += _about_batch(config, ParallelDims.from_config(config.parallelism, world_size))
    except ConfigError as error:
        found.append(str(error))
    raise_all([ConfigError(problem) for problem in found])


def _check_fused_loss(config: JobConfig, liger_installed: bool) -> None:
    if not config.liger_kernel.enable_fused_linear_cross_entropy:
        return
    if config.liger_kernel.implementation != "native" and not liger_installed:
        raise LigerNotInstalledError
    if config.parallelism.pipeline_parallel_degree > 1:
        raise FusedLossWithPipelineError(config.parallelism.pipeline_parallel_degree)


def _about_devices(num_gpus: int | None, local_world_size: int) -> Iterator[str]:
    if num_gpus and local_world_size > num_gpus:
        yield (
            f"{local_world_size} processes on this machine need a GPU each, and it has {num_gpus};"
            f" start at most {num_gpus} (NGPU={num_gpus})"
        )


def _about_activation_checkpoint(config: JobConfig, num_gpus: int | None) -> Iterator[str]:
    activation_checkpoint, option = config.activation_checkpoint, config.activation_checkpoint.selective_ac_option
    if option not in SELECTIVE_MODES and not (option.isdecimal() and len(option) < 19 and int(option) > 0):
        yield f"{activation_checkpoint.selective_ac_option=!s} must be op, attention or a positive integer"
    if not activation_checkpoint.offload:
        return
    if num_gpus == 0:
        yield "activation_checkpoint.offload needs GPUs; leave it off on CPU"
    if config.parallelism.pipeline_parallel_degree > 1:
        yield (
            "activation_checkpoint.offload follows one microbatch at a time, and pipelines hold several; leave it off,"
            " or parallelism.pipeline_parallel_degree at 1"
        )
    keeps_much = activation_checkpoint.mode == "none" or (activation_checkpoint.mode == "selective" and option == "op")
    if keeps_much:
        yield (
            f"activation_checkpoint.offload moves what recomputed blocks keep, and {activation_checkpoint.mode=!s}"
            f"{f' with {option}' * (option == 'op')} keeps too much to be moved in time; use auto, full, or"
            " activation_checkpoint.selective_ac_option=attention"
        )


def _about_tensor_parallel(config: JobConfig, num_gpus: int | None) -> Iterator[str]:
    parallelism, liger_kernel = config.parallelism, config.liger_kernel
    if parallelism.tensor_parallel_degree == 1:
        return
    if liger_kernel.enable_fused_linear_cross_entropy and liger_kernel.implementation == "liger":
        yield (
            f"{liger_kernel.implementation=!s} needs the whole vocabulary on each rank, and"
            f" {parallelism.tensor_parallel_degree=} splits it; use implementation auto or native,"
            " the in-tree fused loss, or a degree of 1"
        )
    if parallelism.enable_async_tensor_parallel and not config.training.compile:
        yield "parallelism.enable_async_tensor_parallel needs the compiler; add --training.compile"
    if parallelism.enable_async_tensor_parallel and num_gpus == 0:
        yield "parallelism.enable_async_tensor_parallel needs GPUs; leave it off on CPU"


def _about_converters(config: JobConfig) -> Iterator[str]:
    for name in config.model.converters:
        if name not in _CONVERTERS:
            yield f"model.converters has {name!r}, which is unknown; {meant_or_known(name, _CONVERTERS)}"
    if "float8" not in config.model.converters:
        return
    float8, parallelism, training = config.float8, config.parallelism, config.training
    if float8.enable_fsdp_float8_all_gather and float8.recipe_name != "tensorwise":
        yield (
            f"float8.enable_fsdp_float8_all_gather does not work with {float8.recipe_name=!s}, because it"
            " gathers no scales of rows; leave it off, or use tensorwise"
        )
    piped = parallelism.pipeline_parallel_degree > 1
    sequences = parallelism.pipeline_parallel_microbatch_size if piped else training.local_batch_size
    num_tokens = sequences * training.seq_len // parallelism.context_parallel_degree
    pieces = training.feed_forward_pieces
    if num_tokens % FLOAT8_MULTIPLE or num_tokens // pieces % FLOAT8_MULTIPLE:
        yield (
            f"a microbatch of {num_tokens} tokens on each rank{f' in {pieces} pieces' * (pieces > 1)} is not a multiple"
            f" of {FLOAT8_MULTIPLE}, which the products of float8 need; use another training.seq_len than"
            f" {training.seq_len}{', or fewer training.feed_forward_pieces' * (pieces > 1)}"
        )


def _about_state_precision(config: JobConfig) -> Iterator[str]:
    optimizer, training = config.optimizer, config.training
    if training.dtype == "bfloat16" and training.mixed_precision_param != "bfloat16":
        yield (
            "training.dtype=bfloat16 keeps nothing that more precise products would use; leave"
            " training.mixed_precision_param at bfloat16"
        )
    if optimizer.state_precision == "float32":
        return
    given = f"{optimizer.state_precision=!s}"
    if (optimizer.name, optimizer.implementation) != ("AdamW", "fused"):
        yield f"{given} has one optimizer, the fused AdamW; leave optimizer.name and optimizer.implementation at those"
    if training.mixed_precision_param != "bfloat16":
        yield f"{given} keeps weights as bfloat16 with a correction; leave training.mixed_precision_param at bfloat16"
    if training.dtype != "float32":
        yield f"{given} and {training.dtype=!s} both say how weights are stored; use one of them"
    if training.enable_cpu_offload:
        yield f"{given} does not work with training.enable_cpu_offload; use one of them"
    if "float8" in config.model.converters and config.float8.enable_fsdp_float8_all_gather:
        yield f"{given} does not work with float8.enable_fsdp_float8_all_gather; use one of them"


def _about_profiling(config: JobConfig, world_size: int) -> Iterator[str]:
    if absent := [rank for rank in config.profiling.ranks if not 0 <= rank < world_size]:
        yield f"profiling.ranks names {absent}, and there are {world_size} ranks; use 0 to {world_size - 1}"


def _about_checkpoint(config: JobConfig, world_size: int) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        yield "checkpoint.last_save_in_hf saves weights only; set checkpoint.last_save_model_only=true as well"
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path is None:
        yield (
            "checkpoint.initial_load_in_hf says how to read checkpoint.initial_load_path, which is not set;"
            " name the folder there, or by model.hf_folder"
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        yield "checkpoint.initial_load_in_hf loads weights only; set checkpoint.initial_load_model_only=true as well"
    saving = {
        "create_seed_checkpoint": checkpoint.create_seed_checkpoint,
        "last_save_in_hf": checkpoint.last_save_in_hf,
    }
    loading = {f"load_step={checkpoint.load_step}": checkpoint.load_step != -1, "load_only": checkpoint.load_only}
    for option, is_set in (saving | loading).items():
        if is_set and not checkpoint.enable_checkpoint:
            yield f"checkpoint.{option} needs checkpoint.enable_checkpoint=true"
    for option, is_set in saving.items():
        if is_set and checkpoint.load_only:
            yield f"checkpoint.{option} saves, and checkpoint.load_only does not; use one of them"
    if checkpoint.create_seed_checkpoint and world_size != 1:
        yield f"checkpoint.create_seed_checkpoint runs on one process, not on {world_size}; start it with NGPU=1"
    for state in checkpoint.exclude_from_loading:
        if state not in _CHECKPOINT_STATES:
            hint = meant_or_known(state, _CHECKPOINT_STATES)
            yield f"checkpoint.exclude_from_loading has {state!r}, which is none; {hint}"


def _about_batch(config: JobConfig, dims: ParallelDims) -> Iterator[str]:
    training = config.training
    at_once = training.local_batch_size * dims.dp
    if training.global_batch_size != -1 and training.global_batch_size % at_once:
        yield (
            f"{training.global_batch_size=} is not a multiple of {at_once}, which is {training.local_batch_size=} on"
            f" each of {dims.dp} data-parallel ranks; use {_multiples_near(training.global_batch_size, at_once)}"
        )


def _about_data(config: JobConfig) -> Iterator[str]:
    if config.validation.prompts and not config.validation.enabled:
        yield "validation.prompts are continued at validations, and there are none; set validation.enabled"
    training = config.training
    try:
        parts = parse_mixture(training.datasets)
    except ConfigError as error:
        yield str(error)
        return
    if parts and training.dataset_path is not None:
        yield (
            f"training.datasets and {training.dataset_path=!s} both say what is read; give"
            " the path as an entry of the mixture, or leave the mixture out"
        )


def _about_length(config: JobConfig) -> Iterator[str]:
    parallelism = config.parallelism
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    # A context-parallel rank holds a chunk of the head and one of the tail; tensor parallelism splits what it holds.
    chunks = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enabled:
        lengths["validation.seq_len"] = config.validation.seq_len
    for name, seq_len in lengths.items():
        if seq_len % chunks:
            yield (
                f"{name}={seq_len} is not a multiple of {chunks}, which {parallelism.context_parallel_degree=} and"
                f" {parallelism.tensor_parallel_degree=} need; use {_multiples_near(seq_len, chunks)}"
            )


def _about_pieces(config: JobConfig) -> Iterator[str]:
    parallelism, pieces = config.parallelism, config.training.feed_forward_pieces
    length = config.training.seq_len // (parallelism.context_parallel_degree * parallelism.tensor_parallel_degree)
    if length % pieces:
        fits = either([size for size in _divisors(length) if size <= pieces][-3:])
        yield f"training.feed_forward_pieces={pieces} does not divide the {length} tokens of a rank; use {fits}"


def _about_heads(config: JobConfig, model: ModelShape) -> Iterator[str]:
    parallelism, title = config.parallelism, config.model.title
    tp, shared = parallelism.tensor_parallel_degree, math.gcd(model.n_heads, model.n_kv_heads)
    ffn_hidden_dim = getattr(model, "ffn_hidden_dim", 0)  # not every family has one
    given = f"{parallelism.tensor_parallel_degree=}"
    if shared % tp:
        yield (
            f"{given} does not divide n_heads={model.n_heads} and n_kv_heads={model.n_kv_heads} of {title};"
            f" use {either(_divisors(shared))}"
        )
    if ffn_hidden_dim % tp:
        fits = _divisors(math.gcd(shared, ffn_hidden_dim))
        yield f"{given} does not divide {ffn_hidden_dim=} of {title}; use {either(fits)}"
    if not _gives_all_ranks_words(model.vocab_size, tp):
        fits = [degree for degree in _divisors(shared) if _gives_all_ranks_words(model.vocab_size, degree)]
        yield f"{given} leaves a rank without words of the {model.vocab_size} of {title}; use {either(fits)}"


def _gives_all_ranks_words(vocab_size: int, tp: int) -> bool:
    """Each rank but the last has ceil(V / tp) rows."""
    return (tp - 1) * math.ceil(vocab_size / tp) < vocab_size


def _about_pipeline(config: JobConfig, model: ModelShape) -> Iterator[str]:
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        return
    if getattr(model, "tie_embeddings", False):  # a family outside this package need not know the word
        yield (
            f"{parallelism.pipeline_parallel_degree=} puts embedding and output on two ranks, and"
            f" {config.model.title} has one weight for both; use a degree of 1"
        )
    if parallelism.module_fqns_per_model_part is not None:
        yield from _about_stage_modules(parallelism.module_fqns_per_model_part, model.n_layers)
    yield from _about_stages(config, model.n_layers)
    yield from _about_microbatches(config)
    yield from _about_zero_bubble(config)


def _about_zero_bubble(config: JobConfig) -> Iterator[str]:
    parallelism, checkpointing = config.parallelism, config.activation_checkpoint
    if parallelism.pipeline_parallel_schedule not in ZERO_BUBBLE:
        return
    apart = f"{parallelism.pipeline_parallel_schedule=!s} computes the gradients of inputs and weights apart"
    others = "use 1F1B or Interleaved1F1B"
    if config.training.compile:
        yield f"{apart}, which compiled blocks cannot; leave training.compile off, or {others}"
    if "float8" in config.model.converters:
        yield f"{apart}, which float8 layers cannot; leave float8 off, or {others}"
    if parallelism.fsdp_reshard_after_forward == "always":
        yield (
            f"{apart}, and misses those of weights that are gathered anew between:"
            " parallelism.fsdp_reshard_after_forward=always does not work with it; use default or never"
        )
    if config.training.feed_forward_pieces > 1:
        yield f"{apart}, which blocks that run in pieces were not tried with; leave training.feed_forward_pieces at 1"
    if checkpointing.mode == "selective" and checkpointing.selective_ac_option in SELECTIVE_MODES:
        yield (
            f"{apart}, which blocks that keep some results allow only once; use activation_checkpoint.mode"
            " full or none, or a number as activation_checkpoint.selective_ac_option"
        )


def _about_stage_modules(parts: list[list[str]], n_layers: int) -> Iterator[str]:
    option = "parallelism.module_fqns_per_model_part"
    modules = ["tok_embeddings", *(f"layers.{i}" for i in range(n_layers)), "norm", "output"]
    named = [name for part in parts for name in part]
    if unknown := [name for name in named if name not in modules]:
        yield f"{option} names {unknown[0]!r}, which the model does not have; {meant_or_known(unknown[0], modules)}"
    elif not all(parts):
        yield f"{option} has a part without modules; give each part some, or leave the part out"
    elif missing := [name for name in modules if name not in named]:
        yield f"{option} leaves out {', '.join(missing)}; each module belongs to one part"
    elif [name for part in parts for name in sorted(part, key=modules.index)] != modules:
        yield f"{option} must name each module once, the parts in the model's order: {', '.join(modules)}"


def _about_stages(config: JobConfig, n_layers: int) -> Iterator[str]:
    parallelism = config.parallelism
    pp, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    num_stages = get_num_stages(parallelism, n_layers)
    if parallelism.module_fqns_per_model_part is not None:
        source = "parallelism.module_fqns_per_model_part"
    elif parallelism.pipeline_parallel_layers_per_stage is not None:
        source = f"{parallelism.pipeline_parallel_layers_per_stage=}"
    else:
        source = f"{parallelism.pipeline_parallel_degree=} with {schedule}"

    if schedule in ONE_STAGE:
        fits, wanted = num_stages == pp, f"{pp}"
    elif schedule in TWO_STAGES:
        fits, wanted = num_stages == 2 * pp, f"{2 * pp}"
    else:
        fits, wanted = num_stages % pp == 0 and num_stages > pp, f"{2 * pp}, {3 * pp}, {4 * pp}, ..."
    if not fits:
        given = f"{parallelism.pipeline_parallel_schedule=!s}"
        yield f"{source} makes {num_stages} stages, and {given} on {pp} ranks takes {wanted}"

    share, rest = divmod(n_layers + first + last, max(1, num_stages))
    if parallelism.module_fqns_per_model_part is None and (share == 0 or share + bool(rest) < first or share < last):
        yield (
            f"{source} makes {num_stages} stages, and {config.model.title} has {n_layers} layers for them, beside"
            f" {parallelism.pipeline_parallel_first_stage_less_layers=} and"
            f" {parallelism.pipeline_parallel_last_stage_less_layers=}; use fewer stages"
            f"{f', or count at most {share} for embedding and output' if share else ''}"
        )


def _about_microbatches(config: JobConfig) -> Iterator[str]:
    parallelism, training = config.parallelism, config.training
    pp, schedule = parallelism.pipeline_parallel_degree, f"{parallelism.pipeline_parallel_schedule=!s}"
    num_microbatches, rest = divmod(training.local_batch_size, parallelism.pipeline_parallel_microbatch_size)
    microbatch = f"{parallelism.pipeline_parallel_microbatch_size=}"
    if rest:
        fits = either(_divisors(training.local_batch_size))
        yield f"{microbatch} does not divide {training.local_batch_size=}; use {fits}"
        return
    made = f"training.local_batch_size makes {num_microbatches} with {microbatch}"
    match parallelism.pipeline_parallel_schedule:
        case "1F1B" if num_microbatches < pp:
            yield f"{schedule} needs at least {pp} microbatches, one a stage; {made}; GPipe takes fewer"
        case "Interleaved1F1B" | "InterleavedZeroBubble" if num_microbatches % max(1, num_microbatches // pp):
            fits = _multiples_near(num_microbatches, pp)
            yield f"{schedule} takes microbatches in equal rounds of {pp} or more; {made}; use {fits}"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _multiples_near(value: int, of: int) -> str:
    below = value // of * of
    return either([multiple for multiple in (below, below + of) if multiple])
