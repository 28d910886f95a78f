"""float8: the blocks' linear layers multiply in 8 bits, by torchao. The only file that imports it, where a run asks.

Weights, gradients and everything between the layers keep their dtypes: a layer scales and rounds what enters each of
its three products, so a model, its names and its checkpoints stay what they are. The head and the loss stay as they
are too: an 8-bit head costs more steps than it saves time.

With one scale a tensor ("tensorwise") a step gains (docs/performance.md). With one a row it is nearer to bf16, and was
slower than that on one H100.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torchao.float8 import Float8LinearConfig, precompute_float8_dynamic_scale_for_fsdp
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import FLOAT8_MULTIPLE, Float8
from torchtitan.protocols.model import Decoder
from torchtitan.tools.logging import logger

MIN_CAPABILITY = (8, 9)

MAX_MIXED_ROW = 2048
"""The longest row for which the inductor may reduce over rows and over columns in one kernel. With a transposed cast to
float8 in it, that kernel takes 2.5 ms at 8192 x 4096, 14% of a block's time, and two take 0.8; at 2048 it gains."""


class CastingFloat8Linear(Float8Linear):
    """With a weight of any dtype, as mixed_precision.py's layers: a single process keeps it in float32."""

    def forward(self, input: Tensor) -> Tensor:  # (B, S, in) -> (B, S, out)
        weight = self.weight.to(input.dtype)
        output = matmul_with_hp_or_float8_args.apply(input, weight.t(), self.linear_mm_config, self.config)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def apply_float8(model: Decoder, config: Float8, *, tp: int, sharded: bool, device: torch.device) -> None:
    """Exchange the linear layers of the blocks, in place: before the model is divided, checkpointed and compiled.

    Args:
        tp: ranks over which a matrix is split, each part of which must have sizes for float8.
        sharded: FSDP gathers weights from other ranks, and may do so in float8.

    Raises:
        ConfigError: the device has no float8, or no layer is left to exchange.
    """
    _check_device(device, emulate=config.emulate)
    options = replace(
        Float8LinearConfig.from_recipe_name(config.recipe_name),
        emulate=config.emulate,
        enable_fsdp_float8_all_gather=sharded and config.enable_fsdp_float8_all_gather,
    )
    if options.enable_fsdp_float8_all_gather and not config.precompute_float8_dynamic_scale_for_fsdp:
        logger.warning(
            "float8.enable_fsdp_float8_all_gather finds each weight's scale by a reduction over the ranks, twice a"
            " step; add --float8.precompute_float8_dynamic_scale_for_fsdp for one reduction of all (17% faster with 1B"
            " on two H100s)"
        )
    if config.recipe_name != "tensorwise":
        # Compiled code otherwise keeps more bits than eager code between a row's scale and its use.
        inductor.emulate_precision_casts = True
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if max(min(linear.weight.shape) for linear in linears.values()) > MAX_MIXED_ROW:
        inductor.triton.mix_order_reduction = False
    names = [name for name in linears if name.startswith("layers.")]
    chosen = [name for name in names if not any(text in name for text in config.filter_fqns)]
    odd = [name for name in chosen if any(size % (FLOAT8_MULTIPLE * tp) for size in linears[name].weight.shape)]
    fits = [name for name in chosen if name not in odd]
    _report(config, model, names=names, odd=odd, tp=tp)
    if not fits:
        raise ConfigError(
            f"model.converters has float8, and none of the blocks' {len(names)} linear layers can be converted:"
            f" float8.filter_fqns={config.filter_fqns} leaves {len(chosen)}, of which {len(odd)} have sizes that"
            f" {FLOAT8_MULTIPLE * tp} does not divide; leave float8 off, or change the filter"
        )
    for name in fits:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, CastingFloat8Linear.from_float(linears[name], options))
    logger.info(f"float8 ({config.recipe_name}): {len(fits)} of the blocks' {len(names)} linear layers converted")


def precompute_scales(model: nn.Module) -> None:
    """All weights' scales for the next step, in one all-reduce, where they are gathered in float8."""
    precompute_float8_dynamic_scale_for_fsdp(model)


def _check_device(device: torch.device, *, emulate: bool) -> None:
    if emulate:
        return
    if device.type != "cuda":
        raise ConfigError(f"model.converters has float8, which the {device.type} lacks; try it with --float8.emulate")
    if (found := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        needed, has = (".".join(map(str, capability)) for capability in (MIN_CAPABILITY, found))
        raise ConfigError(
            f"model.converters has float8, which needs a GPU of compute capability {needed}, and"
            f" {torch.cuda.get_device_name(device)} has {has}; leave it off, or try it with --float8.emulate"
        )


def _report(config: Float8, model: Decoder, *, names: list[str], odd: list[str], tp: int) -> None:
    """Say what the filter misses, and which layers stay as they are for their sizes."""
    heads = [name for name in ("output",) if getattr(model, name, None) is not None]  # never converted, named or not
    for text in config.filter_fqns:
        if not any(text in name for name in [*names, *heads]):
            logger.warning(f"float8.filter_fqns has {text!r}, which is part of no linear layer's name")
    if odd:
        kinds = sorted({name.split(".", 2)[2] for name in odd})
        logger.warning(
            f"{FLOAT8_MULTIPLE * tp} does not divide the sizes of {', '.join(kinds)}, which float8 needs"
            + (f" of each of {tp} tensor-parallel ranks" if tp > 1 else "")
            + f": {len(odd)} layers stay in high precision"
        )
