"""Weights as Hugging Face transformers keeps them: safetensors, config.json, the tokenizer's files.

Names and the order of rows are the model's StateDictAdapter's. Each rank reads the rows and columns of its own shards,
and writes whole files, one at a time, that others then wait for: never for the whole model. Both ways no bit changes.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from torchtitan.checkpoint.folder import CheckpointFolder
from torchtitan.checkpoint.plan import get_box
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import (
    check_files,
    check_sizes,
    find_weights,
    load_alone,
    parse_metadata,
    read_metadata_file,
    reason,
    sync,
)
from torchtitan.checkpoint.write import save_alone
from torchtitan.config.errors import CheckpointError
from torchtitan.config.schema import either
from torchtitan.distributed.utils import local_tensor
from torchtitan.protocols.hf_folder import (
    INDEX,
    LENGTH,
    SINGLE_FILE,
    check_hf_config,
    check_weight_names,
    read_weight_files,
)
from torchtitan.protocols.model import StateDictAdapter
from torchtitan.tools.files import read_json
from torchtitan.tools.logging import logger
from torchtitan.tools.terminal import Progress

BYTES_PER_FILE = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
KEPT_KEYS = ("bos_token_id", "eos_token_id", LENGTH)
DESCRIPTION = ("config.json", "generation_config.json")
DTYPES = ("F64", "F32", "F16", "BF16")

Box = tuple[Sequence[int], tuple[int, ...], tuple[int, ...]]
"""A weight's shape, and where a part of it begins and how large it is."""


@dataclass
class HuggingFaceFormat:
    adapter: StateDictAdapter
    tokenizer_path: Path | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    _description: dict[str, bytes] = field(default_factory=dict)

    def rewrite(self, folder: CheckpointFolder, step: int, ranks: Ranks) -> None:
        """Put the weights of a step's checkpoint in its place, in this format: a collective call."""
        path, incomplete = folder.of(step), folder.incomplete(step)
        try:
            self.convert(path, incomplete, ranks=ranks)
            ranks.ask_first(partial(folder.publish, incomplete, step))
        except CheckpointError as error:
            if ranks.is_first:
                folder.remove([incomplete])
            raise CheckpointError(
                f"{path} could not be rewritten as Hugging Face safetensors ({error});"
                " it holds the weights in torch.distributed.checkpoint's format"
            ) from error
        if ranks.is_first:
            logger.info(f"Rewrote {path} as Hugging Face safetensors")

    def convert(
        self, source: Path, target: Path, *, dtype: torch.dtype | None = None, ranks: Ranks | None = None
    ) -> None:
        """Write the weights of our checkpoint at `source` to a new folder, which transformers loads.

        Their dtype is kept where none is given. A collective call of `ranks`: each in its turn writes a file of
        BYTES_PER_FILE, and that is the longest that one waits for another.
        """
        ranks = ranks or Ranks(alone=True)
        metadata = parse_metadata(source, ranks.ask_first(partial(read_metadata_file, source)))
        entries = find_weights(metadata)
        dtypes = {name: dtype or entry.properties.dtype for name, entry in entries.items()}
        num_bytes = {name: entry.size.numel() * dtypes[name].itemsize for name, entry in entries.items()}
        files = _divide(num_bytes)
        titles = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        if len(files) == 1:
            titles = [SINGLE_FILE]
        done = 0

        def begin() -> None:
            check_files(source, metadata)
            target.mkdir(parents=True)

        def write(number: int) -> None:
            if number < len(files):
                weights = {name: torch.empty(entries[name].size, dtype=dtypes[name]) for name in files[number]}
                load_alone(source, weights, metadata, on_read=count)  # which opens each file of the source once
                converted = {name: weight.contiguous() for name, weight in self.adapter.to_hf(weights).items()}
                try:
                    safetensors.torch.save_file(converted, target / titles[number], metadata={"format": "pt"})
                    sync(target / titles[number])
                except Exception as error:  # safetensors has its own for a full disk
                    raise CheckpointError(f"{target / titles[number]} was not written: {reason(error)}") from error

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if ranks.is_first:
                progress.show(done)

        def finish() -> None:
            check_sizes(target, dict.fromkeys(titles, 1))
            if len(files) > 1:
                held = zip(titles, files, strict=True)
                places = {self.adapter.hf_names[name]: title for title, of_file in held for name in of_file}
                _write_json(target / INDEX, {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": places})
            self._write_config(source, target, next(iter(dtypes.values())))

        ranks.ask_first(begin)
        own = [num_bytes[name] for names in files[ranks.rank :: ranks.size] for name in names]
        with Progress(f"Converting {source}", sum(own)) as progress:
            for first in range(0, len(files), ranks.size):
                ranks.together(partial(write, first + ranks.rank))
        ranks.ask_first(finish)

    def _write_config(self, source: Path, target: Path, dtype: torch.dtype) -> None:
        """What lies beside the weights."""
        own, kept = self.adapter.to_hf_config(), _read_kept(source)
        config = {**own, "bos_token_id": self.bos_id, "eos_token_id": self.eos_id, **kept}
        if LENGTH in kept:
            config[LENGTH] = max(own[LENGTH], kept[LENGTH])
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(target / "config.json", config)
        _copy_files(("generation_config.json",), source, target)
        if self.tokenizer_path is not None and self.tokenizer_path.is_dir():
            _copy_files(TOKENIZER_FILES, self.tokenizer_path, target)
        elif self.tokenizer_path is not None:  # a file of any name
            _copy_files(TOKENIZER_FILES, self.tokenizer_path.parent, target)
            shutil.copyfile(self.tokenizer_path, target / "tokenizer.json")

    def convert_back(self, source: Path, target: Path, shapes: Mapping[str, torch.Size]) -> None:
        """Write the weights of the folder at `source`, in their dtypes, to a new checkpoint of ours.

        config.json and the tokenizer's files come along, so that the checkpoint says which model it holds.
        All weights are in memory at once. Raises as load does.
        """
        boxes = {name: (shape, (0,) * len(shape), tuple(shape)) for name, shape in shapes.items()}
        num_values = sum(shape.numel() for shape in shapes.values())
        weights: dict[str, Tensor] = {}
        with Progress(f"Reading {source}", num_values) as progress:
            for name, weight in self._read(source, boxes):
                weights[name] = weight
                progress.show(sum(map(Tensor.numel, weights.values())))
        try:
            save_alone(target, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{target} was not written: {error}") from error
        _copy_files(("config.json", "generation_config.json", *TOKENIZER_FILES), source, target)

    @torch.no_grad()
    def load(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Fill `weights`, a model's or a pipeline stage's, each rank its own shards of them, and read no others.

        Raises:
            CheckpointError: a file is missing or damaged, or holds another model.
        """
        for name, part in self._read(path, {name: (w.shape, *get_box(w)) for name, w in weights.items()}):
            local_tensor(weights[name]).copy_(part)

    def _read(self, path: Path, boxes: Mapping[str, Box]) -> Iterator[tuple[str, Tensor]]:
        """Parts of weights under our names, in the dtype that they have in the files; raises as load does."""
        self.check_config(path)
        files, names = read_weight_files(path), self.adapter.hf_names
        known = [*names.values(), *self.adapter.hf_copies]
        check_weight_names(path, files, needed=[names[name] for name in boxes], known=known)
        copies = {hf_name: copy for copy, hf_name in self.adapter.hf_copies.items() if copy in files}
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(hf_name: str, box: Box) -> Tensor:
                file = path / files[hf_name]
                with _describing(file):
                    if file.name not in opened:
                        opened[file.name] = stack.enter_context(safetensors.safe_open(file, framework="pt"))
                    whole = opened[file.name].get_slice(hf_name)
                    if whole.get_dtype() not in DTYPES:
                        raise CheckpointError(f"{file}: {hf_name} is {whole.get_dtype()}; expected {either(DTYPES)}")
                    if tuple(whole.get_shape()) != tuple(box[0]):
                        shape, expected = tuple(whole.get_shape()), tuple(box[0])
                        raise CheckpointError(f"{file}: {hf_name} is {shape}, and {expected} in this model")
                    return _read_rows(whole, rows[box[1][0] : box[1][0] + box[2][0]], box)

            for name, box in boxes.items():
                hf_name = names[name]
                # where each of our rows lies in theirs
                (rows,) = self.adapter.from_hf({hf_name: torch.arange(box[0][0])}).values()
                part = read(hf_name, box)
                if hf_name in copies and not torch.equal(read(copies[hf_name], box), part):
                    raise CheckpointError(f"{path}: {copies[hf_name]} is not {hf_name}, to which config.json ties it")
                yield name, part

    def check_config(self, path: Path) -> None:
        """Raise CheckpointError where the folder's config.json, if it has one, describes another model.

        What it says beside the shape is from now on said of the checkpoints of this run: see note_description.
        """
        check_hf_config(path, self.adapter.to_hf_config())
        self._description = {name: (path / name).read_bytes() for name in DESCRIPTION if (path / name).is_file()}

    def note_description(self, path: Path) -> None:
        """Beside a checkpoint of ours, what the folder that check_config saw says of the model: exports keep it."""
        for name, content in self._description.items():
            (path / name).write_bytes(content)


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


@contextmanager
def _describing(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error})") from error


def _read_rows(whole: Any, rows: Tensor, box: Box) -> Tensor:
    """Of a tensor in a file the given rows, in their order; of those the box's columns. Nothing else is read."""
    _, offsets, sizes = box
    columns = tuple(slice(begin, begin + size) for begin, size in zip(offsets[1:], sizes[1:], strict=True))
    found, order = rows.sort()
    ends = [*((found.diff() != 1).nonzero().flatten() + 1).tolist(), len(found)]
    runs = [found[begin:end] for begin, end in zip([0, *ends], ends, strict=False) if begin < end]
    parts = [whole[(slice(int(run[0]), int(run[-1]) + 1), *columns)] for run in runs]
    if not parts:
        return whole[(slice(0, 0), *columns)]
    part = torch.cat(parts) if len(parts) > 1 else parts[0]
    return part if bool((order.diff() == 1).all()) else part[order.argsort()]


def _read_kept(source: Path) -> dict[str, Any]:
    """What an export keeps of the config.json beside a checkpoint that began from Hugging Face's format.

    A model may end a text at several tokens, and be made for longer texts than it was trained on here.
    """
    file = source / "config.json"
    config = read_json(file, CheckpointError) if file.is_file() else {}
    return {key: config[key] for key in KEPT_KEYS if key in config}


def _copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Those of the files that are there."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _write_json(file: Path, content: Mapping[str, Any] | Iterable[Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
