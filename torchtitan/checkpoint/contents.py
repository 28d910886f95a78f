"""What of a run a checkpoint holds: live weights and states, under flat keys, and how they are taken back.

Weights stand under their own names; then come `optimizer.`, `lr_scheduler.`, `dataloader.`, `train_state.` and `rng.`.
The keys and shapes do not tell how the model was divided over ranks.
"""

import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from torchtitan.checkpoint.folder import OPTIONS
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import (
    STATES,
    UnusableCheckpointError,
    check_files,
    check_weights,
    load_alone,
    parse_metadata,
    read_metadata_file,
)
from torchtitan.checkpoint.upstream import DP_WORLD_SIZE, ROPE, UpstreamMetadata, describe_missing
from torchtitan.config.errors import CheckpointError
from torchtitan.protocols.hf_folder import holds_hf_weights
from torchtitan.tools.logging import logger


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class OptimizerState(Stateful, Protocol):
    def export_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The true weights, where those of the model hold only a part of their bits."""


class Contents:
    """All ranks make the same calls."""

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        optimizer: OptimizerState,
        states: Mapping[str, Stateful],  # the others
        ranks: Ranks,
    ):
        self._model_parts = model_parts
        self._optimizer = optimizer
        self._states = {"optimizer": optimizer, **states, "rng": RandomState(ranks.rank)}
        self._ranks = ranks
        assert tuple(self._states) == STATES

    def weights(self) -> dict[str, Tensor]:
        return {name: weight for part in self._model_parts for name, weight in part.state_dict().items()}

    def exported_weights(self) -> dict[str, Tensor]:
        """In full precision, whatever the form of the optimizer's states."""
        return self._optimizer.export_weights(self.weights())

    def everything(self) -> dict[str, Any]:
        everything: dict[str, Any] = dict(self.weights())
        for name in STATES:
            everything |= self._state(name)
        return everything

    def set_step(self, step: int) -> None:
        train_state = self._states["train_state"]
        train_state.load_state_dict({**train_state.state_dict(), "step": step})

    def load(self, path: Path, names: Iterable[str], *, excluded: Sequence[str]) -> None:
        """Load the weights and the named states, but for those excluded.

        Raises:
            UnusableCheckpointError: the checkpoint is damaged, or holds weights only and states were named.
            CheckpointError: it is another model's, or lacks some of the states.
            DataloaderStateError: it is of other data.
        """
        began = time.monotonic()
        left_out = {*excluded, *(["rng"] if "train_state" in excluded else [])}
        names = [name for name in names if name not in left_out]
        content = self._ranks.ask_first(lambda: _read_own_metadata(path))
        metadata = parse_metadata(path, content)
        self._ranks.ask_first(lambda: check_files(path, metadata))
        _name_step(metadata)
        shapes = self._ranks.gather_first({name: tuple(weight.shape) for name, weight in self.weights().items()}) or []
        all_shapes = {name: shape for part in shapes for name, shape in part.items()}
        self._ranks.ask_first(lambda: check_weights(path, metadata, all_shapes))
        names = self._find_states(path, metadata, names, excluded)
        if "optimizer" in names:
            self._ranks.together(partial(self._check_optimizer, path, metadata))
        # First what is small: the data loader may find that it cannot go on there.
        self._read(path, metadata, {}, [name for name in names if name != "optimizer"])
        self._read(path, metadata, dict(self.weights()), [name for name in names if name == "optimizer"])
        if not self._ranks.is_first:
            return
        may_be_upstreams = isinstance(metadata, UpstreamMetadata) or not names
        if may_be_upstreams and not any((path / name).is_file() for name in ("config.json", OPTIONS)):
            logger.warning(f"{path} holds no configuration, so only the model's shape was compared: {ROPE}")
        logger.info(f"Loaded {', '.join(['model', *names])} from {path} in {time.monotonic() - began:.2f} s")

    def _find_states(self, path: Path, metadata: Metadata, names: list[str], excluded: Sequence[str]) -> list[str]:
        """Those of the named states that can be loaded; CheckpointError if the run cannot go on without the others."""
        held = {key.split(".")[0] for key in metadata.state_dict_metadata}
        missing = [name for name in names if name not in held]
        if names and missing == names:
            raise UnusableCheckpointError(
                f"{path} holds only weights, so this run cannot be continued from it; a new one can start from them"
                f" with --checkpoint.initial_load_path {path} --checkpoint.initial_load_model_only True"
            )
        if missing and isinstance(metadata, UpstreamMetadata):
            if self._ranks.is_first:
                logger.warning(describe_missing(path, missing))
        elif left_out := [name for name in missing if name != "rng"]:
            raise CheckpointError(
                f"{path} does not hold {', '.join(left_out)};"
                f" to go on without, add --checkpoint.exclude_from_loading {','.join([*excluded, *left_out])}"
            )
        elif missing and self._ranks.is_first:
            logger.warning(f"{path} holds no rng: random numbers are drawn anew")
        return [name for name in names if name in held]

    def _check_optimizer(self, path: Path, metadata: Metadata) -> None:
        """Float32 states and compact ones have other keys."""
        if missing := [key for key in self._state("optimizer") if key not in metadata.state_dict_metadata]:
            raise CheckpointError(
                f"{path} holds the optimizer's states in another form than this run's: {missing[0]} is not in it. Set"
                " optimizer.state_precision, name and implementation as in its config.toml, or start a new run from its"
                f" weights: --checkpoint.initial_load_path {path} --checkpoint.initial_load_model_only True"
            )

    def _read(self, path: Path, metadata: Metadata, state: dict[str, Any], names: list[str]) -> None:
        """Fill the tensors in `state`, and hand each named state its part of the checkpoint."""
        for name in names:
            state |= self._state(name) if name != "dataloader" else {}
        for key in [key for key in state if key.startswith(("rng.", "train_state."))]:
            if key not in metadata.state_dict_metadata:
                del state[key]  # of a rank that the saving run did not have: for the state itself to judge
        if "train_state" in names and DP_WORLD_SIZE in metadata.state_dict_metadata:
            state[DP_WORLD_SIZE] = 1
        self._ranks.together(partial(load_alone, path, state, metadata))
        if "dataloader" in names:  # the place of one data rank may be what another one goes on from
            state |= self._ranks.ask_first(partial(_read_places, path, metadata))
        for name in names:
            prefix = f"{name}."
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if "n_tokens_seen" in part:  # of one rank, where upstream counted them
                part["n_tokens_seen"] *= state.get(DP_WORLD_SIZE, 1)
            self._ranks.together(partial(self._states[name].load_state_dict, part))

    def _state(self, name: str) -> dict[str, Any]:
        return {f"{name}.{key}": value for key, value in self._states[name].state_dict().items()}


class RandomState:
    """Python's and torch's random number generators, each rank's own. A rank that has none saved keeps those it has."""

    def __init__(self, rank: int):
        self._key = f"rank_{rank}"

    def state_dict(self) -> dict[str, str]:
        states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state().tolist()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state().tolist()
        return {self._key: json.dumps(states)}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        if self._key not in state_dict:
            return
        if not isinstance(state_dict[self._key], str):
            logger.warning("Random numbers are drawn anew: an older version saved them as a pickle, which is not read")
            return
        states = json.loads(state_dict[self._key])
        version, internal, gauss_next = states["python"]
        random.setstate((version, tuple(internal), gauss_next))
        torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def _name_step(metadata: Metadata) -> None:
    """Checkpoints from before have a count of steps for each parameter, all alike: one of them is the optimizer's."""
    name, entries = "optimizer.state.step", metadata.state_dict_metadata
    old = next((key for key in entries if key.startswith("optimizer.state.") and key.endswith(".step")), None)
    if old is not None and name not in entries:
        entries[name] = entries[old]
        metadata.storage_data[MetadataIndex(name, ())] = metadata.storage_data[MetadataIndex(old, ())]


def _read_places(path: Path, metadata: Metadata) -> dict[str, Any]:
    """Of all data ranks of the saving run."""
    places: dict[str, Any] = {key: "" for key in metadata.state_dict_metadata if key.startswith("dataloader.")}
    load_alone(path, places, metadata)
    return places


def _read_own_metadata(path: Path) -> bytes:
    if holds_hf_weights(path):
        raise UnusableCheckpointError(
            f"{path} holds Hugging Face safetensors, only weights; a new run can start from them"
            f" with --checkpoint.initial_load_path {path} --checkpoint.initial_load_in_hf"
        )
    return read_metadata_file(path)
