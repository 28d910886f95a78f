"""What ends a run between two steps: a request to stop, and numbers that are not finite.

All ranks learn of it together, from flags on the device that the host reads when they are long there, so that it never
waits for work that it has just queued.
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
        self._finite: _Later | None = None
        self._stop: _Later | None = None

    def heed_sigterm(self) -> None:
        """Not before a step is done: until then SIGTERM ends the process at once, and there is nothing to save."""
        signal.signal(signal.SIGTERM, self._request_stop)

    def must_skip(self, grad_norm: Tensor) -> Tensor:
        """Whether the optimizer is to leave this step out: 0-dim bool, and true ever after it was so once."""
        self._all_finite &= torch.isfinite(grad_norm)
        return ~self._all_finite

    def note_stop(self, stop: Tensor) -> None:
        """`stop` is the ranks' sum of stop_requested, from the beginning of this step."""
        self._stop = _Later(stop)

    def check_previous(self, step: int) -> bool:
        """Whether to stop after this `step`; waits for no more than the end of the one before.

        Raises:
            NonFiniteError: the optimizer has left out the step before.
        """
        self.check_last(step - 1)
        self._finite = _Later(self._all_finite)
        assert self._stop is not None
        return bool(self._stop.read())

    def check_last(self, step: int) -> None:
        """Raise NonFiniteError if the optimizer has left out the last step, which is waited for."""
        finite, self._finite = self._finite, None
        if finite is not None and not finite.read():
            raise NonFiniteError(step, "the gradient norm is inf or nan; the weights are left as they were before")

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """Finite gradients too can ruin the weights, by a learning rate that is far too high.

        Raises:
            NonFiniteError: they have.
        """
        if not math.isfinite(get_total_norm([p.detach() for p in parameters]).item()):
            raise NonFiniteError(step, "the optimizer has made weights that are inf or nan; they are not saved")

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_requested.fill_(True)


class _Later:
    """A number on the device, which the host may read when the device has come to this point."""

    def __init__(self, value: Tensor) -> None:
        self._copy = torch.empty((), dtype=value.dtype, pin_memory=value.is_cuda)
        self._copy.copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.item()
