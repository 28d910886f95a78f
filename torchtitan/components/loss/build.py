"""The choice of the loss, made once, and the lines that say which it was."""

from typing import Any

import torch

from torchtitan.components.loss.cross_entropy import CrossEntropyLoss
from torchtitan.components.loss.fused_linear import FusedLinearCrossEntropyLoss
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.config.errors import ConfigError, LigerNotInstalledError
from torchtitan.config.sections import LigerKernel, Metrics, Training
from torchtitan.protocols.model import Loss
from torchtitan.tools.logging import logger
from torchtitan.tools.packages import is_liger_installed


def build_token_sums(training: Training, metrics: Metrics) -> TokenSums:
    """What a configuration has the log say of tokens beside their mean loss."""
    by_sequence = bool(training.datasets)
    return TokenSums(z_loss=training.z_loss, predictions=metrics.enable_token_metrics, by_sequence=by_sequence)


def build_loss(
    liger_kernel: LigerKernel,
    *,
    device_type: str,
    tensor_parallel: bool,
    compile: bool,
    sums: TokenSums | None = None,
) -> Loss:
    """The loss that a configuration means.

    Raises:
        ImportError: the fused loss is on, `implementation` is not "native", and liger-kernel is missing or too old.
        ConfigError: `implementation` is "liger" where its kernels cannot run.
    """
    if not liger_kernel.enable_fused_linear_cross_entropy:
        if compile:
            logger.info("Compiling the loss function with torch.compile")
        return CrossEntropyLoss(compile=compile, sums=sums)

    budget_bytes = liger_kernel.logits_memory_budget_mib << 20
    accum_dtype = torch.float32 if liger_kernel.weight_grad_accum_dtype == "float32" else None
    where: dict[str, Any] = {"device_type": device_type, "tensor_parallel": tensor_parallel, "sums": sums}
    said = describe_loss(liger_kernel, **where)
    if liger_kernel.implementation != "native" and not is_liger_installed():
        raise LigerNotInstalledError  # also where the in-tree loss stands in: nothing falls back in silence
    if why_in_tree(liger_kernel.implementation, **where):
        logger.info(said)
        return FusedLinearCrossEntropyLoss(budget_bytes=budget_bytes, accum_dtype=accum_dtype, sums=sums)

    if device_type != "cuda" and not _triton_interprets():
        raise ConfigError(
            f"liger_kernel.implementation=liger needs a GPU, and this run is on the {device_type}; use implementation"
            " auto or native, the in-tree fused loss, or set TRITON_INTERPRET=1, with which the kernels run very slowly"
        )
    from torchtitan.components.loss.liger import LigerFusedLinearLoss

    logger.info(said)
    return LigerFusedLinearLoss(budget_bytes=budget_bytes, accum_dtype=accum_dtype, sums=sums)


def check_sums(loss: Loss, sums: TokenSums) -> Loss:
    """The loss itself, which may not tell what the log is to have of tokens.

    Then it is said that the log has no loss of each dataset. Raises ConfigError where predictions are asked for.
    """
    if getattr(loss, "tells_tokens", False):
        return loss
    name = getattr(loss, "__name__", type(loss).__name__)
    others = "the standard loss or liger_kernel.implementation=native"
    if sums.predictions:
        raise ConfigError(
            f"metrics.enable_token_metrics: {name}, the loss of this run, tells neither accuracy nor entropy of tokens;"
            f" leave it off, or use {others}"
        )
    if sums.by_sequence:
        sums.by_sequence = False
        logger.info(f"The log has no loss of each dataset: {name} gives one for all tokens; {others} tells it")
    return loss


def describe_loss(
    liger_kernel: LigerKernel, *, device_type: str, tensor_parallel: bool, sums: TokenSums | None = None
) -> str:
    """Which one build_loss gives, in words."""
    if not liger_kernel.enable_fused_linear_cross_entropy:
        return "Using the standard cross entropy loss"
    reason = why_in_tree(
        liger_kernel.implementation, device_type=device_type, tensor_parallel=tensor_parallel, sums=sums
    )
    if reason:
        return f"Using the in-tree fused linear cross entropy loss: {reason}"
    return "Using Liger-Kernel fused linear cross entropy loss"


def _triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, which needs no GPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_in_tree(implementation: str, *, device_type: str, tensor_parallel: bool, sums: TokenSums | None) -> str | None:
    """The reason to use the in-tree loss, or None where Liger-Kernel serves."""
    if implementation == "native":
        return 'liger_kernel.implementation is "native"'
    if implementation == "liger":
        return None
    if tensor_parallel:
        return "the vocabulary is sharded over the tensor-parallel ranks"
    if sums is not None and sums.predictions:
        return "metrics.enable_token_metrics asks for what Liger-Kernel does not tell"
    if sums is not None and sums.by_sequence:
        return "the log has the loss of each dataset, which Liger-Kernel does not tell"
    if device_type != "cuda":
        return f"Liger-Kernel has no kernels for the {device_type}"
    return None
