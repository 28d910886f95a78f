"""Imports point down: each package knows those below it, and no file, not even for its types, one that knows it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. What a package may import stands before it.
FLOORS = (
    "config",
    "tools",
    "protocols",
    "distributed",
    "datasets",
    "components",
    "models",
    "checkpoint",
    "memory",
    "launch",
    "train",
    "cli",
    "__main__",
)
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "torchtitan").rglob("*.py"))
}


def imports(module: str) -> Iterator[str]:
    """The package's modules that a file imports, wherever it does: at the top, in a function, for its types alone."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: imports are absolute"
            for alias in node.names:
                for name in (f"{node.module}.{alias.name}", node.module):
                    if name in FILES:
                        yield name
                        break


def floor(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_each_package_has_its_floor() -> None:
    assert {floor(module) for module in FILES} == {*FLOORS, "torchtitan"}


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_points_up(package: str) -> None:
    below = {*FLOORS[: FLOORS.index(package) + 1], "torchtitan"}
    up = [
        f"{module} -> {other}"
        for module in FILES
        if floor(module) == package
        for other in imports(module)
        if floor(other) not in below
    ]
    assert up == []


def test_no_files_import_each_other() -> None:
    graph = {module: set(imports(module)) - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_too_long_to_be_one_subject() -> None:
    long = {module: n for module, file in FILES.items() if (n := len(file.read_text().splitlines())) > 400}
    assert long == {}
