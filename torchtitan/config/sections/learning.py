"""What learns, from what, and how: the model, its data, loss and optimizer."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config.types import FilePath, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveIntOrAuto, Range

Decay = Annotated[float, Range(min=0, below=1)]
Fraction = Annotated[float, Range(min=0, max=1)]
DecayType = Literal["linear", "sqrt", "cosine"]


@dataclass
class Model:
    """Which model is trained, and its tokenizer."""

    name: str = "llama3"
    """Name of a registered model family."""
    flavor: str = "debugmodel"
    """Size of the model: a key of the family's flavours."""
    hf_folder: FilePath | None = None
    """Folder of a Hugging Face model: its config.json takes the place of name and flavor, its tokenizer and weights are
    taken unless tokenizer_path and checkpoint.initial_load_path name others."""
    tokenizer_path: FilePath = "./torchtitan/assets/tokenizer"
    """A tokenizer.json or its folder, in the working directory or else beside the package."""
    use_scaled_rope: bool = False
    """Scale the rotary frequencies as Llama 3.1 does for long contexts."""
    rope_scaling_factor: Annotated[float, Range(min=1)] | None = None
    """Scale them so, by this factor (Llama 3.1 has 8, 3.2 has 32; flavours of 3.2 have it themselves)."""
    converters: list[str] = field(default_factory=list)
    """What changes the model's layers before it is divided: float8, or nothing."""

    @property
    def title(self) -> str:
        """Which model it is, for messages."""
        return self.hf_folder or f"{self.name} {self.flavor}"


FLOAT8_MULTIPLE = 16
"""What a GPU's float8 products need of the sizes of both matrices."""


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
class LigerKernel:
    """The fused linear cross entropy loss: logits are never materialised in training."""

    enable_fused_linear_cross_entropy: bool = False
    """Compute the output projection and the loss together, in chunks."""
    implementation: Literal["auto", "liger", "native"] = "auto"
    """auto takes Liger-Kernel on a GPU that holds the whole vocabulary, and the in-tree loss on a CPU, with tensor
    parallelism, or where the log has what Liger does not tell; liger and native force one."""
    logits_memory_budget_mib: PositiveInt = 1024
    """Memory for one chunk of logits in MiB: less memory and more chunks, or the other way round. Validation keeps to
    it whichever loss trains, with what the standard loss makes of the logits."""
    weight_grad_accum_dtype: Literal["param", "float32"] = "param"
    """Dtype in which the output weight's gradient is summed over chunks: the weight's own, or float32."""


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
    """Share of the steps that decays at the end; None decays from the end of the warm-up on."""
    decay_type: DecayType = "linear"
    """Shape of the decay."""
    min_lr_factor: Fraction = 0.0
    """Share of optimizer.lr at which the decay ends, one step after the last."""
    total_steps: PositiveInt | None = None
    """Steps that the phases are fitted into, where they are not training.steps: a run that is cut short, or goes on."""


@dataclass
class Training:
    """Data, batch, length, precision and numerics of the training loop."""

    dataset: str = "python_stdlib"
    """Name of a registered dataset (python_stdlib, c4, ...); with dataset_path, how to read that path."""
    dataset_path: FilePath | None = None
    """Local file or folder to read instead: text, JSON lines, Parquet or token ids."""
    datasets: list[str] = field(default_factory=list)
    """A mixture instead, of NAME=WEIGHT: registered datasets, or paths that are read as `dataset` says."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that cannot be read, or has no text, stops the run, or is named and passed over: 100 of them on a rank."""
    document_mask: bool = False
    """Keep documents that share a sequence from seeing each other; positions start anew in each."""
    boundary_labels: Literal["ignore", "keep"] = "ignore"
    """With document_mask: whether to learn from a document's last token, whose label is the first of the next."""
    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank in one microbatch."""
    global_batch_size: PositiveIntOrAuto = -1
    """Sequences per step over all ranks, by gradient accumulation; -1 is one microbatch per data-parallel rank."""
    seq_len: PositiveInt = 2048
    """Tokens per sequence."""
    max_norm: Annotated[float, Range(above=0, also=(math.inf,))] = 1.0
    """Gradients are clipped to this global 2-norm; inf leaves them as they are."""
    z_loss: Annotated[float, Range(min=0)] = 0.0
    """Add z_loss * log_sum_exp**2 of the logits to each token's loss, such as 1e-4; logged beside the cross entropy."""
    steps: PositiveInt = 10000
    """Optimizer steps of the run."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in CPU memory (FSDP2's CPU offload)."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of weights, gradients and moments: bfloat16 halves their memory, and rounds small updates away."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the parameters in forward and backward; the optimizer keeps training.dtype."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype in which gradients are reduced over ranks."""
    compile: bool = False
    """Compile each transformer block and the standard loss with torch.compile."""
    feed_forward_pieces: PositiveInt = 1
    """Pieces of the sequence in which a block's feed-forward runs, one after the other, each recomputed in backward:
    its intermediates exist for one of them only."""
    gc_freq: PositiveInt = 50
    """Steps between two runs of Python's garbage collector, which is otherwise off."""
    gc_debug: bool = False
    """Collect at every step with gc's debugging on, to find reference cycles that hold tensors."""
    seed: NonNegativeInt | None = None
    """Seed of initialisation and data order; None draws one (it is logged, and the same on all ranks)."""
    deterministic: bool = False
    """Use deterministic kernels only: slower, the same bits at every run."""


@dataclass
class Validation:
    """Loss on held-out data during training."""

    enabled: bool = False
    """Validate at step 1 and every `freq` steps."""
    dataset: str | None = None
    """Name of a registered dataset; with dataset_path, how to read that path. None follows training.dataset: what it
    leaves out for validation, or else, with a warning, python_stdlib_validation."""
    dataset_path: FilePath | None = None
    """Local file or folder to read instead: text, JSON lines, Parquet or token ids."""
    local_batch_size: PositiveInt = 8
    """Sequences per data-parallel rank in one batch."""
    seq_len: PositiveInt = 2048
    """Tokens per sequence."""
    freq: PositiveInt = 10
    """Steps between two validations."""
    steps: PositiveIntOrAuto = -1
    """Batches per validation and data-parallel rank; -1 reads the whole set."""
    prompts: list[str] = field(default_factory=list)
    """Texts that each validation continues, greedily, in the log, TensorBoard, W&B and the report."""
    max_new_tokens: PositiveInt = 32
    """Tokens that follow each prompt, at most; each costs about a forward pass of a short batch."""
