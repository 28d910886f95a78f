"""What ends a run between two steps: a request to stop, and numbers that are not finite.

All ranks learn of it together, from flags on the device that the host reads when they are long there, so that it never
waits for work that it has just queued. A request is told as the device begins a step. On the CPU that step is left out.
A GPU has it queued when the host learns of it, and trains it: to leave it out, the host would have to wait in each step
for the one before to end, and queue nothing meanwhile. On both, a step for which some rank has no data is left out.
"""

import math
import signal
import time
from collections.abc import Iterable
from types import FrameType

import torch
from torch import Tensor

from torchtitan.config.errors import NonFiniteError
from torchtitan.distributed.utils import get_total_norm, sum_over_world_


class RunGuard:
    """One for a run; its calls are made by all ranks at the same steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = torch.zeros(1, pin_memory=device.type == "cuda")  # a GPU reads it when it comes to that
        self._asked_on_host = self._asked.numpy()  # a signal handler must not call torch, which may be in the midst
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)
        self._no_data = torch.zeros((), dtype=torch.bool, device=device)
        self._finite: _Later | None = None
        self._stop: _Later | None = None

    def heed_sigterm(self) -> None:
        """Not before a step is done: until then SIGTERM ends the process at once, and there is nothing to save."""
        signal.signal(signal.SIGTERM, self._request_stop)

    def asked_to_stop(self) -> bool:
        """This rank."""
        return bool(self._asked_on_host[0])

    def must_stop(self) -> bool:
        """Whether some rank was asked to: a collective call, which waits for the device."""
        return bool(sum_over_world_(self._asked.to(self._device, copy=True)))

    def sum_tokens(self, num_tokens: int, *, no_data: bool) -> Tensor:
        """Of all ranks, as each step begins: 0-dim float32. With it they tell who is to stop, and if it has no data."""
        counts = torch.tensor([num_tokens, no_data], dtype=torch.float32)
        both = [values.to(self._device, non_blocking=True) for values in (counts, self._asked)]
        sums = sum_over_world_(torch.cat(both))
        self._stop, self._no_data = _Later(sums[1:]), sums[1] > 0
        return sums[0]

    def stops_at_once(self) -> bool:
        """Whether the step that has begun is to be left out, for all that was asked before it."""
        assert self._stop is not None
        return self._device.type == "cpu" and bool(self._stop.read()[1])

    def must_skip(self, grad_norm: Tensor) -> Tensor:
        """Whether the optimizer is to leave this step out: 0-dim bool, and true ever after a norm was not finite."""
        self._all_finite &= torch.isfinite(grad_norm) | self._no_data
        return ~self._all_finite | self._no_data

    def check_previous(self, step: int) -> tuple[bool, bool]:
        """Whether to stop after this `step`, and whether it was left out for want of data.

        Waits for no more than the end of the step before.

        Raises:
            NonFiniteError: the optimizer has left out the step before.
        """
        self._check_last(step - 1)
        self._finite = _Later(self._all_finite)
        assert self._stop is not None
        no_data, stop = self._stop.read().tolist()
        return stop > 0, no_data > 0

    def _check_last(self, step: int) -> None:
        """Raise NonFiniteError if the optimizer has left out the last step, which is waited for."""
        finite, self._finite = self._finite, None
        if finite is not None and not finite.read():
            raise NonFiniteError(step, "the gradient norm is inf or nan; the weights are left as they were before")

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """After the last step, which is waited for. Finite gradients too can ruin the weights, by too high a rate.

        Raises:
            NonFiniteError: they have, or the optimizer has left out the last step.
        """
        self._check_last(step)
        if not math.isfinite(get_total_norm([p.detach() for p in parameters]).item()):
            raise NonFiniteError(step, "the optimizer has made weights that are inf or nan; they are not saved")

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._asked_on_host[0] = 1


class _Later:
    """A tensor on the device, which the host may read when the device has come to this point."""

    def __init__(self, value: Tensor) -> None:
        self._copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        self._copy.copy_(value, non_blocking=True)
        self._event = torch.cuda.current_stream().record_event() if value.is_cuda else None

    def read(self) -> Tensor:
        while self._event is not None and not self._event.query():
            time.sleep(0.001)  # not synchronize(), during which Python handles no signal; the device has work queued
        return self._copy
