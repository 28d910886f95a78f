"""A model's folder as Hugging Face transformers leaves it: which weights lie in which file, and whether they are ours.

Imports no torch, so that a folder is checked before anything starts; checkpoint/hugging_face.py reads the weights.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors

from torchtitan.config.errors import CheckpointError
from torchtitan.protocols.train_spec import HF_CONFIG, read_hf_model
from torchtitan.tools.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LENGTH = "max_position_embeddings"


def holds_hf_weights(path: Path) -> bool:
    return (path / INDEX).exists() or (path / SINGLE_FILE).exists()


def read_weight_files(path: Path) -> dict[str, str]:
    """The file of each weight, each of which is there.

    Raises:
        CheckpointError: the folder holds no weights, or a file is missing or damaged.
    """
    if (path / INDEX).exists():
        files = read_json(path / INDEX, CheckpointError).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(f"{path / INDEX} is damaged: expected weight_map, the file name of each weight")
        if absent := sorted(file for file in {*files.values()} if not (path / file).is_file()):
            raise CheckpointError(f"{path} lacks {', '.join(absent)}, which {INDEX} names")
        return files
    try:
        with safetensors.safe_open(path / SINGLE_FILE, framework="np") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path / SINGLE_FILE} is damaged ({error})") from error


def check_weight_names(path: Path, found: Iterable[str], *, needed: Iterable[str], known: Iterable[str]) -> None:
    """Raise CheckpointError unless all that is needed is there, and nothing that the model does not have."""
    # old checkpoints hold the rotary frequencies, which follow from the config
    unknown = {name for name in {*found} - {*known} if not name.endswith("rotary_emb.inv_freq")}
    missing = {*needed} - {*found}
    for names, problem in ((missing, "lacks {}"), (unknown, "holds {}, which has no place in this model")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path} {problem.format(min(names) + more)}")


def check_hf_config(path: Path, ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the folder's config.json, if it has one, describes another model than `ours` does."""
    file = path / HF_CONFIG
    if not file.exists():
        return  # the shapes of the weights still have to fit
    spec, args = read_hf_model(file)
    assert spec.hf is not None
    theirs = spec.hf.write(args)
    for key, value in ours.items():
        if theirs.get(key) != value and key != LENGTH:  # which weights do not depend on
            raise CheckpointError(f"{file}: {key} is {theirs.get(key)!r}, and {value!r} in this model")
