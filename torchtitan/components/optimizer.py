"""Adam or AdamW over all parts of the model that this rank holds, as one object.

Its checkpoint is keyed by parameter name (`state.layers.0.attention.wq.weight.exp_avg`), so it loads into
another division of the parameters over ranks. Only the moments are saved, and one count of steps (`state.step`), of
which torch keeps a tensor for each parameter: lr, betas and weight decay are the configuration's, also after a resume.
States that take less memory are in compact_optimizer.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from torchtitan.components.compact_optimizer import CompactAdamW
from torchtitan.config.sections import Float8, Optimizer, Training

# Flat keys: nested ones number the parameters, which two pipeline stages would do alike.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
STEP = "state.step"


class OptimizersContainer:
    """One torch optimizer for each model part (several when this rank holds several pipeline stages)."""

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        after_step: Callable[[nn.Module], object] = id,  # called with each part; id does nothing
        **kwargs: Any,
    ) -> None:
        self._after_step = after_step
        self._parts = [
            (part, optimizer_class([p for p in part.parameters() if p.requires_grad], **kwargs)) for part in model_parts
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for _, optimizer in self._parts for group in optimizer.param_groups]

    def step(self, *, grad_factor: Tensor, skip: Tensor) -> None:
        """Update the weights with `grad_factor` (0-dim float32) times the gradients.

        If `skip` (0-dim bool) is true nothing changes. Both are on the device. The fused implementation reads them
        there, in its one pass over gradients and moments; the others read `skip` on the host.
        """
        for _, optimizer in self._parts:
            parameters = optimizer.param_groups[0]["params"]
            device = parameters[0].device  # the CPU with enable_cpu_offload
            if optimizer.defaults["fused"]:
                optimizer.grad_scale = (1 / grad_factor).to(device)  # type: ignore[attr-defined]  # the kernel divides by it
                optimizer.found_inf = skip.to(device, torch.float32)  # type: ignore[attr-defined]
                optimizer.step()
            elif not skip:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], grad_factor.to(device))
                optimizer.step()
        # not by a hook of torch's optimizer, which would also see the step that makes the moments before a load
        for part, _ in self._parts:
            self._after_step(part)

    def zero_grad(self) -> None:
        for _, optimizer in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The live moments, not copies of them. Before the first step they are made, as zeros."""
        return {_saved_key(key): value for key, value in self._flat_state() if key.startswith("state.")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in self._parts:
            flat = dict(_flat_state(part, optimizer))
            # a copy each: torch counts in place
            flat.update(
                (key, state_dict[saved].clone() if saved == STEP else state_dict[saved])
                for key in flat
                if (saved := _saved_key(key)) in state_dict
            )
            set_optimizer_state_dict(part, optimizer, optim_state_dict=flat, options=_FLAT)

    def export_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of weights by name the true ones, in float32: these are."""
        return dict(weights)

    def _flat_state(self) -> Iterable[tuple[str, Any]]:
        for part, optimizer in self._parts:
            yield from _flat_state(part, optimizer)


def _saved_key(key: str) -> str:
    return STEP if key.startswith("state.") and key.endswith(".step") else key


def _flat_state(part: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Any]]:
    is_fresh = not optimizer.state
    flat = get_optimizer_state_dict(part, optimizer, options=_FLAT)
    if is_fresh:
        # torch makes the moments with a step on zero gradients: take back that it counts, and that Adam decays weights
        for state in optimizer.state.values():
            for moment in state.values():
                moment.zero_()
    return flat.items()


def get_weight_dtype(training: Training, optimizer: Optimizer) -> torch.dtype:
    """Of the weights that are stored; where it is not float32, the layers compute in the same."""
    return torch.bfloat16 if optimizer.state_precision == "compact" else getattr(torch, training.dtype)


def build_optimizer(
    model_parts: Sequence[nn.Module], optimizer: Optimizer, *, float8: Float8 | None = None
) -> OptimizersContainer | CompactAdamW:
    if optimizer.state_precision == "compact":
        return CompactAdamW(model_parts, optimizer)
    classes: dict[str, type[torch.optim.Optimizer]] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    after_step: Callable[[nn.Module], object] = id
    if float8 is not None and float8.precompute_float8_dynamic_scale_for_fsdp:
        from torchtitan.distributed.float8 import precompute_scales

        after_step = precompute_scales
    return OptimizersContainer(
        model_parts,
        classes[optimizer.name],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=optimizer.implementation == "fused",
        foreach=optimizer.implementation == "foreach",
        after_step=after_step,
    )


__all__ = ["OptimizersContainer", "build_optimizer", "get_weight_dtype"]
