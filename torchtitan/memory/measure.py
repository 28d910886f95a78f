"""What one block and the loss of a run keep and need, found by running them on the meta device.

The model is divided, checkpointed and cast by the run's own parallelize_fn, with a single block, but for two things
that are left to others: FSDP, which is arithmetic (estimate.py), and compilation, whose effect on memory is modelled
(trace.py). The fused losses, whose memory depends on the device, are arithmetic too.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.components.loss import CrossEntropyLoss, EvalLoss, TokenSums
from torchtitan.components.loss.build import build_token_sums, why_in_tree
from torchtitan.components.loss.chunking import liger_chunk_mem_const, liger_chunk_rows, plan_chunks, rows_in_budget
from torchtitan.components.optimizer import get_weight_dtype
from torchtitan.config.block_modes import BLOCK_MODES, BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.job_config import JobConfig
from torchtitan.config.sections import FLOAT8_MULTIPLE, Float8
from torchtitan.distributed.activation_checkpoint import set_block_modes
from torchtitan.distributed.mesh import Mesh, build_mesh
from torchtitan.distributed.utils import local_tensor
from torchtitan.memory.trace import Float8Linear, MemoryTrace, with_gpu_kernels
from torchtitan.protocols.model import Decoder, TiedOutputHead
from torchtitan.protocols.sequences import Documents, Sequences
from torchtitan.protocols.train_spec import ModelArgs, find_family, get_run_args
from torchtitan.tools.logging import logger


@dataclass(frozen=True)
class Use:
    """Bytes that a piece of code takes: kept from forward to backward, and at the worst moment of each."""

    kept: int
    forward: int
    backward: int


class Unit(NamedTuple):
    """Elements of the parameters of one FSDP unit, as tensor parallelism leaves them to a rank."""

    numel: int = 0
    shard: int = 0
    """Of each rank of FSDP, which cuts dim 0 and pads the last shard."""
    largest: int = 0
    """Of the largest parameter."""


@dataclass(frozen=True)
class Measured:
    """Of a rank that has all modules; sizes of activations are those of one microbatch."""

    n_layers: int
    units: dict[str, Unit]
    """tok_embeddings, block, norm, output."""
    is_tied: bool
    """The output has no parameter, and uses the embedding's."""
    largest_parameter: int
    """Elements of the largest parameter, undivided."""
    buffers: int
    boundary: int
    """The hidden states between two blocks."""
    blocks: dict[BlockMode, Use]
    """What is kept includes the block's output, which the next one needs, and not its input."""
    loss: Use
    """With the head's product and both gradients; without the hidden states that it is given."""
    loss_gap: int
    """Where eager cross entropy's logits were: in backward no tensor is as small."""
    validation: int


def measure(config: JobConfig, dims: ParallelDims, mesh: Mesh | None) -> Measured:
    """Run one block in each mode and the loss; `mesh` is that of the run, if it is running."""
    with nullcontext(mesh) if mesh is not None else _mesh_of_shapes(dims) as mesh:
        args = get_run_args(config.model, max_seq_len=config.max_seq_len)
        model = _build(config, dims, mesh, args)
        whole = dims.pp == 1
        sequences = config.training.local_batch_size if whole else config.parallelism.pipeline_parallel_microbatch_size
        tokens_shape = (sequences, config.training.seq_len // dims.cp)
        hidden, block_args = _run(model, tokens_shape, config, dims)
        blocks: dict[BlockMode, Use] = {}
        for mode in BLOCK_MODES:
            if mode == "gathered":
                continue  # as "none": the weights are FSDP's
            set_block_modes(model, [mode])
            model.zero_grad()  # the gradients count as made
            x = block_args[0].detach().requires_grad_()
            block = partial(model.layers["0"], x, *block_args[1:])
            blocks[mode] = _trace(block, is_compiled=config.training.compile)
        blocks["gathered"] = blocks["none"]
        return Measured(
            n_layers=args.n_layers,
            units={
                "tok_embeddings": _unit(model.tok_embeddings, dims.fsdp),
                "block": _unit(model.layers["0"], dims.fsdp),
                "norm": _unit(model.norm, dims.fsdp),
                "output": _unit(model.output, dims.fsdp),
            },
            is_tied=isinstance(model.output, TiedOutputHead),
            largest_parameter=max(parameter.numel() for parameter in model.parameters()),
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
            boundary=local_tensor(hidden).nbytes,
            blocks=blocks,
            loss=_measure_loss(config, dims, model, hidden, tokens_shape),
            loss_gap=_get_loss_gap(config, dims, tokens_shape, args.vocab_size),
            validation=_trace_validation(config, dims, model) if config.validation.enabled else 0,
        )


def is_one_process(config: JobConfig, dims: ParallelDims) -> bool:
    """Whether the run has no FSDP (distributed/mixed_precision.py)."""
    return dims.world_size == 1 and not config.training.enable_cpu_offload


def casts_weights(config: JobConfig, dims: ParallelDims) -> bool:
    """Whether layers cast float32 weights where they use them, and autograd their gradients back."""
    return is_one_process(config, dims) and get_weight_dtype(config.training, config.optimizer) == torch.float32


@contextmanager
def _mesh_of_shapes(dims: ParallelDims) -> Iterator[Mesh]:
    """A mesh of the tensor- and context-parallel ranks without the other ranks: nothing can be communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shapes_only = ParallelDims(cp=dims.cp, tp=dims.tp)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shapes_only.world_size)
    try:
        yield build_mesh(shapes_only, "cpu")
    finally:
        dist.destroy_process_group()


class _NothingToShard(ParallelDims):
    """Has parallelize_fn leave FSDP out."""

    @property
    def world_size(self) -> int:
        return 1


def _build(config: JobConfig, dims: ParallelDims, mesh: Mesh, args: ModelArgs) -> Decoder:
    """The model with one block, on the meta device, as this run divides it."""
    code = find_family(config.model).load()
    with torch.device("meta"):
        model = code.model_cls(args)
    for name in list(model.layers)[1:]:
        del model.layers[name]
    if not casts_weights(config, dims):
        model.to(get_param_dtype(config))  # as FSDP gathers the weights
        model.init_buffers("meta")  # these it does not cast
    block = model.layers["0"]
    if "float8" in config.model.converters and dims.tp == 1:  # split layers are counted as they are without float8
        _apply_float8(block, config.float8)
    block.forward = with_gpu_kernels(block.forward)  # type: ignore[method-assign]
    logger.disabled = True  # it would tell how the model is divided
    try:
        code.parallelize_fn(
            model,
            mesh=mesh,
            parallel_dims=_NothingToShard(cp=dims.cp, tp=dims.tp),
            parallelism=replace(config.parallelism, enable_async_tensor_parallel=False),
            training=replace(config.training, compile=False, enable_cpu_offload=False),
            block_modes=["none"],
            loss_parallel=not config.parallelism.disable_loss_parallel,
        )
    finally:
        logger.disabled = False
    return model


def _apply_float8(block: nn.Module, config: Float8) -> None:
    """As distributed/float8.py chooses the layers, without the package that it needs."""
    for name, module in block.named_modules(prefix="layers.0"):
        fits = type(module) is nn.Linear and not any(size % FLOAT8_MULTIPLE for size in module.weight.shape)
        if fits and not any(text in name for text in config.filter_fqns):
            module.__class__ = Float8Linear


def get_param_dtype(config: JobConfig) -> torch.dtype:
    return getattr(torch, config.training.mixed_precision_param)


def _run(
    model: Decoder, tokens_shape: tuple[int, int], config: JobConfig, dims: ParallelDims
) -> tuple[Tensor, tuple[Any, ...]]:
    """The final hidden states of a microbatch, and the arguments that the block was called with."""
    tokens, sequences = torch.empty(tokens_shape, dtype=torch.int64, device="meta"), None
    if config.training.document_mask:
        bounds, longest = tokens.new_empty(len(tokens), 2, dtype=torch.int32), tokens.new_empty(len(tokens), 1, 0)
        sequences = Sequences(tokens, Documents(bounds, longest))
    elif dims.cp > 1:
        sequences = Sequences(tokens)
    calls: list[tuple[Any, ...]] = []
    hook = model.layers["0"].register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        hidden = model(tokens, return_hidden_states=True, sequences=sequences)
    hook.remove()
    return hidden, calls[0]


def _trace(forward: Callable[[], Tensor], *, is_compiled: bool) -> Use:
    trace = MemoryTrace()
    with trace:
        y = forward()
    forward_ends = trace.now
    grad = torch.empty_like(y)  # not counted: in backward y, which by then is free, stands for it
    with trace:
        torch.autograd.backward((y,), (grad,))
    return Use(
        kept=trace.live(forward_ends, compiled=is_compiled),
        forward=trace.peak(end=forward_ends, compiled=is_compiled),
        backward=trace.peak(start=forward_ends, compiled=is_compiled),
    )


def _measure_loss(
    config: JobConfig, dims: ParallelDims, model: Decoder, hidden: Tensor, tokens_shape: tuple[int, int]
) -> Use:
    assert model.output is not None
    if config.liger_kernel.enable_fused_linear_cross_entropy:
        return _get_fused_loss_use(
            config, dims, local_tensor(model.output.weight).shape, num_tokens=math.prod(tokens_shape)
        )
    labels = torch.empty(tokens_shape, dtype=torch.int64, device="meta")
    loss = CrossEntropyLoss(sums=TokenSums(z_loss=config.training.z_loss))
    scaled = partial(loss, hidden.detach().requires_grad_(), model.output, labels, torch.empty((), device="meta"))
    return _trace(scaled, is_compiled=config.training.compile)


def _get_fused_loss_use(config: JobConfig, dims: ParallelDims, weight_shape: torch.Size, *, num_tokens: int) -> Use:
    """Both fused losses compute the gradients in the forward pass, and keep nothing else."""
    options = config.liger_kernel
    itemsize = get_param_dtype(config).itemsize
    rows, dim = weight_shape
    budget = options.logits_memory_budget_mib << 20
    sums = build_token_sums(config.training, config.metrics)
    is_in_tree = why_in_tree(options.implementation, device_type="cuda", tensor_parallel=dims.tp > 1, sums=sums)
    if is_in_tree:
        chunks = plan_chunks(
            num_tokens, vocab_rows=rows, bytes_per_logit=itemsize, budget_bytes=budget, is_sharded=dims.tp > 1
        )
        logits = chunks.num_buffers * chunks.rows * rows * itemsize
    else:
        most = rows_in_budget(budget, vocab_rows=rows, bytes_per_logit=itemsize)
        value = liger_chunk_mem_const(num_tokens=num_tokens, dim=dim, vocab_size=rows, max_rows=most)
        logits = liger_chunk_rows(num_tokens, dim=dim, vocab_size=rows, chunk_mem_const=value) * rows * itemsize
    hidden = num_tokens * dim * itemsize
    gathered_hidden = hidden if dims.tp > 1 else 0
    # where labels are ignored, the other tokens' rows are copied together, and their gradient back apart
    copied_hidden = hidden if config.training.document_mask and config.training.boundary_labels == "ignore" else 0
    d_weight = rows * dim * itemsize
    float_d_weight = rows * dim * 4
    gradient = logits + d_weight
    if options.weight_grad_accum_dtype == "float32" and itemsize != 4:
        # cast at the end; the in-tree loss has freed the logits by then
        gradient = float_d_weight + (max(logits, d_weight) if is_in_tree else gradient)
    # one process casts the weight for the loss, and its gradient back
    has_cast = casts_weights(config, dims) and itemsize != 4
    return Use(
        kept=d_weight + hidden,
        forward=gradient + hidden + gathered_hidden + copied_hidden + (d_weight if has_cast else 0),
        backward=d_weight + hidden + max(copied_hidden, float_d_weight if has_cast else 0),
    )


def _get_loss_gap(config: JobConfig, dims: ParallelDims, tokens_shape: tuple[int, int], vocab_size: int) -> int:
    if config.training.compile or config.liger_kernel.enable_fused_linear_cross_entropy:
        return 0
    itemsize = get_param_dtype(config).itemsize
    if itemsize == torch.float32.itemsize:
        return 0  # the gradients are of the same size
    return math.prod(tokens_shape) * -(-vocab_size // dims.tp) * itemsize


def _trace_validation(config: JobConfig, dims: ParallelDims, model: Decoder) -> int:
    """The standard path without gradients: a block, then the logits, which are made of some tokens at a time."""
    assert model.output is not None
    tokens_shape = (config.validation.local_batch_size, config.validation.seq_len // dims.cp)
    eval_loss = EvalLoss(budget_bytes=config.liger_kernel.logits_memory_budget_mib << 20)
    forward, loss = MemoryTrace(), MemoryTrace()
    with forward:
        hidden, _ = _run(model, tokens_shape, config, dims)
    with torch.no_grad(), loss:
        eval_loss(hidden, model.output, torch.empty(tokens_shape, dtype=torch.int64, device="meta"))
    # compiled, the loss takes less, within the budget as well
    return max(forward.peak(compiled=config.training.compile), loss.peak() + local_tensor(hidden).nbytes)


def _unit(module: nn.Module | None, num_ranks: int) -> Unit:
    parameters = module.parameters() if module is not None else ()
    shapes = [local_tensor(parameter).shape for parameter in parameters]
    sizes = [shape.numel() for shape in shapes]
    shard = sum(-(-shape[0] // num_ranks) * math.prod(shape[1:]) for shape in shapes)
    return Unit(sum(sizes), shard, max(sizes, default=0))
