"""Checkpoints that upstream torchtitan wrote with torch.distributed.checkpoint, v0.1.0 to v0.2.2, under our keys.

    upstream                             here
    model.layers.0... (v0.1.0)           layers.0...                its later releases call weights as we do
    model.freqs_cis                                                 computed, not loaded
    optimizer.state.layers.0...          the same
    lr_scheduler.last_epoch              lr_scheduler.step          the rest follows from the configuration
    train_state.ntokens_seen             train_state.n_tokens_seen  of one data rank; not in v0.1.0
    dataloader.world_size                train_state.dp_world_size  how many of them there were
    dataloader.dp_rank_0...                                         pickles of another order of the data

There are no states of random numbers. Where only weights were saved nothing tells who did.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

DP_WORLD_SIZE = "train_state.dp_world_size"
"""Not a part of our own train_state."""

_NAMES = {
    "lr_scheduler.last_epoch": "lr_scheduler.step",
    "train_state.step": "train_state.step",
    "train_state.ntokens_seen": "train_state.n_tokens_seen",
    "dataloader.world_size": DP_WORLD_SIZE,
}
ROPE = (
    "upstream torchtitan writes none, and its Llama 3 scales rotary frequencies since v0.2.0 (October 2025), which here"
    " is model.use_scaled_rope, off by default"
)


@dataclass
class UpstreamMetadata(Metadata):
    """What is where in upstream's checkpoint, under our keys."""


def with_our_keys(metadata: Metadata) -> Metadata:
    """The same, or an UpstreamMetadata if upstream wrote it and states with the weights."""
    if "lr_scheduler.last_epoch" not in metadata.state_dict_metadata:
        return metadata
    return UpstreamMetadata(
        state_dict_metadata={
            ours: entry for key, entry in metadata.state_dict_metadata.items() if (ours := _our_key(key)) is not None
        },
        storage_data={
            replace(index, fqn=ours): info
            for index, info in metadata.storage_data.items()
            if (ours := _our_key(index.fqn)) is not None
        },
    )


def describe_missing(path: Path, missing: list[str]) -> str:
    """What a run that continues from upstream's checkpoint goes on without, and what that means."""
    meaning = {
        "dataloader": "the data is read from its beginning, in this package's order",
        "rng": "random numbers are drawn anew",
    }
    lacks = "; ".join(f"no {name}: {meaning.get(name, 'it begins anew')}" for name in missing)
    return f"{path} is upstream torchtitan's, and holds {lacks}"


def _our_key(key: str) -> str | None:
    name = key.removeprefix("model.")
    if name == "freqs_cis":
        return None
    if key.startswith(("lr_scheduler.", "train_state.", "dataloader.")):
        return _NAMES.get(key)
    return name
