"""From a file or a folder on this machine to the source of its kind: which files are read, and as what."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG

from torchtitan.config.errors import DatasetError
from torchtitan.datasets.files import (
    CompressedJsonLinesFiles,
    Files,
    JsonLinesFiles,
    TextFiles,
    count_files,
)
from torchtitan.datasets.parquet import ParquetFiles
from torchtitan.datasets.source import Text
from torchtitan.datasets.tokens import META, TokenFiles
from torchtitan.tools.logging import logger

POINTER_BYTES = 1024
_BESIDE = (".idx", META)
_OF_ROWS = (ParquetFiles, JsonLinesFiles, CompressedJsonLinesFiles, TokenFiles)
KNOWN = (
    f"text ({', '.join(TextFiles.suffixes)}), JSON lines ({', '.join(JsonLinesFiles.suffixes)}, also with .gz or .zst),"
    " Parquet (.parquet) or token ids (.npy, .bin)"
)


def open_path(path: str | Path, text: Text, *, skip_bad_rows: bool = False) -> Files:
    """The source for a file or a folder.

    Raises:
        DatasetError: it does not exist, is empty or of no known kind, or bad in what is checked.
    """
    source = _look(path, text)
    source.bad_rows.skip = skip_bad_rows
    source.check()
    return source


def _look(path: str | Path, text: Text) -> Files:
    if path == "":  # which is the current folder to Path
        raise DatasetError("an empty dataset_path names no file or folder; leave it out for the dataset itself")
    root = Path(path)
    found = _find_files(root)
    kinds = {
        kind: [file for file in found if file.name.lower().endswith(kind.suffixes)] for kind in (*_OF_ROWS, TextFiles)
    }
    if any(file.suffix == ".arrow" for file in found) and any(file.name == "state.json" for file in found):
        splits = sorted({file.parent.name for file in found if file.name == "state.json"})
        is_dict = any(file.name == "dataset_dict.json" for file in found)
        what, index = (f"a DatasetDict of {', '.join(splits)}, ", f'["{splits[-1]}"]') if is_dict else ("", "")
        raise DatasetError(
            f"{root} is {what}written by save_to_disk of Hugging Face datasets, whose Arrow files are not read; write"
            f' Parquet instead: datasets.load_from_disk("{root}"){index}.to_parquet("data.parquet")'
        )
    _leave_out(
        root,
        [file for file in found if not file.name.endswith(_BESIDE) and not any(file in of for of in kinds.values())],
    )
    # A file named by hand may have no suffix at all; in a folder that would be a LICENSE or a Makefile.
    if not root.suffix and found == [root]:
        kinds[TextFiles] = found
    kinds = {kind: files for kind, files in kinds.items() if files}
    if not kinds:
        suffixes = sorted({file.suffix or file.name for file in found})
        raise DatasetError(
            f"{root} holds no file of a known kind, but {', '.join(suffixes[:8])}; dataset_path takes {KNOWN}"
        )
    if len(of_rows := [kind.kind for kind in kinds if kind in _OF_ROWS]) > 1:
        raise DatasetError(f"{root} holds both {' and '.join(of_rows)}; give a folder with one of them")

    # Rows beside text: the larger is the data, the other a README or a package.json.
    kind = max(kinds, key=lambda kind: sum(file.stat().st_size for file in kinds[kind]))
    for other in kinds.keys() - {kind}:
        logger.info(f"{root} is read as {kind.kind}; left out: {count_files(kinds[other])} of {other.kind}")
    files = [file for file in kinds[kind] if file.stat().st_size > 0]
    if not files:
        raise DatasetError(f"{root} is empty: there is no byte in {count_files(kinds[kind])} of {kind.kind}")
    for file in files:
        if file.stat().st_size < POINTER_BYTES and file.read_bytes().startswith(b"version https://git-lfs"):
            raise DatasetError(f"{file} is a pointer of Git LFS, not the data; fetch it: git lfs pull")
    return kind(files, root=root, text=text)


def check_path(path: Path) -> None:
    """Raise DatasetError unless there is something to read there; in an instant, however many files there are."""
    try:
        if path.is_file():
            has_data = path.stat().st_size > 0
        elif path.is_dir():
            has_data = any(file.is_file() and file.stat().st_size > 0 for file in walk_files(path))
        elif path.exists():
            raise DatasetError(
                f"{path} is neither a file nor a folder: data is read more than once, as a pipe or a device cannot be;"
                " write it to a file"
            )
        else:
            place = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise DatasetError(f"{path} does not exist{place}; data are a file or a folder on this machine, of {KNOWN}")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    if not has_data:
        raise DatasetError(f"{path} is empty" + ("; hidden files are passed over" if path.is_dir() else ""))


def _find_files(root: Path) -> list[Path]:
    check_path(root)
    if root.is_file():
        return [root]
    files: dict[tuple[int, int], Path] = {}
    twice: list[Path] = []
    for path in sorted(walk_files(root)):
        try:
            found = path.stat()
        except OSError as error:
            what = "is a link to nothing" if path.is_symlink() else f"cannot be read ({error.strerror})"
            raise DatasetError(f"{path} {what}; mend it or remove it") from None
        if S_ISREG(found.st_mode) and files.setdefault((found.st_dev, found.st_ino), path) != path:
            twice.append(path)
    if twice:
        first = files[twice[0].stat().st_dev, twice[0].stat().st_ino]
        logger.info(f"{root}: left out: {count_files(twice)} that links lead to twice ({twice[0]} is {first})")
    return list(files.values())


def _refuse(error: OSError) -> None:
    raise DatasetError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from None


def _leave_out(root: Path, files: Sequence[Path]) -> None:
    """Say which files are of no known kind."""
    if files and files != [root]:
        kinds = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
        more = ", ..." if len(kinds) > 8 else ""
        told = f"{count_files(files)} of kinds that are not read ({', '.join(kinds[:8])}{more})"
        logger.info(f"{root}: left out: {told}")


def walk_files(root: Path) -> Iterator[Path]:
    """What is in a folder and its subfolders, hidden ones left out. Links are followed, but never round in a loop.

    Raises DatasetError: a folder may not be read.
    """
    visited = set(root.resolve().parents)
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        real_folder = Path(folder).resolve()
        if real_folder in visited:
            subfolders.clear()
            continue
        visited.add(real_folder)
        # Sorted, so that of two ways to a folder it is always the same that gives its files their names.
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        yield from (Path(folder, name) for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
