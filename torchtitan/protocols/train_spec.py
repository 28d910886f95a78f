"""The model families, by name. Imports no torch: options are checked against a family's sizes before its code loads.

A family outside this package registers itself from the module that experimental.custom_import names:

    register_train_spec("mine", TrainSpec(flavors={"tiny": MyArgs(...)}, load=load_my_model_code))
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torchtitan
from torchtitan.config.block_modes import BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import CheckpointError, ConfigError, TokenizerError
from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import meant_or_known
from torchtitan.config.sections import Model, Parallelism, Training
from torchtitan.config.upstream import about_unknown_name
from torchtitan.config.validate import validate
from torchtitan.tools.files import read_json
from torchtitan.tools.packages import is_installed

if TYPE_CHECKING:
    from torchtitan.protocols.model import Decoder, Loss, StateDictAdapter


HF_CONFIG = "config.json"


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

    def for_run(self, model: Model, *, max_seq_len: int) -> ModelArgs:
        """The same shape, with what a run's [model] options and its longest sequence decide."""


class ParallelizeFn(Protocol):
    """Divides a model on the meta device, or a pipeline stage of one, over devices, in place.

    Where `parallel_dims.world_size` is 1 and nothing is offloaded, it must not apply FSDP: the memory estimate traces
    a block so.
    """

    def __call__(
        self,
        model: Any,
        *,
        mesh: Any,  # a Mesh of distributed/mesh.py
        parallel_dims: ParallelDims,
        parallelism: Parallelism,
        training: Training,
        block_modes: Sequence[BlockMode],  # of all blocks: distributed/activation_checkpoint.py, fsdp.py
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
    tensor_parallel_plan: Mapping[str, Any] = field(default_factory=dict)
    """The style of torch.distributed.tensor.parallel of each module of a block; empty where it cannot be split."""
    build_loss: Callable[..., Loss] | None = None
    """In place of components.loss.build.build_loss, called as it is: a loss of the family's own. Not for pipelines."""


class HFFormat(Protocol):
    """A family in Hugging Face's format, without torch: a folder of it is checked before anything starts."""

    @property
    def model_type(self) -> str:
        """What transformers' config.json calls the family."""

    def read(self, config: Mapping[str, Any]) -> Any:
        """The ModelArgs that a config.json describes. Raises CheckpointError for what the model lacks."""

    def write(self, args: Any) -> dict[str, Any]:
        """config.json of this model, as transformers reads it."""

    def get_names(self, args: Any) -> dict[str, str]:
        """Theirs for each of the whole model's weights."""

    def get_copies(self, args: Any) -> dict[str, str]:
        """Names under which a weight may lie there once more, as a tied output does, and that weight's name there."""


@dataclass(frozen=True)
class TrainSpec:
    """A model family: its sizes, and how to load its code."""

    flavors: Mapping[str, Any]
    """ModelArgs by the name of the size."""
    load: Callable[[], ModelCode]
    hf: HFFormat | None = None


# Filled while modules are imported, read afterwards.
_registered: dict[str, TrainSpec] = {}


def register_train_spec(name: str, spec: TrainSpec) -> None:
    """Make a family from outside this package known."""
    if name in get_model_names():
        raise ValueError(f"a model named {name!r} exists already")
    _registered[name] = spec


def get_model_names() -> list[str]:
    in_tree = {module.name for module in pkgutil.iter_modules([str(Path(torchtitan.__path__[0], "models"))])}
    return sorted([*(in_tree - {"common"}), *_registered])


def get_train_spec(name: str) -> TrainSpec:
    """A family in this package is the package torchtitan.models.<name>, which has a `train_spec`.

    Raises:
        ConfigError: there is no such family.
    """
    if name in _registered:
        return _registered[name]
    if name not in (names := get_model_names()):
        hint = about_unknown_name("model.name", name) or meant_or_known(name, names)
        raise ConfigError(f"model.name={name} is unknown; {hint}")
    spec = importlib.import_module(f"torchtitan.models.{name}").train_spec
    assert isinstance(spec, TrainSpec)
    return spec


def find_family(model: Model) -> TrainSpec:
    """The family of the model that is asked for."""
    if model.hf_folder is not None:
        return read_hf_model(Path(model.hf_folder, HF_CONFIG))[0]
    return get_train_spec(model.name)


def get_run_args(model: Model, *, max_seq_len: int) -> Any:
    """The ModelArgs of the model that is asked for, with what the run's options decide."""
    return _get_args(model).for_run(model, max_seq_len=max_seq_len)


def _get_args(model: Model) -> ModelArgs:
    """Raises ConfigError: there is no such family or flavour."""
    if model.hf_folder is not None:
        file = Path(model.hf_folder, HF_CONFIG)
        if not file.is_file():
            raise ConfigError(
                f"model.hf_folder={file.parent} holds no {HF_CONFIG}; it takes the folder of a Hugging Face model"
            )
        args: ModelArgs = read_hf_model(file)[1]
        return args
    flavors = get_train_spec(model.name).flavors
    if model.flavor not in flavors:
        hint = about_unknown_name("model.flavor", model.flavor) or meant_or_known(model.flavor, flavors)
        raise ConfigError(f"model.flavor={model.flavor} is unknown; {hint}")
    return flavors[model.flavor]  # type: ignore[no-any-return]


def read_hf_model(file: Path) -> tuple[TrainSpec, Any]:
    """The family that a config.json names, and the ModelArgs that it describes.

    Raises:
        CheckpointError: there is no such family, or its model lacks what is described.
    """
    config = read_json(file, CheckpointError)
    try:
        if config.get("quantization_config") is not None:
            raise CheckpointError("quantized weights are not supported; get the model in bfloat16 or float32")
        families, model_type = _get_hf_families(), config.get("model_type")
        if not isinstance(model_type, str) or model_type not in families:
            known = " or ".join(map(repr, families))
            raise CheckpointError(f"model_type is {model_type!r}; the families of this package have {known}")
        spec = families[model_type]
        assert spec.hf is not None
        return spec, spec.hf.read(config)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix('config.json: ')}") from error
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error}, which the model needs") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error


def _get_hf_families() -> dict[str, TrainSpec]:
    specs = map(get_train_spec, get_model_names())
    return {spec.hf.model_type: spec for spec in specs if spec.hf is not None}


def find_model(config: JobConfig) -> ModelArgs | None:
    """The shape of the model that the options name; None if experimental.custom_import may yet register it.

    Raises:
        ConfigError: there is no such family or flavour.
    """
    if config.experimental.custom_import and not _is_family_known(config.model):
        return None
    return _get_args(config.model)


def _is_family_known(model: Model) -> bool:
    if model.hf_folder is None:
        return model.name in get_model_names()
    file = Path(model.hf_folder, HF_CONFIG)
    return not file.is_file() or read_json(file, CheckpointError).get("model_type") in _get_hf_families()


def validate_run(
    config: JobConfig,
    *,
    world_size: int,
    num_gpus: int | None = None,
    liger_installed: bool,
    local_world_size: int | None = None,
) -> None:
    """All of config/validate.py's rules, those about the model's shape among them."""
    model, problems = None, []
    try:
        model = find_model(config)
    except ConfigError as error:
        problems.append(str(error))
    if "float8" in config.model.converters and not is_installed("torchao"):
        problems.append('model.converters=float8 needs the package torchao: pip install "torchao>=0.17"')
    validate(
        config,
        world_size=world_size,
        model=model,
        problems=problems,
        num_gpus=num_gpus,
        liger_installed=liger_installed,
        local_world_size=local_world_size,
    )


def check_vocab_size(config: JobConfig, vocab_size: int) -> None:
    """Raise TokenizerError if a tokenizer with so many ids makes some that the model, where it is known, lacks."""
    try:
        model = find_model(config)
    except ConfigError:  # validate_run tells of it
        return
    if model and vocab_size > model.vocab_size:
        raise TokenizerError(
            f"model.tokenizer_path={config.model.tokenizer_path} makes token ids up to {vocab_size - 1}, and"
            f" {config.model.title} has a vocabulary of {model.vocab_size}; use a smaller"
            " tokenizer or a model.flavor with a larger vocabulary"
        )
