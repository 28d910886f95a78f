"""The user's module that experimental.custom_import names: whether it is there, and its import."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

from torchtitan.config.errors import ConfigError


def check_custom_import(name: str) -> None:
    """Raise ConfigError if there is no such module. Imports nothing, so of `a.b` only `a` is looked for."""
    # The folder that the run starts from: `python -m` has it on the path, a script and an installed command have not.
    if name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    package = name.partition(".")[0]
    if name and not (package and find_spec(package)):
        raise _missing(name)


def maybe_import_custom(name: str) -> None:
    """Import the module, which registers models and datasets; "" is none. Raises ConfigError if it is not there."""
    check_custom_import(name)
    try:
        if name:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and what it imports is not: the traceback says where
        raise _missing(name) from None


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"experimental.custom_import={name}: there is no such module, neither in {Path.cwd()} nor installed;"
        " give the name that `import` takes, such as my_models for my_models.py"
    )
