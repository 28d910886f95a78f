"""What ends a run between two steps: a request to stop, and numbers that are not finite.

The ranks tell each other as the backward of a step ends, on the device. Before the host queues the next step, when it
has the batches for it, it waits to hear what was told: the device then still has the weights to update, and idles only
where that takes less time than the host needs to queue its next work. So a request is answered after the step under
way, and one that comes after its backward, after the next: never by more than one step, on a CPU and on a GPU alike.
A step for which some rank has no data is left out by all.
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
        self._lacks_data: _Later | None = None
        self._told: _Later | None = None

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
        """Of all ranks, as each step begins: 0-dim float32. With it they tell if one has no data for the step."""
        counts = torch.tensor([num_tokens, no_data], dtype=torch.float32)
        sums = sum_over_world_(counts.to(self._device, non_blocking=True))
        self._no_data = sums[1] > 0
        self._lacks_data = _Later(self._no_data)
        return sums[0]

    def lacks_data(self) -> bool:
        """Whether the step that is queued is left out, for want of data: waits for the end of the step before."""
        assert self._lacks_data is not None
        return bool(self._lacks_data.read())

    def must_skip(self, grad_norm: Tensor) -> Tensor:
        """Whether the optimizer is to leave this step out: 0-dim bool, and true ever after a norm was not finite.

        Called behind the backward, where the ranks tell who is to stop.
        """
        self._all_finite &= torch.isfinite(grad_norm) | self._no_data
        asked = sum_over_world_(self._asked.to(self._device, copy=True, non_blocking=True))
        self._told = _Later(torch.stack([asked[0] > 0, self._all_finite]))
        return ~self._all_finite | self._no_data

    def stops_after(self, step: int) -> bool:
        """Whether some rank was asked to stop by the end of the backward of this `step`, the last: it is waited for.

        Raises:
            NonFiniteError: the optimizer leaves it out.
        """
        stop, finite = self._told.read().tolist() if self._told is not None else (False, True)
        if not finite:
            raise NonFiniteError(step, "the gradient norm is inf or nan; the weights are left as they were before")
        return stop

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """After the last step, which is waited for. Finite gradients too can ruin the weights, by too high a rate.

        Raises:
            NonFiniteError: they have, or the optimizer has left out the last step.
        """
        self.stops_after(step)
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
            time.sleep(0.0002)  # not synchronize(), during which Python handles no signal
        return self._copy
