"""Every option of a run: one dataclass per TOML [section], one doc line per field.

A field is a name, a type (types.py), a default and the string under it; schema.py reads all four for the command line,
`--help` and docs/configuration.md. Rules across fields live in validate.py.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config.types import FilePath, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveIntOrAuto, Range

Decay = Annotated[float, Range(min=0, below=1)]
Fraction = Annotated[float, Range(min=0, max=1)]
Seconds = Annotated[int, Range(min=1, max=10**9)]  # torch counts time-outs in nanoseconds, in 64 bits
DecayType = Literal["linear", "sqrt", "cosine"]
ReshardPolicy = Literal["default", "always", "never"]
PipelineSchedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]


@dataclass
class Job:
    """What this run is and where its files go."""

    config_file: FilePath | None = None
    """TOML file with the run's options; the command line overrides it."""

    dump_folder: FilePath = "./outputs"
    """Folder for checkpoints, metrics, traces and the resolved configuration."""

    description: str = "default job"
    """A line about the run, printed at the start."""

    print_args: bool = False
    """Print the resolved configuration at the start."""


@dataclass
class Profiling:
    """Traces of where time and memory go."""

    enable_profiling: bool = False
    """Write a torch.profiler trace (Chrome format) every `profile_freq` steps."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""

    profile_freq: PositiveInt = 10
    """Steps between two traces."""

    enable_memory_snapshot: bool = False
    """Write a snapshot of the CUDA allocator every `profile_freq` steps, and at an out-of-memory error."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside job.dump_folder."""


@dataclass
class Metrics:
    """What is logged, how often and where to."""

    log_freq: PositiveInt = 10
    """Steps between two log lines."""

    enable_tensorboard: bool = False
    """Write the metrics as TensorBoard events."""

    disable_color_printing: bool = False
    """Never colour the log (it is coloured only on a terminal in any case)."""

    disable_progress_line: bool = False
    """Never show the live progress line (it is shown only on a terminal in any case)."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard events, inside job.dump_folder."""

    save_for_all_ranks: bool = False
    """Every rank writes its metrics, not only the one that logs."""

    enable_wandb: bool = False
    """Send the metrics to Weights & Biases (the package wandb must be installed)."""


@dataclass
class Model:
    """Which model is trained, and its tokenizer."""

    name: str = "llama3"
    """Name of a registered model family."""

    flavor: str = "debugmodel"
    """Size of the model: a key of the family's flavours."""

    tokenizer_path: FilePath = "./tests/assets/tokenizer"
    """A tokenizer.json or its folder, in the working directory or else in the repository."""

    use_scaled_rope: bool = False
    """Scale the rotary frequencies as Llama 3.1 does for long contexts."""

    converters: list[str] = field(default_factory=list)
    """What changes the model's layers before it is divided: float8, or nothing."""


@dataclass
class Float8:
    """Products of the blocks' linear layers in 8 bits (model.converters float8; needs the package torchao)."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """One scale for a tensor, the fastest; one for each row; or rows, with weight gradients in high precision."""

    filter_fqns: list[str] = field(default_factory=list)
    """Parts of names of layers that stay as they are (the output always does)."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather the shards of the weights in float8 (tensorwise only)."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Find the scales of all weights gathered so in one reduction after each step."""

    emulate: bool = False
    """Compute what float8 would by other products, slowly: for tests, on any device."""


@dataclass
class Optimizer:
    """The optimizer and its constants."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Optimizer class of torch.optim."""

    lr: NonNegativeFloat = 8e-4
    """Peak learning rate."""

    beta1: Decay = 0.9
    """Decay of the first moment."""

    beta2: Decay = 0.95
    """Decay of the second moment."""

    eps: NonNegativeFloat = 1e-8
    """Added to the denominator of the update."""

    weight_decay: NonNegativeFloat = 0.1
    """Weight decay (decoupled in AdamW)."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How the update is computed; fused is the fastest."""

    state_precision: Literal["float32", "compact"] = "float32"
    """float32 for weights and both moments, 12 bytes a parameter and 4 of gradient; or compact: weights of 24 bits and
    moments of 8, 5 bytes and 2 of gradient (AdamW, fused)."""


@dataclass
class LRScheduler:
    """Warm-up, stable and decay phases of the learning rate."""

    warmup_steps: NonNegativeInt = 200
    """Steps of linear warm-up to optimizer.lr; the first has optimizer.lr / warmup_steps."""

    decay_ratio: Fraction | None = None
    """Share of training.steps that decays at the end; None decays from the end of the warm-up on."""

    decay_type: DecayType = "linear"
    """Shape of the decay."""

    min_lr_factor: Fraction = 0.0
    """Share of optimizer.lr at which the decay ends, one step after the last."""


@dataclass
class Training:
    """Data, batch, length, precision and numerics of the training loop."""

    dataset: str = "python_stdlib"
    """Name of a registered dataset (python_stdlib, c4, ...); with dataset_path, how to read that path."""

    dataset_path: FilePath | None = None
    """Local file or folder to read instead: text, JSON lines or Parquet."""

    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank in one microbatch."""

    global_batch_size: PositiveIntOrAuto = -1
    """Sequences per step over all ranks, by gradient accumulation; -1 is one microbatch per data-parallel rank."""

    seq_len: PositiveInt = 2048
    """Tokens per sequence."""

    max_norm: Annotated[float, Range(above=0, also=(math.inf,))] = 1.0
    """Gradients are clipped to this global 2-norm; inf leaves them as they are."""

    steps: PositiveInt = 10000
    """Optimizer steps of the run."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in CPU memory (FSDP2's CPU offload)."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the parameters in forward and backward; the optimizer keeps float32."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype in which gradients are reduced over ranks."""

    compile: bool = False
    """Compile each transformer block and the standard loss with torch.compile."""

    gc_freq: PositiveInt = 50
    """Steps between two runs of Python's garbage collector, which is otherwise off."""

    gc_debug: bool = False
    """Collect at every step with gc's debugging on, to find reference cycles that hold tensors."""

    seed: NonNegativeInt | None = None
    """Seed of initialisation and data order; None draws one (it is logged, and the same on all ranks)."""

    deterministic: bool = False
    """Use deterministic kernels only: slower, the same bits at every run."""


@dataclass
class Parallelism:
    """How the run is divided over processes."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Groups of ranks that each hold a full copy of the weights (HSDP when the shard degree is above 1)."""

    data_parallel_shard_degree: PositiveIntOrAuto = -1
    """Ranks over which FSDP2 shards weights, gradients and optimizer states; -1 takes the ranks that are left."""

    fsdp_reshard_after_forward: ReshardPolicy = "default"
    """Free the gathered weights after forward: always, never, or (default) unless pipeline parallelism is on."""

    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which each matrix and the sequence between them is split."""

    disable_loss_parallel: bool = False
    """Gather the logits over the tensor-parallel ranks instead of computing the loss on vocabulary shards."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with the products (GPU, needs training.compile)."""

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
class Checkpoint:
    """Saving and loading the run."""

    enable_checkpoint: bool = False
    """Save checkpoints, and continue from the newest one in the folder."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""

    interval: PositiveInt = 500
    """Steps between two checkpoints."""

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
    of costly operations."""


@dataclass
class LigerKernel:
    """The fused linear cross entropy loss: logits are never materialised in training."""

    enable_fused_linear_cross_entropy: bool = False
    """Compute the output projection and the loss together, in chunks."""

    implementation: Literal["auto", "liger", "native"] = "auto"
    """auto takes Liger-Kernel on a GPU that holds the whole vocabulary, and the in-tree loss on CPU or with tensor
    parallelism; liger and native force one."""

    logits_memory_budget_mib: PositiveInt = 1024
    """Memory for one chunk of logits in MiB: less memory and more chunks, or the other way round."""

    weight_grad_accum_dtype: Literal["param", "float32"] = "param"
    """Dtype in which the output weight's gradient is summed over chunks: the weight's own, or float32."""


@dataclass
class Comm:
    """Time-outs and tracing of collectives."""

    init_timeout_seconds: Seconds = 300
    """Time-out of collectives until the first step is done."""

    train_timeout_seconds: Seconds = 100
    """Time-out of collectives from the second step on."""

    trace_buf_size: NonNegativeInt = 20000
    """Entries of the flight recorder that is dumped when a collective times out; 0 turns it off."""

    save_traces_folder: str = "comm_traces"
    """Folder of the flight recorder's dumps, inside job.dump_folder."""


@dataclass
class Validation:
    """Loss on held-out data during training."""

    enabled: bool = False
    """Validate at step 1 and every `freq` steps."""

    dataset: str = "python_stdlib_validation"
    """Name of a registered dataset; with dataset_path, how to read that path."""

    dataset_path: FilePath | None = None
    """Local file or folder to read instead: text, JSON lines or Parquet."""

    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank in one batch."""

    seq_len: PositiveInt = 2048
    """Tokens per sequence."""

    freq: PositiveInt = 10
    """Steps between two validations."""

    steps: PositiveIntOrAuto = -1
    """Batches per validation and data-parallel rank; -1 reads the whole set."""


@dataclass
class Experimental:
    """Hooks for code outside this package."""

    custom_import: str = ""
    """Module imported before the model is looked up, to register models and datasets."""
