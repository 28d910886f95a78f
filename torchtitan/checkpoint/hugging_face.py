"""Weights as Hugging Face transformers keeps them: safetensors, config.json, the tokenizer's files.

Both ways go through whole tensors, a few at a time, in one process: names and layouts are the model's
StateDictAdapter's. A round trip changes no bit.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.storage import find_weights, load_alone, read_metadata, reason
from torchtitan.checkpoint.write import save_alone
from torchtitan.config.errors import CheckpointError, ConfigError
from torchtitan.config.schema import either
from torchtitan.distributed.init_weights import local_shard
from torchtitan.protocols.model import StateDictAdapter
from torchtitan.protocols.train_spec import ModelCode, find_hf_family
from torchtitan.tools.logging import logger

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BYTES_PER_FILE = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class HuggingFaceFormat:
    def __init__(
        self,
        adapter: StateDictAdapter,
        *,
        tokenizer_path: Path | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ):
        self._adapter = adapter
        self._tokenizer_path = tokenizer_path
        self._token_ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}

    @staticmethod
    def is_at(path: Path) -> bool:
        return (path / INDEX).exists() or (path / SINGLE_FILE).exists()

    def rewrite(self, folder: CheckpointFolder, step: int) -> None:
        """Put the weights of a step's checkpoint in its place, in this format."""
        path, incomplete = folder.of(step), folder.incomplete(step)
        try:
            self.convert(path, incomplete)
            folder.publish(incomplete, step)
        except Exception as error:
            folder.remove([incomplete])
            raise CheckpointError(
                f"{path} could not be rewritten as Hugging Face safetensors ({reason(error)});"
                " it holds the weights in torch.distributed.checkpoint's format"
            ) from error
        logger.info(f"Rewrote {path} as Hugging Face safetensors")

    def convert(self, source: Path, target: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights of our checkpoint at `source` to a new folder, which transformers loads.

        Their dtype is kept where none is given.
        """
        metadata = read_metadata(source)
        entries = find_weights(metadata)
        dtypes = {name: dtype or entry.properties.dtype for name, entry in entries.items()}
        num_bytes = {name: entry.size.numel() * dtypes[name].itemsize for name, entry in entries.items()}
        files = _divide(num_bytes)
        target.mkdir(parents=True)
        weight_map = {}
        for number, names in enumerate(files, start=1):
            weights = {name: torch.empty(entries[name].size, dtype=dtypes[name]) for name in names}
            load_alone(source, weights, metadata)
            converted = {name: weight.contiguous() for name, weight in self._adapter.to_hf(weights).items()}
            file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            safetensors.torch.save_file(converted, target / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(converted, file))
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
            _write_json(target / INDEX, index)
        config = {**self._adapter.to_hf_config(), **self._token_ids, **_read_token_ids(source)}
        config["torch_dtype"] = str(next(iter(dtypes.values()))).removeprefix("torch.")
        _write_json(target / "config.json", config)
        _copy_files(("generation_config.json",), source, target)
        if self._tokenizer_path is not None and self._tokenizer_path.is_dir():
            _copy_files(TOKENIZER_FILES, self._tokenizer_path, target)
        elif self._tokenizer_path is not None:  # a file of any name
            _copy_files(TOKENIZER_FILES, self._tokenizer_path.parent, target)
            shutil.copyfile(self._tokenizer_path, target / "tokenizer.json")

    def convert_back(self, source: Path, target: Path, shapes: Mapping[str, torch.Size]) -> None:
        """Write the weights of the folder at `source`, in their dtypes, to a new checkpoint of ours.

        config.json and the tokenizer's files come along, so that the checkpoint says which model it holds.
        All weights are in memory at once. Raises as load does.
        """
        save_alone(target, dict(self._read(source, shapes)))
        _copy_files(("config.json", "generation_config.json", *TOKENIZER_FILES), source, target)

    def load(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Fill `weights`, a model's or a pipeline stage's, each rank its own shards of them.

        Raises:
            CheckpointError: a file is missing or damaged, or holds another model.
        """
        for name, whole in self._read(path, {name: weight.shape for name, weight in weights.items()}):
            _fill(weights[name], whole)

    def _read(self, path: Path, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under our names, as they lie in the files; raises as load does."""
        self.check_config(path)
        files = _read_index(path)
        self._check_names(path, files, [self._adapter.hf_names[name] for name in shapes])
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(hf_name: str) -> Tensor:
                file = path / files[hf_name]
                with _describing(file):
                    if file.name not in opened:
                        opened[file.name] = stack.enter_context(safetensors.safe_open(file, framework="pt"))
                    whole = opened[file.name].get_tensor(hf_name)
                if whole.dtype not in DTYPES:
                    raise CheckpointError(f"{file}: {hf_name} is {whole.dtype}; expected {either(DTYPES)}")
                return whole

            for copy, hf_name in self._adapter.hf_copies.items():
                if copy in files and not torch.equal(read(copy), read(hf_name)):
                    raise CheckpointError(f"{path}: {copy} is not {hf_name}, to which config.json ties it")
            for name, shape in shapes.items():
                hf_name = self._adapter.hf_names[name]
                (whole,) = self._adapter.from_hf({hf_name: read(hf_name)}).values()
                if whole.shape != shape:
                    raise CheckpointError(
                        f"{path / files[hf_name]}: {hf_name} is {tuple(whole.shape)}, and {tuple(shape)} in this model"
                    )
                yield name, whole

    def _check_names(self, path: Path, found: Iterable[str], needed: Iterable[str]) -> None:
        """Raise CheckpointError unless all that is needed is there, and nothing that the model does not have."""
        if missing := sorted({*needed} - {*found}):
            raise CheckpointError(f"{path} lacks {', '.join(missing)}")
        known = {*self._adapter.hf_names.values(), *self._adapter.hf_copies}
        # old checkpoints hold the rotary frequencies, which follow from the config
        unknown = sorted(name for name in {*found} - known if not name.endswith("rotary_emb.inv_freq"))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(f"{path} holds {unknown[0]}{more}, which has no place in this model")

    def check_config(self, path: Path) -> None:
        """Raise CheckpointError where the folder's config.json, if it has one, describes another model."""
        file = path / "config.json"
        if not file.exists():
            return  # the shapes of the weights still have to fit
        code, args = read_model(file)
        adapter = code.state_dict_adapter(args)
        theirs = adapter.to_hf_config() if adapter is not None else {}
        for key, ours in self._adapter.to_hf_config().items():
            if theirs.get(key) != ours and key != "max_position_embeddings":  # which weights do not depend on
                raise CheckpointError(f"{file}: {key} is {theirs.get(key)!r}, and {ours!r} in this model")


def read_model(file: Path) -> tuple[ModelCode, Any]:
    """The family that a config.json names, and the ModelArgs that it describes.

    Raises:
        CheckpointError: there is no such family, or its model lacks what is described.
    """
    config = read_json(file)
    try:
        if "quantization_config" in config:
            raise CheckpointError("quantized weights are not supported; get the model in bfloat16 or float32")
        spec = find_hf_family(config.get("model_type"))
        assert spec.args_from_hf_config is not None, "a family with a hf_model_type reads its config.json"
        return spec.load(), spec.args_from_hf_config(config)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix('config.json: ')}") from error
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error}, which the model needs") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a .json file; raises CheckpointError where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} cannot be read: expected a JSON object, got {json.dumps(content)[:40]}")
    return content


def _divide(num_bytes: Mapping[str, int]) -> list[list[str]]:
    """Names in files of at most BYTES_PER_FILE, or of one tensor."""
    files: list[list[str]] = [[]]
    room = BYTES_PER_FILE
    for name, size in num_bytes.items():
        if size > room and files[-1]:
            files.append([])
            room = BYTES_PER_FILE
        files[-1].append(name)
        room -= size
    return files


def _read_index(path: Path) -> dict[str, str]:
    """The file of each weight."""
    if (path / INDEX).exists():
        files = read_json(path / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(f"{path / INDEX} is damaged: expected weight_map, the file name of each weight")
        return files
    try:
        with safetensors.safe_open(path / SINGLE_FILE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path / SINGLE_FILE} is damaged ({error})") from error


@contextmanager
def _describing(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error})") from error


@torch.no_grad()
def _fill(weight: Tensor, whole: Tensor) -> None:
    if isinstance(weight, DTensor):
        weight.to_local().copy_(local_shard(whole, weight))
    else:
        weight.copy_(whole)


def _read_token_ids(source: Path) -> dict[str, Any]:
    """Those that the config.json of a checkpoint from Hugging Face's format names: a model may end at several."""
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    return {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}


def _copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Those of the files that are there."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _write_json(file: Path, content: Mapping[str, Any] | Iterable[Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["HuggingFaceFormat", "read_json", "read_model"]
