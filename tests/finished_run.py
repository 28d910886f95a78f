"""What a finished run leaves behind, and the scripts that use it, for tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchtitan.checkpoint.storage import find_weights, load_alone, read_metadata
from torchtitan.checkpoint.write import save_alone
from torchtitan.config import JobConfig
from torchtitan.config.manager import write_resolved
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3 import llama3_flavors

REPO = Path(__file__).parents[1]
TOKENIZER = REPO / "tests/assets/tokenizer"
CONTEXT = 64


def save_run(dump_folder: Path, *, seed: int = 1, **model: Any) -> Path:
    """The checkpoint of weights of a run of the debug model; `model` is options of [model]."""
    config = JobConfig()
    config.training.seq_len = CONTEXT
    config.model.tokenizer_path = str(TOKENIZER)
    for name, value in model.items():
        setattr(config.model, name, value)
    write_resolved(config, dump_folder / "config.toml")
    transformer = Transformer(llama3_flavors[config.model.flavor])
    init_parameters(transformer, seed, "cpu")
    path = dump_folder / "checkpoint/step-10"
    save_alone(path, dict(transformer.state_dict()))
    return path


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Those of a checkpoint of ours, in their dtypes."""
    entries = find_weights(read_metadata(path))
    weights = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_alone(path, weights)
    return weights


def load_script(name: str) -> ModuleType:
    if str(REPO / "scripts") not in sys.path:  # as for a script that Python runs
        sys.path.append(str(REPO / "scripts"))
    spec = importlib.util.spec_from_file_location(name, REPO / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
