"""The datasets that `training.dataset` can name, and how code outside this package adds its own."""

import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtitan.config.errors import DatasetError
from torchtitan.config.schema import meant_or_known
from torchtitan.config.sections import Training, Validation
from torchtitan.datasets.files import TextFiles
from torchtitan.datasets.hub import HuggingFaceStream
from torchtitan.datasets.local import open_path
from torchtitan.datasets.source import Source, Text
from torchtitan.tools.logging import logger

VALIDATION_STRIDE = 20
"""Every 20th file of the standard library is held out for validation."""


class StandardLibraryFiles(TextFiles):
    """In documents about as long as a sequence of the debug model: a batch is text of many modules, not of one."""

    piece_bytes = 2**10
    max_parts = 1


@dataclass(frozen=True)
class Dataset:
    """Where documents come from without a dataset_path, and where a row's text is, with one too."""

    open: Callable[[Text], Source]
    text: Text = "text"


def get_dataset(name: str) -> Dataset:
    """Raises DatasetError: an unknown name."""
    if name not in _DATASETS:
        raise DatasetError(f"the dataset {name!r} is unknown; {meant_or_known(name, _DATASETS)}")
    return _DATASETS[name]


def open_dataset(name: str, path: str | None = None, *, skip_bad_rows: bool = False) -> Source:
    """The documents of a registered dataset, read from `path` if there is one.

    Raises:
        DatasetError: an unknown name; data that is missing, empty or in no known format.
    """
    dataset = get_dataset(name)
    source: Source
    if path is None:
        source = dataset.open(dataset.text)
    else:
        source = open_path(path, dataset.text, skip_bad_rows=skip_bad_rows)
    if isinstance(source, HuggingFaceStream):
        source.bad_rows.skip = skip_bad_rows
    return source


def find_validation_dataset(training: Training, validation: Validation) -> str:
    """The dataset that validation reads: the one that is named, or that belongs to training's.

    Logs a warning where neither is there, so that another text is read than that which is learned.
    """
    if validation.dataset is not None:
        return validation.dataset
    if validation.dataset_path is not None:
        return training.dataset  # its rows are read alike
    held_out = f"{training.dataset}_validation"
    if not training.datasets and training.dataset_path is None and held_out in _DATASETS:
        return held_out
    what = training.dataset_path or ", ".join(training.datasets) or training.dataset
    logger.warning(
        f"Validation does not follow the training data, {what}: it reads python_stdlib_validation, Python's standard"
        " library. Name what is held out with validation.dataset_path, or validation.dataset"
    )
    return "python_stdlib_validation"


def register_dataset(name: str, open: Callable[[Text], Source], *, text: Text = "text") -> None:
    """Add a dataset, for instance in the module that `experimental.custom_import` names.

    Args:
        name: that of training's with _validation behind it is what a validation reads unless it is told otherwise.
        open: called with `text` when the dataset is used; gives a Source such as HuggingFaceStream or TextFiles.
        text: the field of a row that holds its text, or a function from the row to it.
    """
    if name in _DATASETS:
        raise ValueError(f"dataset {name!r} is registered already")
    _DATASETS[name] = Dataset(open, text)


def get_dataset_names() -> list[str]:
    """The names that are registered by now."""
    return list(_DATASETS)


def standard_library_files() -> list[Path]:
    """The running Python's standard library, sorted; without its tests and what was installed into it."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(file for file in files if file.stat().st_size > 0)


def _open_standard_library(*, validation: bool) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    held_out = VALIDATION_STRIDE - 1
    files = [f for i, f in enumerate(standard_library_files()) if (i % VALIDATION_STRIDE == held_out) == validation]
    if not files:
        raise DatasetError(f"this Python has no source of its standard library in {root}; give a dataset_path")
    return StandardLibraryFiles(files, root=root)


def _open_c4_test(text: Text) -> Source:
    raise DatasetError(
        "c4_test, a small sample of C4, is not part of this package: give a copy of it (a JSON lines file) as"
        " dataset_path, or use the dataset python_stdlib, which every machine has"
    )


# Filled by register_dataset, while modules are imported.
_DATASETS: dict[str, Dataset] = {
    "python_stdlib": Dataset(lambda _: _open_standard_library(validation=False)),
    "python_stdlib_validation": Dataset(lambda _: _open_standard_library(validation=True)),
    "c4": Dataset(lambda text: HuggingFaceStream.of_hub("allenai/c4", "en", split="train", text=text)),
    "c4_validation": Dataset(lambda text: HuggingFaceStream.of_hub("allenai/c4", "en", split="validation", text=text)),
    "c4_test": Dataset(_open_c4_test),
}
