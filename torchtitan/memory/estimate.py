"""How much memory a run needs on a GPU, before it starts: by part and by moment, without allocating it.

What a block and the loss take is measured on the meta device (measure.py). The rest is arithmetic on the shapes
of the parameters: the shards, a unit's gathered weights, and its gradient on the way to the shard, as FSDP2 holds them.
From both follow the *moments* of a step, of which one is the peak.

FSDP2 gathers weights and reduces gradients on streams of their own, and torch's allocator keeps memory apart by stream:
what one stream has freed another does not get, unless the GPU is full. So each stream reserves what its own worst
moment takes. The sum is what the trainer logs as `memory`, and what `peak` means here; a run whose peak is a little
above the GPU's memory may still work, more slowly.

A *unit* is what FSDP gathers as a whole: the embedding, a block, the norm, the output.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torchtitan.components.compact_optimizer import MAX_GROUP
from torchtitan.components.optimizer import get_weight_dtype
from torchtitan.config.block_modes import OFFLOADED_MODES, BlockMode, get_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.job_config import JobConfig
from torchtitan.config.pipeline_split import ONE_STAGE, get_stage_modules, get_stages_of_rank
from torchtitan.distributed.fsdp import should_reshard_after_forward
from torchtitan.distributed.mesh import Mesh
from torchtitan.memory.measure import Measured, Unit, casts_weights, get_param_dtype, is_one_process, measure

GIB = 1 << 30

# Assumptions, beside those of trace.py. scripts/benchmark_train.py and docs/performance.md check their sum.

FLOAT32 = 4
"""Bytes of a gradient while it is reduced, and of a weight while it is drawn."""

NUM_ADAM_MOMENTS = 2

COMPACT_STATES = 3 + 2 * FLOAT32 / MAX_GROUP
"""Bytes for each parameter of optimizer.state_precision "compact", beside its weight: a correction, two moments and
their groups' scales.
"""

NUM_FOREACH_COPIES = 1
"""Copies of all parameters that the foreach implementation of Adam makes during its step; fused makes none."""

NUM_FOR_LOOP_COPIES = 2
"""Copies of one parameter at a time that the for-loop implementation makes."""

LIBRARY_WORKSPACES = 2 * (32 << 20)
"""cuBLAS takes 32 MiB from the allocator on Hopper, for the forward thread and for autograd's."""

FRAGMENTATION = 0.02
"""Share of the main stream's memory that lies in gaps too small to use; with expandable segments it is small."""

Part = Literal["weights", "gradients", "optimizer", "activations", "loss"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer", "activations", "loss")


@dataclass(frozen=True)
class Moment:
    """What is in memory at one moment, in bytes."""

    name: str
    main: Counter[Part]
    """On the stream of the computation."""
    gathering: int = 0
    """Weights, on the stream that gathers them."""
    reducing: int = 0
    """Gradients, on the stream that reduces them."""
    gap: int = 0
    """On the main stream between tensors of the loss, too few for any of its others."""

    @property
    def parts(self) -> Counter[Part]:
        """All streams'."""
        return self.main + Counter({"weights": self.gathering, "gradients": self.reducing})

    @property
    def total(self) -> int:
        return self.parts.total()


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one rank."""

    moments: list[Moment]
    host: int
    """Bytes in the machine's memory: with enable_cpu_offload, and of activations with activation_checkpoint.offload."""
    pp_rank: int | None = None
    """Of a pipeline."""

    @property
    def worst_moment(self) -> Moment:
        """When most is in use at once."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def parts(self) -> dict[Part, int]:
        """The peak, by part."""
        main = max((moment.main + Counter({"loss": moment.gap}) for moment in self.moments), key=Counter.total)
        parts = {part: round(main[part] * (1 + FRAGMENTATION)) for part in PARTS}
        parts["weights"] += max(moment.gathering for moment in self.moments)
        parts["gradients"] += max(moment.reducing for moment in self.moments)
        return parts

    @property
    def peak(self) -> int:
        """Bytes that the allocator reserves."""
        return sum(self.parts.values())


class MemoryModel:
    """The memory of a run under any recomputation: measured once, then arithmetic.

    The configuration is one that validate() accepts. mesh: that of the run, if it is running; nothing is communicated.
    Without one no process group may exist.
    """

    def __init__(self, config: JobConfig, *, world_size: int, mesh: Mesh | None = None) -> None:
        self._config = config
        self.dims = ParallelDims.from_config(config.parallelism, world_size)
        self._measured = measure(config, self.dims, mesh)
        self.n_layers = self._measured.n_layers

    def estimate(self, block_modes: Sequence[BlockMode]) -> MemoryEstimate:
        """Of the pipeline rank that needs the most."""
        return max((self.estimate_rank(rank, block_modes) for rank in range(self.dims.pp)), key=lambda e: e.peak)

    def estimate_rank(self, pp_rank: int, block_modes: Sequence[BlockMode]) -> MemoryEstimate:
        return _Rank(self._config, self.dims, self._measured, pp_rank, block_modes).estimate()

    def get_blocks(self, pp_rank: int) -> list[int]:
        """The numbers of a pipeline rank's blocks."""
        return _get_blocks(_get_stages(self._config, self.dims, self.n_layers, pp_rank))


def estimate_memory(
    config: JobConfig, *, world_size: int, mesh: Mesh | None = None, block_modes: Sequence[BlockMode] | None = None
) -> MemoryEstimate:
    """As MemoryModel has it; without block_modes as the options have them, where "auto" is the leanest."""
    model = MemoryModel(config, world_size=world_size, mesh=mesh)
    return model.estimate(block_modes or get_block_modes(config.activation_checkpoint, model.n_layers))


def describe(estimate: MemoryEstimate, *, capacity: int | None = None) -> str:
    """One line for the log; given the device's memory, it also tells if that will not do."""
    parts = ", ".join(f"{part} {nbytes / GIB:.1f}" for part, nbytes in estimate.parts.items())
    line = f"Estimated peak memory per device: {estimate.peak / GIB:.1f} GiB ({parts})"
    if capacity is not None and estimate.peak > capacity:
        line += f", of {capacity / GIB:.1f} GiB that it has"
    if estimate.host:
        line += f"; and {estimate.host / GIB:.1f} GiB of the machine's memory"
    return line


class _Rank:
    """The moments of one rank's step."""

    def __init__(
        self,
        config: JobConfig,
        dims: ParallelDims,
        measured: Measured,
        pp_rank: int,
        block_modes: Sequence[BlockMode],
    ) -> None:
        self.config, self.dims, self.measured, self.pp_rank = config, dims, measured, pp_rank
        self.param_bytes = get_param_dtype(config).itemsize
        self.has_fsdp = not is_one_process(config, dims)
        self.is_offloaded = config.training.enable_cpu_offload
        stages = _get_stages(config, dims, measured.n_layers, pp_rank)
        names = [name for stage in stages for name in stage]
        blocks = _get_blocks(stages)
        self.modes = [block_modes[number] for number in blocks]
        self.block_uses = [measured.blocks[mode] for mode in self.modes]
        self.moved = [self._get_moved(mode) for mode in self.modes[:-1]]
        no_unit = Unit()
        self.embedding, self.norm, self.output = (
            measured.units[name] if name in names else no_unit for name in ("tok_embeddings", "norm", "output")
        )
        self.block = measured.units["block"]
        self.has_output = "output" in names
        self.tied = self.embedding if measured.is_tied else no_unit
        self.head = self.tied if measured.is_tied else self.output  # whose gradient comes first
        self.units = [self.embedding, *[self.block] * len(self.block_uses), self.norm, self.output]
        self.weight_bytes = get_weight_dtype(config.training, config.optimizer).itemsize
        is_compact = config.optimizer.state_precision == "compact"
        states = COMPACT_STATES if is_compact else NUM_ADAM_MOMENTS * self.weight_bytes
        num_elements = sum(unit.shard for unit in self.units)
        self.all_shards = self.weight_bytes * num_elements
        self.states = round(states * num_elements)
        # of each kind of block the last, which has the most before it, and the first, behind whose backward most
        # gradients are there
        by_number = list(enumerate(self.modes))
        self.last_blocks = sorted({mode: i for i, mode in by_number}.values())
        self.first_blocks = sorted({mode: i for i, mode in reversed(by_number)}.values())
        self.other_microbatches = self._get_other_microbatches(len(stages))

    def estimate(self) -> MemoryEstimate:
        host = self.is_offloaded * (2 * self.all_shards + self.states) + sum(self.moved)
        moments = [
            self._moment("start", weights=self.measured.largest_parameter * FLOAT32, has_optimizer=False),
            *self._get_forward_moments(),
            *self._get_backward_moments(),
            self._moment("optimizer", reduced=self._reduced(self.units), optimizer=self._optimizer_copies),
        ]
        if self.config.validation.enabled and self.has_output:
            gathered, loss = self._gathered([self.norm, self.head]), self.measured.validation
            moments.append(self._moment("validation", reduced=self._reduced(self.units), weights=gathered, loss=loss))
        return MemoryEstimate(moments, host, self.pp_rank if self.dims.pp > 1 else None)

    def _get_other_microbatches(self, num_stages: int) -> float:
        """Pipeline microbatches whose activations wait for their backward while one is worked on."""
        parallelism, pp = self.config.parallelism, self.dims.pp
        if pp == 1:
            return 0
        num_microbatches = self.config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
        schedule = parallelism.pipeline_parallel_schedule
        if schedule == "GPipe":
            passes = num_microbatches
        elif schedule in ONE_STAGE:
            passes = pp - self.pp_rank
        elif schedule == "ZBVZeroBubble":
            passes = 2 * pp
        else:  # interleaved: the warm-up, and one more
            passes = (num_stages - 1) * pp + 2 * (pp - self.pp_rank - 1) + 1
        return max(0, min(passes, num_microbatches * num_stages) / num_stages - 1)

    def _get_forward_moments(self) -> Iterator[Moment]:
        gathering = self._gathering(self.block) + max(self._gathering(self.block), self._gathering(self.embedding))
        for i in self.last_blocks:
            yield self._moment(
                f"forward of block {i + 1}",
                reduced=self._reduced_before,
                weights=self._gathered([self.block]) + self._still_gathered(i),
                gathering=gathering,
                activations=self._kept(i) + self.block_uses[i].forward,
            )
        if self.has_output:
            yield self._moment(
                "loss",
                reduced=self._reduced_before,
                weights=self._gathered([self.norm, self.output]) + self._still_gathered(len(self.block_uses)),
                gathering=self._gathering(self.norm) + self._gathering(self.output),
                activations=self._kept(len(self.block_uses)) + self.measured.boundary,
                loss=max(self.measured.loss.forward, self.measured.loss.backward),
                gap=self.measured.loss_gap,
            )

    def _get_backward_moments(self) -> Iterator[Moment]:
        """Behind each module's backward, with FSDP, the moment when its gradient is copied to be reduced."""
        num_blocks, boundary = len(self.block_uses), self.measured.boundary
        if self.output.numel and self.has_fsdp:
            yield self._moment(
                "gradient of the output",
                reduced=self._reduced([self.output]),
                weights=self._still_gathered(num_blocks),
                activations=self._kept(num_blocks) + boundary,
                gradients=self._staged(self.output),
            )
        for i in sorted({*self.last_blocks, *self.first_blocks}, reverse=True):
            # FSDP reduces a tied weight's gradient with the embedding
            first = self.output if self.has_fsdp else self.head
            done = [first, self.norm, *[self.block] * (num_blocks - 1 - i)]
            prefetched = self._gathering(self.block if i > 0 else self.embedding)
            yield self._moment(
                f"backward of block {i + 1}",
                reduced=self._reduced(done),
                weights=self._gathered([self.block]) + self._still_gathered(i),
                gathering=prefetched,
                activations=self._kept(i) + self.block_uses[i].backward,
                gradients=self._gathered([self.tied]) + self._being_reduced(done[-1]),
            )
            if self.has_fsdp:
                yield self._moment(
                    f"gradient of block {i + 1}",
                    reduced=self._reduced([*done, self.block]),
                    weights=self._still_gathered(i),
                    gathering=prefetched,
                    activations=self._kept(i) + boundary,
                    gradients=self._gathered([self.tied]) + self._staged(self.block),
                )
        if self.embedding.numel:
            # without FSDP the gradient of what was looked up is cast to the table's float32
            cast = casts_weights(self.config, self.dims) * boundary * FLOAT32 // self.param_bytes
            yield self._moment(
                "gradient of the embedding",
                reduced=self._reduced(self.units),
                activations=self._kept(0) + boundary + cast,
                # without FSDP a tied weight's second gradient is made beside the first
                gradients=self._staged(self.embedding) + (not self.has_fsdp) * self.weight_bytes * self.tied.numel,
            )

    def _kept(self, block: int) -> int:
        """Activations that wait for backward, when forward or backward is at this block."""
        boundary, uses = self.measured.boundary, self.block_uses
        # of what is moved to the host that of the block before is here: on its way out or back
        own = boundary + sum(use.kept for use in uses[:block]) - sum(self.moved[: max(0, block - 1)])
        return own + round(self.other_microbatches * (boundary + sum(use.kept for use in uses)))

    def _get_moved(self, mode: BlockMode) -> int:
        """Bytes that a block keeps on the host: by the autograd hooks of distributed/activation_offload.py."""
        if not self.config.activation_checkpoint.offload or mode not in OFFLOADED_MODES:
            return 0
        return self.measured.blocks[mode].kept if self.config.training.compile else self.measured.boundary

    def _moment(
        self, name: str, *, reduced: int = 0, gathering: int = 0, has_optimizer: bool = True, gap: int = 0, **parts: int
    ) -> Moment:
        """`parts` come on top of what a rank always has; gradients that are `reduced` are on their shards."""
        main: Counter[Part] = Counter({part: parts.get(part, 0) for part in PARTS})
        main["weights"] += (not self.is_offloaded) * self.all_shards + self.measured.buffers
        main["optimizer"] += (has_optimizer and not self.is_offloaded) * self.states
        if self.dims.pp > 1:  # FSDP adds up a rank's whole gradients, and reduces them after the last microbatch
            main["gradients"] += FLOAT32 * sum(unit.numel for unit in self.units)
        main["gradients"] += (not self.has_fsdp) * reduced
        main["activations"] += LIBRARY_WORKSPACES + self._read_by_others
        return Moment(name, main, gathering, self.has_fsdp * reduced, gap)

    @property
    def _read_by_others(self) -> int:
        """The workspace of async tensor parallel (distributed/async_tensor_parallel.py)."""
        parts = 2 * (self.dims.tp - 1) * self.config.parallelism.enable_async_tensor_parallel
        return parts * self.measured.boundary

    def _reduced(self, units: Iterable[Unit]) -> int:
        """Gradients on their shards, of a microbatch that has got so far."""
        shards = [self.weight_bytes * unit.shard for unit in units]
        if self.is_offloaded:  # each goes to the machine's memory at once
            return max(shards, default=0)
        # where nothing is sharded, FSDP copies a unit's gradient once more to scale it (torch 2.11 and 2.13)
        copies_too = self.has_fsdp and self.dims.fsdp == 1 and self.dims.dp_replicate > 1
        return max(self._reduced_before, sum(shards)) + copies_too * max(shards, default=0)

    @property
    def _reduced_before(self) -> int:
        """Gradients of earlier microbatches of the step, which are on their shards from the start."""
        training = self.config.training
        if self.is_offloaded or self.dims.get_num_microbatches(training) == 1:
            return 0
        return self.all_shards

    def _gathered(self, units: Iterable[Unit]) -> int:
        """Whole weights, as the layers read them."""
        return self.has_fsdp * self.param_bytes * sum(unit.numel for unit in units)

    def _still_gathered(self, block: int) -> int:
        """Weights that stay gathered until backward, when it or forward is at this block."""
        if self.dims.pp > 1:  # FSDP then frees none before the last microbatch's backward
            return self._gathered(self.units)
        if should_reshard_after_forward(self.config.parallelism.fsdp_reshard_after_forward, self.dims):
            embedding = self.embedding if self.modes[0] == "gathered" else self.tied
            return self._gathered([embedding, *[self.block] * self.modes[:block].count("gathered")])
        return self._gathered([self.embedding, *[self.block] * block])

    def _gathering(self, unit: Unit) -> int:
        """The buffer into which a unit is gathered, and this rank's part of it."""
        return self.param_bytes * unit.shard * (self.dims.fsdp + 1) if self.dims.fsdp > 1 else 0

    def _staged(self, unit: Unit) -> int:
        """A unit's whole gradient, and its float32 copy that is reduced."""
        return self.has_fsdp * self.param_bytes * unit.numel + self._being_reduced(unit)

    def _being_reduced(self, unit: Unit) -> int:
        return self.has_fsdp * FLOAT32 * unit.shard * self.dims.fsdp

    @property
    def _optimizer_copies(self) -> int:
        if self.is_offloaded or self.config.optimizer.implementation == "fused":
            return 0
        if self.config.optimizer.implementation == "foreach":
            return NUM_FOREACH_COPIES * self.all_shards
        largest = max(unit.largest for unit in self.units)
        return NUM_FOR_LOOP_COPIES * FLOAT32 * largest // self.dims.fsdp


def _get_stages(config: JobConfig, dims: ParallelDims, n_layers: int, pp_rank: int) -> list[list[str]]:
    """The names of the modules in each stage of a pipeline rank."""
    if dims.pp == 1:
        return [["tok_embeddings", *(f"layers.{i}" for i in range(n_layers)), "norm", "output"]]
    stages = get_stage_modules(config.parallelism, n_layers)
    schedule = config.parallelism.pipeline_parallel_schedule
    return [stages[i] for i in get_stages_of_rank(schedule, pp_rank, dims.pp, len(stages))]


def _get_blocks(stages: list[list[str]]) -> list[int]:
    return [int(name.removeprefix("layers.")) for stage in stages for name in stage if name.startswith("layers.")]
