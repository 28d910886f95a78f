"""Configuration of a run. Nothing in this package imports torch, so that a mistake is found in an instant.

job_config.py     the schema: one dataclass per TOML [section]
schema.py         the schema as a table of options: types, ranges, documentation, reading one value
upstream.py       options that only upstream has: without effect here, or refused
manager.py        defaults < TOML < command line -> JobConfig; `python -m torchtitan.config.manager` prints it
validate.py       every rule across sections, pure
custom_import.py  the user's module that registers models and datasets
preflight.py      what only a look at this machine can tell, before the processes start
errors.py         mistakes of the user
"""

from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError
from torchtitan.config.job_config import JobConfig

if TYPE_CHECKING:
    from torchtitan.config.manager import ConfigManager

__all__ = ["ConfigError", "ConfigManager", "JobConfig"]


def __getattr__(name: str) -> Any:
    # On demand only: `python -m torchtitan.config.manager` warns if its module is imported before it runs.
    if name == "ConfigManager":
        from torchtitan.config.manager import ConfigManager

        return ConfigManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
