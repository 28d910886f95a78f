"""How each block of a model is recomputed. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torchtitan.config.sections import ActivationCheckpoint

BlockMode = Literal["gathered", "none", "op", "attention", "full"]
"""What a block does again in backward: nothing; under FSDP the gathering of its weights; and beside that what is cheap
for its size, all but attention, or all."""

ASSUMED_GIB = 79.1
"""Memory of a GPU that is not there, by which activation_checkpoint.mode = "auto" chooses: that of an H100 80GB."""

SELECTIVE_MODES: tuple[BlockMode, ...] = ("op", "attention")
"""Which keep some results of a block: values of activation_checkpoint.selective_ac_option."""

OFFLOADED_MODES: tuple[BlockMode, ...] = ("attention", "full")
"""What activation_checkpoint.offload moves to the machine's memory: little for the time that the block takes."""

BLOCK_MODES: dict[BlockMode, str] = {
    "gathered": "keep all and their gathered weights",
    "none": "keep all",
    "op": "keep the costly results",
    "attention": "keep attention's result",
    "full": "are recomputed whole",
}
"""From the fastest to the leanest, in words."""


def get_block_modes(options: ActivationCheckpoint, n_layers: int) -> tuple[BlockMode, ...]:
    """By the block's number in the model; for "auto", which memory/plan.py decides, the leanest."""
    modes: list[BlockMode] = ["none"] * n_layers
    if options.mode == "selective" and options.selective_ac_option in SELECTIVE_MODES:
        modes = [options.selective_ac_option] * n_layers
    elif options.mode != "none":
        every_nth = int(options.selective_ac_option) if options.mode == "selective" else 1
        modes[every_nth - 1 :: every_nth] = ["full"] * (n_layers // every_nth)
    return tuple(modes)


def describe_block_modes(block_modes: Sequence[BlockMode]) -> str:
    """18 of 32 blocks keep all, 14 keep the costly results"""
    counts = Counter(block_modes)
    groups = [f"{counts[mode]} {words}" for mode, words in BLOCK_MODES.items() if counts[mode]]
    return ", ".join(groups).replace(" ", f" of {len(block_modes)} blocks ", 1)
