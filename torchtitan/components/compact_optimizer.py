"""AdamW with compact states: 5 bytes a parameter for the weight and both moments, where float32 takes 12.

    weight                bf16: the model's own parameter, its gradient bf16 too      2 + 2
    correction            int8: the next 8 bits of the float32 weight                 1
    exp_avg, exp_avg_sq   int8, uint8, and a float32 scale for each group             1 + 1 and a sixteenth

*Weights.* The bits of a float32 are cut to 24: sign, 8 of exponent, 15 of mantissa. bf16 holds the nearest of 16, the
correction the signed rest, so that integer arithmetic joins both without loss.

*Moments.* A group is up to 128 neighbours in a row, or one element of a vector. With s the largest of a group's
|exp_avg| it stores sign(m) 127 sqrt(|m| / s), and of r = sqrt(exp_avg_sq) 255 sqrt(r / s): the root spends more steps
on the small. What is not zero stays at least one step in the denominator, so that no update can explode.

*Rounding.* An update smaller than a step must not be lost each time: what is rounded is first raised by a part of a
step that a hash of the new weight's bits and of the step's number draws. That is unbiased, needs no random state, and
gives the same bits after a resume and on every layout.

The arithmetic between is float32. On a GPU the update is one compiled kernel a parameter, one pass over gradient and
states, that reads the clip factor and whether to skip there; on a CPU it is eager, and slow. Groups lie inside rows,
so that states divide as weights do, and a checkpoint loads into another layout.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Optimizer
from torchtitan.distributed.utils import local_tensor

MAX_GROUP = 128


class CompactAdamW:
    """Has the interface of components/optimizer.py's OptimizersContainer.

    Raises:
        ConfigError: tensor parallel cuts a parameter through a group.
    """

    def __init__(self, model_parts: Sequence[nn.Module], optimizer: Optimizer) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": optimizer.lr}]
        self._config = optimizer
        named = [(name, p) for part in model_parts for name, p in part.named_parameters() if p.requires_grad]
        self._states = {name: _State(name, parameter) for name, parameter in named}
        self._step = torch.zeros((), device=named[0][1].device)

    @torch.no_grad()
    def step(self, *, grad_factor: Tensor, skip: Tensor) -> None:
        """Update the weights with `grad_factor` (0-dim float32) times the gradients; if `skip` (0-dim bool), nothing.

        Both stay on the device.
        """
        config, lr = self._config, self.param_groups[0]["lr"]
        self._step += ~skip
        # numbers as tensors, so that another learning rate is not another kernel
        number = partial(torch.full_like, self._step)
        bias1, bias2 = (1 - number(beta).pow(self._step) for beta in (config.beta1, config.beta2))
        numbers = {
            "grad_factor": grad_factor,
            "skip": skip,
            "salt": self._step.to(torch.int32) * 0x1E3779B1,
            "step_size": number(lr) / bias1,
            "decay": number(1 - lr * config.weight_decay),
            "bias2": bias2,
        }
        update = _get_compiled_update() if self._step.is_cuda else _update
        for state in self._states.values():
            if state.parameter.grad is not None and state.local.numel():
                update(*state.groups(), **numbers, betas=(config.beta1, config.beta2), eps=config.eps)

    def zero_grad(self) -> None:
        for state in self._states.values():
            state.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The live states, not copies of them."""
        named = {f"state.{name}.{key}": t for name, state in self._states.items() for key, t in state.named().items()}
        return {"state.step": self._step, **named}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, own in self.state_dict().items():
            local_tensor(own).copy_(local_tensor(state_dict[key]))

    @torch.no_grad()
    def export_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of weights by name the true ones: float32, bf16 and correction joined. A single process's are on the CPU."""
        return {name: self._states[name].join() if name in self._states else weights[name] for name in weights}


class _State:
    """Of one parameter, or this rank's shard of it."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.parameter, self.local = parameter, local_tensor(parameter.detach())
        assert self.local.dtype == torch.bfloat16, f"{name}: expected bfloat16, got {self.local.dtype}"
        # by the whole parameter's row, which is the same on every layout
        row = parameter.shape[-1]
        self._group = math.gcd(row, MAX_GROUP) if parameter.dim() > 1 else 1
        if -(-row // _num_cuts(parameter)) % self._group:
            raise ConfigError(
                f"optimizer.state_precision=compact keeps groups of {self._group} neighbours, and tensor parallel cuts"
                f" {name}, of shape {tuple(parameter.shape)}, through one; use float32, or another"
                " parallelism.tensor_parallel_degree"
            )
        zeros = partial(torch.zeros, device=self.local.device)
        scale = (*self.local.shape[:-1], self.local.shape[-1] // self._group)
        self._tensors = {
            "correction": zeros(self.local.shape, dtype=torch.int8),
            "exp_avg_int8": zeros(self.local.shape, dtype=torch.int8),
            "exp_avg_sq_uint8": zeros(self.local.shape, dtype=torch.uint8),
            "exp_avg_scale": zeros(scale),
            "exp_avg_sq_scale": zeros(scale),
        }

    def groups(self) -> list[Tensor]:
        """What an update reads and writes: gradient and weight, then the states, as (groups, group or 1)."""
        assert self.parameter.grad is not None
        wholes = [local_tensor(self.parameter.grad), self.local, *self._tensors.values()]
        sizes = [1 if key.endswith("scale") else self._group for key in ("grad", "weight", *self._tensors)]
        # .data: a view has a base, whose shape a kernel would be compiled for as well
        return [tensor.view(-1, size).data for tensor, size in zip(wholes, sizes, strict=True)]

    def named(self) -> dict[str, Tensor]:
        """By key: a DTensor that is divided as the parameter, where that is one."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return self._tensors
        rows = {key: parameter.shape[-1] // (self._group if key.endswith("scale") else 1) for key in self._tensors}
        return {key: _like(parameter, local, row=rows[key]) for key, local in self._tensors.items()}

    def join(self) -> Tensor:
        joined = join_weight(self.local, self._tensors["correction"])
        if isinstance(self.parameter, DTensor):
            return _like(self.parameter, joined, row=self.parameter.shape[-1])
        return joined.cpu()


def join_weight(weight: Tensor, correction: Tensor) -> Tensor:
    """The float32 weight of 24 bits."""
    upper = weight.float().view(torch.int32) >> 8
    return ((upper + correction) << 8).view(torch.float32)


def split_weight(weight: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """bf16, as float32, and int8 of a float32 weight; its lower 8 bits are rounded away by the `chance` of _draw."""
    bits = weight.view(torch.int32)
    upper = (bits + (chance & 0xFF)) >> 8  # the bits are sign and magnitude: this raises the magnitude
    nearest = (upper + 0x80) >> 8
    return (nearest << 16).view(torch.float32), (upper - (nearest << 8)).to(torch.int8)


def _draw(values: Tensor, salt: Tensor) -> Tensor:
    """32 bits for each float32 value, to round by: each depends on all of the value's and of the salt's."""
    mixed = (values.view(torch.int32) ^ salt) * 0x2C1B3C6D
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * 0x297A2D39
    return mixed ^ ((mixed >> 16) & 0xFFFF)


def _round(x: Tensor, chance: Tensor) -> Tensor:
    """x >= 0 to the whole number above or below, the nearer more often, by bits 8 to 18 of `chance`."""
    one_to_two = (((chance << 4) & 0x7FF000) | 0x3F800000).view(torch.float32)  # no conversion, which costs more
    return torch.floor(x + (one_to_two - 1))


def _root(x: Tensor) -> Tensor:
    """The square root, with a few operations fewer than exact."""
    return x * x.clamp(min=1e-37).rsqrt()


def _update(
    grad: Tensor,  # (N, G)
    weight: Tensor,  # (N, G) bf16
    correction: Tensor,  # (N, G) int8
    exp_avg: Tensor,  # (N, G) int8
    exp_avg_sq: Tensor,  # (N, G) uint8
    exp_avg_scale: Tensor,  # (N, 1) float32
    exp_avg_sq_scale: Tensor,  # (N, 1) float32; of the root
    *,
    grad_factor: Tensor,
    skip: Tensor,
    salt: Tensor,  # another int32 each step
    step_size: Tensor,  # the learning rate, over the first moment's bias
    decay: Tensor,
    bias2: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    g = grad.float() * grad_factor
    stored = exp_avg.float()
    m = stored * stored.abs() * (exp_avg_scale * (1 / 127**2))
    m = m + (g - m) * (1 - betas[0])
    stored = exp_avg_sq.float()
    root = stored * stored * (exp_avg_sq_scale * (1 / 255**2))
    root = _root(root * root * betas[1] + g * g * (1 - betas[1]))
    new = join_weight(weight, correction) * decay - step_size * m / (root * bias2.rsqrt() + eps)

    chance = _draw(new, salt)
    new_weight, new_correction = split_weight(new, chance)
    size = m.abs()
    m_scale, root_scale = size.amax(1, keepdim=True), root.amax(1, keepdim=True)
    size = _round(_root(size * (127**2 / m_scale.clamp(min=1e-30))), chance).clamp(max=127)
    levels = _round(_root(root * (255**2 / root_scale.clamp(min=1e-30))), chance >> 12).clamp(max=255)
    levels = torch.where(root > 0, levels.clamp(min=1), 0.0)
    weight.copy_(torch.where(skip, weight.float(), new_weight))
    correction.copy_(torch.where(skip, correction, new_correction))
    exp_avg.copy_(torch.where(skip, exp_avg.float(), torch.where(m < 0, -size, size)))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq.float(), levels))
    exp_avg_scale.copy_(torch.where(skip, exp_avg_scale, m_scale))
    exp_avg_sq_scale.copy_(torch.where(skip, exp_avg_sq_scale, root_scale))


@cache
def _get_compiled_update(backend: str | Callable[..., Any] = "inductor") -> Callable[..., None]:
    compiled = torch.compile(_update, fullgraph=True, backend=backend)

    def update(*groups: Tensor, **numbers: Any) -> None:
        for tensor in groups:
            # One kernel for each size of groups, and no more: of two that fit, which is taken would depend on what came
            # before, and they need not round alike, so that a resumed run would differ in the last bit.
            torch._dynamo.mark_static(tensor, 1)
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        compiled(*groups, **numbers)

    return update


def _num_cuts(parameter: Tensor) -> int:
    """Into how many parts a row of it is divided."""
    if not isinstance(parameter, DTensor) or parameter.dim() == 1:
        return 1
    axes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in axes if placement.is_shard(parameter.dim() - 1))


def _like(parameter: DTensor, local: Tensor, *, row: int) -> DTensor:
    """A DTensor of this rank's part, divided as the parameter is, whose rows may be longer than `row`."""
    shape = torch.Size((*parameter.shape[:-1], row))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


__all__ = ["CompactAdamW"]
