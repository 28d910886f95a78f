"""The memory of a run, known before it starts.

plan        what a start says about memory, and the recomputation that it chooses: the least that fits
advice      which options would free how much
estimate    bytes by part and by moment, arithmetic on shapes
measure     what a block and the loss keep and need, run on the meta device
trace       which tensors exist when
"""

from torchtitan.memory.advice import explain_out_of_memory, get_remedies, is_out_of_memory
from torchtitan.memory.estimate import MemoryEstimate, estimate_memory
from torchtitan.memory.plan import MemoryPlan, plan_memory

__all__ = [
    "MemoryEstimate",
    "MemoryPlan",
    "estimate_memory",
    "explain_out_of_memory",
    "get_remedies",
    "is_out_of_memory",
    "plan_memory",
]
