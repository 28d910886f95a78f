"""A whole configuration: the sections of sections/, by name."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torchtitan.config.sections import (
    ActivationCheckpoint,
    Checkpoint,
    Comm,
    Experimental,
    Float8,
    Job,
    LigerKernel,
    LRScheduler,
    Metrics,
    Model,
    Optimizer,
    Parallelism,
    Profiling,
    Training,
    Validation,
)


@dataclass
class JobConfig:
    """All sections."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    float8: Float8 = field(default_factory=Float8)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    liger_kernel: LigerKernel = field(default_factory=LigerKernel)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    experimental: Experimental = field(default_factory=Experimental)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that the run's model sees."""
        return max(self.training.seq_len, self.validation.seq_len if self.validation.enabled else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
