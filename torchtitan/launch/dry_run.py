"""A run up to its first step, told and not done: `torchtitan --dry_run`, on any machine and for any number of ranks.

Nothing is started and no GPU is needed. What is missing on this machine is told too, and does not hide the rest.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod

from torchtitan.components.dataloader import build_dataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.loss.build import build_token_sums, describe_loss
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.block_modes import ASSUMED_GIB, describe_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.pipeline_split import get_stage_modules, get_stages_of_rank
from torchtitan.distributed.mesh import AXES
from torchtitan.launch.preflight import find_what_is_missing
from torchtitan.memory.estimate import GIB, MemoryModel, describe
from torchtitan.memory.plan import choose_block_modes
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.train_spec import find_family, get_run_args


def show(config: JobConfig, *, world_size: int, device_type: str) -> int:
    """Print what the run will be; the exit status, 1 if something is missing. The options have been checked."""
    maybe_import_custom(config.experimental.custom_import)
    dims = ParallelDims.from_config(config.parallelism, world_size)
    missing = find_what_is_missing(config)
    args = get_run_args(config.model, max_seq_len=config.max_seq_len)
    print(f"Model: {config.model.title}, {args.num_params():,} parameters")
    print(*layout(dims), sep="\n")
    if dims.pp > 1:
        print(*stages(config, dims, args.n_layers), sep="\n")
    print(batches(config, dims))
    loss = describe_loss(
        config.liger_kernel,
        device_type=device_type,
        tensor_parallel=dims.tp > 1,
        sums=build_token_sums(config.training, config.metrics),
    )
    print("The model has a loss of its own" if find_family(config.model).load().build_loss else loss)
    print(*memory(config, world_size), sep="\n", flush=True)
    try:
        if not missing:
            print(*data(config, dims), sep="\n")
    except ConfigError as error:  # found as the data was read
        missing.append(error)
    for problem in missing:
        print(f"Missing here: {problem}")
    print("Nothing was started." if missing else "All is there for the first step. Nothing was started.")
    return 1 if missing else 0


def layout(dims: ParallelDims) -> Iterator[str]:
    """Where every rank stands: those that are neighbours on the innermost axis in one line."""
    degrees = {axis: getattr(dims, axis) for axis in AXES if getattr(dims, axis) > 1}
    if not degrees:
        yield "Layout: one process"
        return
    yield f"Layout: {dims.world_size} ranks, " + " x ".join(f"{axis} {size}" for axis, size in degrees.items())
    *outer, (axis, size) = degrees.items()
    for first in range(0, dims.world_size, size):
        rest, places = first // size, [f"{axis} 0 to {size - 1}"]
        for name, degree in reversed(outer):
            rest, place = divmod(rest, degree)
            places.insert(0, f"{name} {place}")
        yield f"  ranks {first:>4} to {first + size - 1:>4}: " + ", ".join(places)


def stages(config: JobConfig, dims: ParallelDims, n_layers: int) -> Iterator[str]:
    """What each pipeline rank holds."""
    parts = get_stage_modules(config.parallelism, n_layers)
    for rank in range(dims.pp):
        mine = get_stages_of_rank(config.parallelism.pipeline_parallel_schedule, rank, dims.pp, len(parts))
        yield f"  pp {rank} holds " + "; ".join(_shorten(parts[stage]) for stage in mine)


def batches(config: JobConfig, dims: ParallelDims) -> str:
    training = config.training
    whole = dims.get_global_batch_size(training)
    return (
        f"A step: {whole} sequences of {training.seq_len} tokens, {whole * training.seq_len:,} in all;"
        f" {dims.dp} rank(s) read {training.local_batch_size} at a time, {dims.get_num_microbatches(training)} time(s)"
    )


def memory(config: JobConfig, world_size: int) -> Iterator[str]:
    model = MemoryModel(config, world_size=world_size)
    block_modes = choose_block_modes(config, model, config.activation_checkpoint.memory_share * ASSUMED_GIB * GIB)
    yield f"{describe(model.estimate(block_modes))}; {describe_block_modes(block_modes)}"
    if model.dims.pp > 1:
        peaks = (model.estimate_rank(rank, block_modes).peak / GIB for rank in range(model.dims.pp))
        yield "  by pipeline rank: " + ", ".join(f"{peak:.1f}" for peak in peaks)


def data(config: JobConfig, dims: ParallelDims) -> Iterator[str]:
    """The first batch of the first rank."""
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    yield f"Tokenizer: {tokenizer.vocab_size} ids, from {config.model.tokenizer_path}"
    loader = build_dataloader(
        training=config.training,
        tokenizer=tokenizer,
        dp_rank=0,
        dp_world_size=dims.dp,
        batch_size=config.training.local_batch_size,
        global_batch_size=dims.get_global_batch_size(config.training),
        seq_len=config.training.seq_len,
        seed=config.training.seed or 0,
    )
    try:
        tokens, labels, *_ = next(iter(loader))
    finally:
        loader.close()
    names = config.training.datasets or [config.training.dataset_path or config.training.dataset]
    valid = int((labels != IGNORE_INDEX).sum())
    said = f"the first batch of rank 0 has {valid:,} tokens to learn from in {prod(tokens.shape):,}"
    yield f"Data: {', '.join(names)}; {said}:"
    yield f"  {tokenizer.decode(tokens[0, :24].tolist())!r}"


def _shorten(modules: Sequence[str]) -> str:
    """tok_embeddings, layers 0 to 19"""
    parts: list[str] = []
    for is_layer, names in groupby(modules, key=lambda name: name.startswith("layers.")):
        group = list(names)
        numbers = [name.removeprefix("layers.") for name in group]
        parts += [f"layers {numbers[0]} to {numbers[-1]}"] if is_layer else group
    return ", ".join(parts) or "nothing"
