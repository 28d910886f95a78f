"""What a run is called, writes and waits for."""

from dataclasses import dataclass, field
from typing import Annotated

from torchtitan.config.types import FilePath, NonNegativeInt, PositiveInt, Range

Seconds = Annotated[int, Range(min=1, max=10**9)]  # torch counts time-outs in nanoseconds, in 64 bits


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
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write traces."""
    enable_memory_snapshot: bool = False
    """Write a snapshot of the CUDA allocator every `profile_freq` steps, and at an out-of-memory error."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside job.dump_folder."""


@dataclass
class Metrics:
    """What is logged, how often and where to."""

    log_freq: PositiveInt = 10
    """Steps between two log lines."""
    enable_token_metrics: bool = False
    """Also log, of the step that is logged, how often the label is the likeliest word, and the words' entropy."""
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
class Experimental:
    """Hooks for code outside this package."""

    custom_import: str = ""
    """Module imported before the model is looked up, to register models and datasets."""
