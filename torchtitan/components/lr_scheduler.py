"""The learning rate over a run: linear warm-up, a stable phase, decay.

    factor
      1 |     /--------------\\
        |    /                \\            linear, sqrt or cosine
    min |   /                  \\___
        +---|--------------|------|----> step
           warmup        stable  decay
"""

import math
from collections.abc import Callable
from functools import partial

from torchtitan.components.compact_optimizer import CompactAdamW
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.sections import DecayType, LRScheduler
from torchtitan.tools.logging import logger


def lr_factor(
    step: int, *, steps: int, warmup_steps: int, decay_steps: int, decay_type: DecayType, min_lr_factor: float
) -> float:
    """Share of the peak learning rate at `step`, counted from 0.

    The first of the `warmup_steps` has 1 / warmup_steps, the last has 1. The decay ends on a step after the run's
    last one, so that the last step still moves the weights when min_lr_factor is 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    first_decay_step = steps + 1 - decay_steps
    if step < first_decay_step:
        return 1.0
    progress = min(1.0, (step + 1 - first_decay_step) / max(decay_steps, 1))  # a resume may be beyond a shortened run
    if decay_type == "linear":
        remaining = 1 - progress
    elif decay_type == "sqrt":
        remaining = 1 - math.sqrt(progress)
    else:
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr_factor + (1 - min_lr_factor) * remaining


class LRSchedule:
    """Sets the learning rate of all parameter groups; its state is the number of steps taken.

    The rates follow from the configuration at every start: a resumed run obeys a changed `lr` or `steps`.
    """

    def __init__(self, optimizer: OptimizersContainer | CompactAdamW, factor: Callable[[int], float]):
        self._optimizer = optimizer
        self._factor = factor
        self._peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self._step = 0
        self._apply()

    @property
    def lr(self) -> float:
        """The rate that the next optimizer step uses."""
        return self._optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._step = state_dict["step"]
        self._apply()

    def _apply(self) -> None:
        factor = self._factor(self._step)
        for group, peak_lr in zip(self._optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak_lr * factor


def build_lr_scheduler(
    optimizer: OptimizersContainer | CompactAdamW, lr_scheduler: LRScheduler, steps: int
) -> LRSchedule:
    """Fit the phases into `steps`, training.steps, or else into total_steps, after which the rate stays as it is.

    The warm-up comes first, then the decay takes what is left of its share.
    """
    given = f"training.steps={steps}"
    if lr_scheduler.total_steps is not None:
        steps, given = lr_scheduler.total_steps, f"lr_scheduler.total_steps={lr_scheduler.total_steps}"
    warmup_steps = lr_scheduler.warmup_steps
    if warmup_steps > steps:
        logger.warning(f"lr_scheduler.warmup_steps={warmup_steps} is shortened to {given}")
        warmup_steps = steps
    longest_decay = steps - warmup_steps
    ratio = lr_scheduler.decay_ratio
    decay_steps = longest_decay if ratio is None else round(steps * ratio)
    if decay_steps > longest_decay:
        logger.warning(
            f"lr_scheduler: {warmup_steps} steps of warm-up and {decay_steps} of decay are more than"
            f" {given}; the decay is shortened to {longest_decay}"
        )
        decay_steps = longest_decay
    factor = partial(
        lr_factor,
        steps=steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        decay_type=lr_scheduler.decay_type,
        min_lr_factor=lr_scheduler.min_lr_factor,
    )
    return LRSchedule(optimizer, factor)
