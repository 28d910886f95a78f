"""Device values read on the host one step late, so that the host never waits for work that it has just queued."""

import torch
from torch import Tensor


class HostMirror:
    """Holds the copy of one small tensor; each `exchange` starts a new copy and gives the one before."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, values: Tensor) -> list[float] | None:
        """Start copying `values`; the values of the last call, which the device has finished long ago."""
        previous = self.take()
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copy.copy_(values, non_blocking=True)
        event = torch.cuda.Event() if values.is_cuda else None
        if event is not None:
            event.record()
        self._pending = copy, event
        return previous

    def take(self) -> list[float] | None:
        """The values under way, waited for; None where there are none."""
        if self._pending is None:
            return None
        copy, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return copy.tolist()
