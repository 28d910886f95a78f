"""Every option of a run: one dataclass per TOML [section], one doc line per field.

A field is a name, a type (../types.py), a default and the string under it; ../schema.py reads all four for the command
line, `--help` and docs/configuration.md. Rules across fields live in ../validate.py.
"""

from torchtitan.config.sections.layout import ActivationCheckpoint, Checkpoint, Parallelism, ReshardPolicy
from torchtitan.config.sections.learning import (
    FLOAT8_MULTIPLE,
    DecayType,
    Float8,
    LigerKernel,
    LRScheduler,
    Model,
    Optimizer,
    Training,
    Validation,
)
from torchtitan.config.sections.run import Comm, Experimental, Job, Metrics, Profiling

__all__ = [
    "FLOAT8_MULTIPLE",
    "ActivationCheckpoint",
    "Checkpoint",
    "Comm",
    "DecayType",
    "Experimental",
    "Float8",
    "Job",
    "LRScheduler",
    "LigerKernel",
    "Metrics",
    "Model",
    "Optimizer",
    "Parallelism",
    "Profiling",
    "ReshardPolicy",
    "Training",
    "Validation",
]
