"""Does this interpreter have what pyproject.toml asks for? Only looks at metadata and imports no package: it is fast.

python scripts/check_env.py [extra ...]           prints sys.executable, or what is missing and exits with 1
python scripts/check_env.py --list [extra ...]    prints the requirements, one a line, as pip takes them
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The package's dependencies and those of the extras, as written in pyproject.toml."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]


def unmet(requirement: str) -> str | None:
    """Why `name>=version` does not hold in this interpreter, or None if it does."""
    name, minimum = requirement.split(">=")
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    if release(installed) < release(minimum):
        return f"{name} {installed} is older than {minimum}"
    return None


def release(version: str) -> list[int]:
    """1.2.3rc1+cpu -> [1, 2, 3]"""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match.group().split(".")] if match else []


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--list"]:
        print("\n".join(requirements(arguments[1:])))
        return 0
    problems = [problem for r in requirements(arguments) if (problem := unmet(r))]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    print(sys.executable)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
