"""Configuration of a run. Nothing in this package imports torch, so that a mistake is found in an instant.

sections/          the schema: one dataclass per TOML [section]; types.py has what types its fields may have
job_config.py      all sections as one configuration
schema.py          the schema as a table of options: types, ranges, documentation, reading one value
upstream.py, .toml upstream's options and values: other names of ours, without effect here, or refused
manager.py         defaults < TOML < command line -> JobConfig; `python -m torchtitan.config.manager` prints it
degrees.py         how many ranks each kind of parallelism takes
pipeline_split.py  which modules each pipeline stage has
block_modes.py     how each block is recomputed
mixture.py         a mixture of datasets, as an option
validate.py        every rule across sections, pure
errors.py          mistakes of the user
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
