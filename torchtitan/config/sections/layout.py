"""How a run is divided over processes, what it recomputes, and what it saves."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config.types import FilePath, NonNegativeInt, PositiveInt, PositiveIntOrAuto, Range

ReshardPolicy = Literal["default", "always", "never"]
PipelineSchedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]


@dataclass
class Parallelism:
    """How the run is divided over processes."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of ranks that each hold a full copy of the weights (HSDP when the shard degree is above 1)."""
    data_parallel_shard_degree: PositiveIntOrAuto = -1
    """Ranks over which FSDP2 shards weights, gradients and optimizer states; -1 takes the ranks that are left."""
    fsdp_reshard_after_forward: ReshardPolicy = "default"
    """Free the gathered weights after forward: always, never, or (default) unless pipeline parallelism is on or
    activation_checkpoint.mode = "auto" finds memory for them."""
    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which each matrix and the sequence between them is split."""
    disable_loss_parallel: bool = False
    """Gather the logits over the tensor-parallel ranks instead of computing the loss on vocabulary shards."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with the products (GPUs linked by NVLink, needs training.compile)."""
    context_parallel_degree: PositiveInt = 1
    """Ranks over which each sequence is split."""
    pipeline_parallel_degree: PositiveInt = 1
    """Groups of ranks that each hold a range of the layers."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Names of the modules in each pipeline stage, instead of a split by layer count."""
    pipeline_parallel_first_stage_less_layers: NonNegativeInt = 1
    """How many layers the embedding counts for when layers are split over stages."""
    pipeline_parallel_last_stage_less_layers: NonNegativeInt = 1
    """How many layers the final norm and the output count for when layers are split over stages."""
    pipeline_parallel_layers_per_stage: PositiveInt | None = None
    """Layers in each stage; None gives one stage per rank, or two for schedules that interleave."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Pipeline schedule. GPipe and 1F1B give each rank one stage, the others two or more, ZBVZeroBubble exactly two."""
    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences per pipeline microbatch; divides training.local_batch_size."""


@dataclass
class ActivationCheckpoint:
    """Recomputing activations in backward instead of keeping them."""

    mode: Literal["selective", "full", "none", "auto"] = "selective"
    """full recomputes each block, selective some blocks or some operations, none nothing; auto as little as fits the
    device's memory, by an estimate."""
    memory_share: Annotated[float, Range(above=0, max=1)] = 0.92
    """Share of the device's memory that auto may fill, what other processes hold on it included."""
    selective_ac_option: str = "2"
    """In selective mode: an integer n recomputes every n-th block; op recomputes in every block, but keeps the results
    of costly operations, attention only that of attention."""
    offload: bool = False
    """Keep the inputs of recomputed blocks in the machine's memory, copied there and back behind the computation (GPU,
    no pipelines; compiled, the results of attention too)."""


@dataclass
class Checkpoint:
    """Saving and loading the run."""

    enable_checkpoint: bool = False
    """Save checkpoints, and continue from the newest one in the folder."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: PositiveInt = 500
    """Steps between two checkpoints."""
    load_only: bool = False
    """Continue from the newest checkpoint in the folder, and save none."""
    initial_load_path: FilePath | None = None
    """Checkpoint to start from when the run has none of its own."""
    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path."""
    initial_load_in_hf: bool = False
    """initial_load_path holds Hugging Face safetensors."""
    last_save_model_only: bool = True
    """The last checkpoint holds only the weights, so that the run cannot be continued past it."""
    last_save_in_hf: bool = False
    """Save the last checkpoint as Hugging Face safetensors (needs last_save_model_only)."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of the weights in a model-only last checkpoint."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write checkpoints beside the training, by another process, from a copy in CPU memory, pinned or not."""
    keep_latest_k: Annotated[int, Range(min=2, also=(0,))] = 10
    """Checkpoints kept; 0 keeps all."""
    load_step: Annotated[int, Range(min=0, also=(-1,))] = -1
    """Step of the checkpoint to continue from; -1 is the newest."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """States not loaded: optimizer, lr_scheduler, dataloader, train_state (comma-separated on the command line)."""
    enable_first_step_checkpoint: bool = False
    """Save after step 1 too, to find out early whether saving works."""
    create_seed_checkpoint: bool = False
    """Initialise on one process, save step 0 and stop."""
