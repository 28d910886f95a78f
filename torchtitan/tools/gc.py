"""Python's garbage collector, run at chosen steps.

Left to itself it runs at a different moment on every rank, and each rank then waits for the slowest.
"""

import gc

from torch import Tensor

from torchtitan.tools.logging import logger


class GarbageCollection:
    """Switches automatic collection off; `run(step)` collects every `gc_freq` steps."""

    def __init__(self, gc_freq: int, *, debug: bool = False) -> None:
        self._gc_freq = gc_freq
        self._debug = debug
        gc.disable()
        gc.collect(1)  # the young generations: a full collection would walk all of torch, or the whole model

    def run(self, step: int) -> None:
        """With `debug`, collect everything at every step and name the tensors that reference cycles kept alive."""
        if self._debug:
            _collect_and_report(step)
        elif step % self._gc_freq == 0:
            gc.collect(1)


def _collect_and_report(step: int) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)  # what is found goes to gc.garbage instead of being freed
    gc.collect()
    gc.set_debug(0)
    sizes = [(t.numel() * t.element_size(), f"{t.dtype} {tuple(t.shape)}") for t in gc.garbage if isinstance(t, Tensor)]
    gc.garbage.clear()
    gc.collect()
    if sizes:
        mib = sum(size for size, _ in sizes) / 2**20
        kinds = ", ".join(sorted({kind.removeprefix("torch.") for _, kind in sizes}))
        logger.warning(f"step {step}: reference cycles kept {len(sizes)} tensors ({mib:.1f} MiB) alive: {kinds}")
