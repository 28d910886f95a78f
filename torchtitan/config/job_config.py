"""A whole configuration: the sections of sections/, by name."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torchtitan.config import sections


@dataclass
class JobConfig:
    """All sections."""

    job: sections.Job = field(default_factory=sections.Job)
    profiling: sections.Profiling = field(default_factory=sections.Profiling)
    metrics: sections.Metrics = field(default_factory=sections.Metrics)
    model: sections.Model = field(default_factory=sections.Model)
    float8: sections.Float8 = field(default_factory=sections.Float8)
    optimizer: sections.Optimizer = field(default_factory=sections.Optimizer)
    lr_scheduler: sections.LRScheduler = field(default_factory=sections.LRScheduler)
    training: sections.Training = field(default_factory=sections.Training)
    parallelism: sections.Parallelism = field(default_factory=sections.Parallelism)
    checkpoint: sections.Checkpoint = field(default_factory=sections.Checkpoint)
    activation_checkpoint: sections.ActivationCheckpoint = field(default_factory=sections.ActivationCheckpoint)
    liger_kernel: sections.LigerKernel = field(default_factory=sections.LigerKernel)
    comm: sections.Comm = field(default_factory=sections.Comm)
    validation: sections.Validation = field(default_factory=sections.Validation)
    experimental: sections.Experimental = field(default_factory=sections.Experimental)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that the run's model sees."""
        return max(self.training.seq_len, self.validation.seq_len if self.validation.enabled else 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
