"""The user's module is found in the folder that the run starts from, and told from one that fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.protocols.custom_import import check_custom_import, maybe_import_custom


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, which is not on the path: so it is for a script and for an installed command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return tmp_path


def test_a_module_of_the_current_folder_is_imported(folder: Path) -> None:
    (folder / "my_models.py").write_text("x = 1")
    check_custom_import("my_models")
    assert "my_models" not in sys.modules
    maybe_import_custom("my_models")
    assert sys.modules["my_models"].x == 1


def test_no_name_is_no_module(folder: Path) -> None:
    check_custom_import("")
    maybe_import_custom("")


@pytest.mark.parametrize("name", ["no_such_module", "my_models.py", "my_models.part", "./my_models.py", ".my_models"])
def test_what_is_not_there_is_named(folder: Path, name: str) -> None:
    (folder / "my_models.py").touch()
    with pytest.raises(ConfigError) as caught:
        maybe_import_custom(name)
    assert str(caught.value) == (
        f"experimental.custom_import={name}: there is no such module, neither in {folder} nor installed;"
        " give the name that `import` takes, such as my_models for my_models.py"
    )


def test_what_a_module_lacks_is_another_matter(folder: Path) -> None:
    (folder / "my_models.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        maybe_import_custom("my_models")


def test_the_check_imports_nothing(folder: Path) -> None:
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").write_text("import torch")
    code = (
        "import sys; from torchtitan.protocols.custom_import import check_custom_import;"
        "check_custom_import('my_package.models'); assert not {'torch', 'my_package'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[3])})
