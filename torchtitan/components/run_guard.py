"""What ends a run between two steps: a request to stop, and numbers that are not finite.

All ranks learn of it together, from flags on the device that the host reads one step late, so that it never waits for
work that it has just queued.
"""

import math
import signal
from collections.abc import Iterable
from types import FrameType

import torch
from torch import Tensor

from torchtitan.config.errors import NonFiniteError
from torchtitan.distributed.utils import get_total_norm


class RunGuard:
    """One for a run; its calls are made by all ranks at the same steps."""

    def __init__(self, device: torch.device) -> None:
        self.stop_requested = torch.tensor(False)
        """On the CPU: whether this rank was asked to stop."""
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def heed_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, self._request_stop)

    def must_skip(self, grad_norm: Tensor) -> Tensor:
        """Whether the optimizer is to leave this step out: 0-dim bool, and true ever after it was so once."""
        self._all_finite &= torch.isfinite(grad_norm)
        return ~self._all_finite

    def check_previous(self, stop: Tensor, step: int) -> bool:
        """Whether to stop, by what was so at the end of the step before; `stop` is the ranks' sum for this `step`.

        Raises:
            NonFiniteError: the optimizer has left that step out.
        """
        should_stop = self.check_last(step - 1)
        flags = torch.stack([self._all_finite.to(stop), stop])
        copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.is_cuda)
        copy.copy_(flags, non_blocking=True)
        self._pending = copy, torch.cuda.current_stream().record_event() if flags.is_cuda else None
        return should_stop

    def check_last(self, step: int) -> bool:
        """As check_previous, but of the last step, which is waited for."""
        if self._pending is None:
            return False
        copy, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        all_finite, stop = copy.tolist()
        if not all_finite:
            raise NonFiniteError(step, "the gradient norm is inf or nan; the weights are left as they were before")
        return bool(stop)

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """Finite gradients too can ruin the weights, by a learning rate that is far too high.

        Raises:
            NonFiniteError: they have.
        """
        if not math.isfinite(get_total_norm([p.detach() for p in parameters]).item()):
            raise NonFiniteError(step, "the optimizer has made weights that are inf or nan; they are not saved")

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_requested.fill_(True)
