"""A trained model from its path: which model it is, its tokenizer, its weights. For commands, not for training.

The path is a checkpoint of ours or a folder of Hugging Face transformers. Which model it holds says the config.json in
it, else its config.toml, else, of a checkpoint from before they held one, the run's, two folders up.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.folder import OPTIONS, CheckpointFolder
from torchtitan.checkpoint.hugging_face import HuggingFaceFormat
from torchtitan.checkpoint.storage import check_weights, load_alone, read_metadata
from torchtitan.checkpoint.upstream import ROPE
from torchtitan.components.tokenizer import Tokenizer, build_tokenizer
from torchtitan.config import ConfigManager
from torchtitan.config.errors import CheckpointError, ConfigError, TokenizerError
from torchtitan.config.schema import either
from torchtitan.distributed.tensor_parallel import apply_tp
from torchtitan.protocols.custom_import import maybe_import_custom
from torchtitan.protocols.hf_folder import holds_hf_weights
from torchtitan.protocols.model import Decoder, StateDictAdapter
from torchtitan.protocols.train_spec import ModelArgs, ModelCode, find_family, get_run_args, read_hf_model
from torchtitan.tools.files import read_json


@dataclass(frozen=True)
class PretrainedModel:
    """What find_pretrained found. Nothing of the weights has been read yet."""

    path: Path
    in_hf: bool
    args: ModelArgs
    code: ModelCode
    tokenizer_path: Path
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end a text, beside the tokenizer's own."""

    def build_adapter(self) -> StateDictAdapter:
        """Raises CheckpointError where the model family has none."""
        adapter = self.code.state_dict_adapter(self.args)
        if adapter is None:
            raise CheckpointError(f"the model at {self.path} is of a family that has no Hugging Face format")
        return adapter

    def build_tokenizer(self) -> Tokenizer:
        """Raises TokenizerError if it is missing, broken or another model's."""
        try:
            tokenizer = build_tokenizer(self.tokenizer_path)
        except TokenizerError as error:
            raise TokenizerError(f"{error}; name another with --tokenizer") from error
        if tokenizer.vocab_size > self.args.vocab_size:
            raise TokenizerError(
                f"{self.tokenizer_path} has {tokenizer.vocab_size} ids and the model at {self.path} only"
                f" {self.args.vocab_size}; name the tokenizer that it was trained with by --tokenizer"
            )
        return tokenizer

    def build_on_meta(self) -> Decoder:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return self.code.model_cls(self.args)

    def build_model(self, *, device: torch.device, dtype: torch.dtype, tp_mesh: DeviceMesh | None = None) -> Decoder:
        """The model with its weights, for evaluation; with a mesh this rank's part of it, divided by tensor parallel.

        Raises:
            ConfigError: the model cannot be divided by that many ranks.
            CheckpointError: a file is missing or damaged, or holds another model.
        """
        model = self.build_on_meta().to(dtype)
        if tp_mesh is not None:
            check_divisible(self.args, tp_mesh.size())
            apply_tp(model, tp_mesh, self.code.tensor_parallel_plan, loss_parallel=False)
        model.to_empty(device=device)
        model.init_buffers(device)  # in float32, whatever the dtype of the weights
        if self.in_hf:
            HuggingFaceFormat(self.build_adapter()).load(self.path, model.state_dict())
        else:
            load_alone(self.path, model.state_dict(), self.check_weights())
        return model.eval()

    def check_weights(self) -> Metadata:
        """What a checkpoint of ours holds; CheckpointError if its files are cut, or another model's."""
        metadata, weights = read_metadata(self.path), self.build_on_meta().state_dict()
        check_weights(self.path, metadata, {name: tuple(weight.shape) for name, weight in weights.items()})
        return metadata


def find_pretrained(
    path: Path, *, config: Path | None = None, tokenizer: Path | None = None, custom_import: str = ""
) -> PretrainedModel:
    """Find out which model lies at `path`.

    Args:
        config: a run's config.toml or a config.json to go by instead of those that are looked for.
        custom_import: the module that the run's experimental.custom_import may name. To import one runs its code, so
            what a config.toml of unknown origin says does not suffice.
        tokenizer: a tokenizer.json, or a folder with one, to take instead of the model's own.

    Raises:
        ConfigError: there is no model, or it is not known which.
    """
    in_hf = holds_hf_weights(path)
    if not in_hf and not (path / ".metadata").is_file():
        raise CheckpointError(_about_no_model(path))
    if config is not None and not config.is_file():
        raise ConfigError(f"{config} is no file; expected the config.toml of a run, or a config.json")
    config = config or _find_config(path)
    if config.suffix == ".json":
        found = _read_hf_config(path, config, in_hf=in_hf)
    else:
        found = _read_run_config(path, config, in_hf=in_hf, custom_import=custom_import)
    if tokenizer is not None:
        return replace(found, tokenizer_path=tokenizer)
    if (path / "tokenizer.json").exists():
        return replace(found, tokenizer_path=path)
    return found


def check_divisible(args: ModelArgs, num_ranks: int) -> None:
    """Raise ConfigError unless each of the ranks gets as many heads of keys and values, and of queries, and as much of
    the feed-forward layer.
    """
    sizes = {"n_kv_heads": args.n_kv_heads, "n_heads": args.n_heads}
    if hasattr(args, "ffn_hidden_dim"):  # not every family has one
        sizes["ffn_hidden_dim"] = args.ffn_hidden_dim
    shared = math.gcd(*sizes.values())
    if shared % num_ranks:
        raise ConfigError(
            f"{num_ranks} processes cannot share {' and '.join(f'{k}={n}' for k, n in sizes.items() if n % num_ranks)}"
            f" equally; start {either(n for n in range(1, shared + 1) if shared % n == 0)}"
        )


def _find_config(path: Path) -> Path:
    beside = path / "config.json"
    of_run = path.absolute().parent.parent / "config.toml"
    # the run's own may have been written anew by a later start, of checkpoints from before they held the options
    for config in (beside, path / OPTIONS, of_run):
        if config.is_file():
            return config
    raise CheckpointError(
        f"which model is at {path}? It holds no {beside.name} or {OPTIONS}, and there is no {of_run} of a run;"
        f" name the run's config.toml with --config ({ROPE})"
    )


def _read_hf_config(path: Path, file: Path, *, in_hf: bool) -> PretrainedModel:
    spec, args = read_hf_model(file)
    generation = file.with_name("generation_config.json")
    eos = read_json(generation, CheckpointError).get("eos_token_id") if generation.is_file() else None
    eos = read_json(file, CheckpointError).get("eos_token_id") if eos is None else eos
    return PretrainedModel(
        path,
        in_hf,
        args,
        spec.load(),
        tokenizer_path=_get_tokenizer_beside(file.parent),
        eos_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def _get_tokenizer_beside(path: Path) -> Path:
    """That of the folder; of a run's checkpoint, which holds none, the run's."""
    options = path / OPTIONS
    if (path / "tokenizer.json").exists() or not options.is_file():
        return path
    return Path(ConfigManager().parse_args(["--job.config_file", str(options)], warn=False).model.tokenizer_path)


def _read_run_config(path: Path, file: Path, *, in_hf: bool, custom_import: str) -> PretrainedModel:
    config = ConfigManager().parse_args(["--job.config_file", str(file)], warn=False)
    if config.experimental.custom_import not in ("", custom_import):
        raise ConfigError(
            f"{file} asks for the import of {config.experimental.custom_import}, which runs code; if you trust it, add"
            f" --custom_import {config.experimental.custom_import}"
        )
    maybe_import_custom(config.experimental.custom_import)
    spec = find_family(config.model)
    if config.model.hf_folder is None and config.model.flavor not in spec.flavors:
        raise ConfigError(f"{file}: model.flavor={config.model.flavor!r} is none of {', '.join(spec.flavors)}")
    args = get_run_args(config.model, max_seq_len=config.training.seq_len)
    return PretrainedModel(path, in_hf, args, spec.load(), tokenizer_path=Path(config.model.tokenizer_path))


def _about_no_model(path: Path) -> str:
    if not path.is_dir():
        return f"there is no checkpoint at {path}"
    if ".incomplete-" in path.name:
        return f"{path} is not whole: its run was killed while saving it"
    for folder in (path, path / "checkpoint"):
        if steps := CheckpointFolder(folder, run="").steps():
            there_are = f"{folder} holds checkpoints of steps {', '.join(map(str, steps))}"
            return f"{there_are}; take one of them, such as {folder / f'step-{steps[-1]}'}"
    return (
        f"{path} holds neither a checkpoint of ours (.metadata and .distcp files) nor a model of Hugging Face's"
        " (config.json and .safetensors files)"
    )
