"""The datasets by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.config.errors import DatasetError
from torchtitan.config.sections import Training, Validation
from torchtitan.datasets import TextFiles, find_validation_dataset, open_dataset, register_dataset, registry


def read_all(source) -> list[str]:
    return [document for shard in range(len(source)) for document in source.read(shard, 0, 1)]


def test_standard_library_is_there_and_held_out_in_part():
    training, validation = open_dataset("python_stdlib"), open_dataset("python_stdlib_validation")
    files = registry.standard_library_files()
    assert {"argparse.py", "ast.py", "typing.py"} <= {file.name for file in files}
    assert not any(part in file.parts for file in files for part in ("test", "tests", "site-packages"))
    num_bytes = sum(file.stat().st_size for file in files)
    documents, held_out = read_all(training), read_all(validation)
    # no file is in both, but modules of encodings/ repeat each other's text
    assert len(set(documents) & set(held_out)) < 0.05 * len(held_out)
    assert sum(len(text.encode()) for text in documents + held_out) == pytest.approx(num_bytes, rel=1e-3)  # BOMs
    assert 0.02 < sum(map(len, held_out)) / sum(map(len, documents)) < 0.2


def test_path_replaces_where_a_dataset_is_read_from(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "local"}) + "\n")
    for name in ("python_stdlib", "c4", "c4_test"):
        assert read_all(open_dataset(name, str(path))) == ["local"]


def test_unknown_name_is_told_with_the_nearest():
    with pytest.raises(DatasetError, match="the dataset 'python_stdlb' is unknown; did you mean python_stdlib"):
        open_dataset("python_stdlb")
    with pytest.raises(
        DatasetError, match="the dataset 'x' is unknown; known are python_stdlib, python_stdlib_validation, c4"
    ):
        open_dataset("x")


def test_c4_test_tells_what_to_do():
    with pytest.raises(
        DatasetError, match=r"c4_test, .* is not part of this package: give a copy .* or use .* python_std"
    ):
        open_dataset("c4_test")


def test_datasets_can_be_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_DATASETS", dict(registry._DATASETS))
    (tmp_path / "a.txt").write_text("mine")
    register_dataset("mine", lambda text: TextFiles([tmp_path / "a.txt"], root=tmp_path), text=lambda row: row["q"])
    assert read_all(open_dataset("mine")) == ["mine"]
    (tmp_path / "a.jsonl").write_text('{"q": "how a row is read holds for a path too"}')
    assert read_all(open_dataset("mine", str(tmp_path / "a.jsonl"))) == ["how a row is read holds for a path too"]
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_dataset("mine", lambda text: TextFiles([], root=Path()))


def test_opening_local_data_imports_nothing_slow(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    code = f"""
import sys
from torchtitan.datasets import open_dataset
list(open_dataset("python_stdlib").read(0)); list(open_dataset("c4", {str(tmp_path)!r}).read(0))
print([name for name in ("torch", "datasets", "pyarrow", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("training", "validation", "expected"),
    [
        ({}, {}, "python_stdlib_validation"),
        ({"dataset": "c4"}, {}, "c4_validation"),
        ({"dataset": "c4"}, {"dataset": "python_stdlib"}, "python_stdlib"),
        ({"dataset": "c4"}, {"dataset_path": "held_out.jsonl"}, "c4"),
    ],
)
def test_validation_follows_the_training_data(training, validation, expected, caplog):
    assert find_validation_dataset(Training(**training), Validation(**validation)) == expected
    assert caplog.messages == []


@pytest.mark.parametrize("training", [{"dataset": "c4_test"}, {"dataset_path": "my.txt"}])
def test_validation_that_cannot_follow_the_training_data_says_so(training, caplog):
    assert find_validation_dataset(Training(**training), Validation()) == "python_stdlib_validation"
    (what,), (message,) = training.values(), caplog.messages
    assert message.startswith(
        f"Validation does not follow the training data, {what}: it reads python_stdlib_validation"
    )
