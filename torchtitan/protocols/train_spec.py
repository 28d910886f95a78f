"""The model families, by name. Imports no torch: options are checked against a family's sizes before its code loads.

A family outside this package registers itself from the module that experimental.custom_import names:

    register_train_spec("mine", TrainSpec(flavors={"tiny": MyArgs(...)}, load=load_my_model_code))
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torchtitan.models
from torchtitan.config.errors import ConfigError

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.config.job_config import ActivationCheckpoint, Model, Parallelism, Training
    from torchtitan.distributed.parallel_dims import Mesh, ParallelDims
    from torchtitan.protocols.model import Decoder, StateDictAdapter


class ModelArgs(Protocol):
    """The shape of a model; plain numbers."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int

    def num_params(self) -> int: ...

    def get_num_flops_per_token(self, seq_len: int) -> int: ...

    def for_run(self, *, max_seq_len: int, use_scaled_rope: bool) -> ModelArgs:
        """The same shape, with what a run's options decide."""


class ParallelizeFn(Protocol):
    """Divides a model on the meta device, or a pipeline stage of one, over devices, in place.

    Where `parallel_dims.world_size` is 1 and nothing is offloaded, it must not apply FSDP: the memory estimate traces
    a block so.
    """

    def __call__(
        self,
        model: Any,
        *,
        mesh: Mesh,
        parallel_dims: ParallelDims,
        parallelism: Parallelism,
        training: Training,
        activation_checkpoint: ActivationCheckpoint,
        loss_parallel: bool,
    ) -> None: ...


@dataclass(frozen=True)
class ModelCode:
    """The half of a family that needs torch."""

    model_cls: Callable[[Any], Decoder]
    """Builds the model from its ModelArgs."""
    parallelize_fn: ParallelizeFn
    state_dict_adapter: Callable[[Any], StateDictAdapter | None]
    """Builds the adapter from the model's ModelArgs; None where Hugging Face has no such model."""
    build_loss: Callable[..., Loss] | None = None
    """In place of components.loss.build_loss, with its arguments: a loss of the family's own. Not for pipelines."""


@dataclass(frozen=True)
class TrainSpec:
    """A model family: its sizes, and how to load its code."""

    flavors: Mapping[str, Any]
    """ModelArgs by the name of the size."""
    load: Callable[[], ModelCode]


# Filled while modules are imported, read afterwards.
_registered: dict[str, TrainSpec] = {}


def register_train_spec(name: str, spec: TrainSpec) -> None:
    """Make a family from outside this package known."""
    if name in get_model_names():
        raise ValueError(f"a model named {name!r} exists already")
    _registered[name] = spec


def get_model_names() -> list[str]:
    in_tree = [module.name for module in pkgutil.iter_modules(torchtitan.models.__path__)]
    return sorted([*in_tree, *_registered])


def get_train_spec(name: str) -> TrainSpec:
    """A family in this package is the package torchtitan.models.<name>, which has a `train_spec`."""
    if name in _registered:
        return _registered[name]
    if name not in get_model_names():
        raise ConfigError(f"model.name={name!r} is unknown; known are {', '.join(get_model_names())}.")
    spec = importlib.import_module(f"torchtitan.models.{name}").train_spec
    assert isinstance(spec, TrainSpec)
    return spec


def get_run_args(model: Model, *, max_seq_len: int) -> Any:
    """The ModelArgs of the flavour that is asked for, with what the run's options decide."""
    flavor = get_train_spec(model.name).flavors[model.flavor]
    return flavor.for_run(max_seq_len=max_seq_len, use_scaled_rope=model.use_scaled_rope)
