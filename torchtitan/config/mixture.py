"""A mixture of datasets as an option: a list of NAME=WEIGHT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan.config.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture."""

    name: str
    """Of a registered dataset, or a path."""
    weight: float
    """Its share of the sequences is weight / (sum of the weights)."""


def parse_mixture(datasets: Sequence[str]) -> list[Part]:
    """What training.datasets says. Raises ConfigError: an entry that is not NAME=WEIGHT, or names one twice."""
    parts: list[Part] = []
    for entry in datasets:
        name, _, text = (part.strip() for part in entry.rpartition("="))
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ConfigError(
                f"training.datasets has {entry!r}; each entry is a registered dataset or a path, = and a weight above"
                " 0, such as c4=0.7 or my_texts/=0.3"
            )
        if any(name == part.name for part in parts):
            raise ConfigError(f"training.datasets names {name} twice; give it once, with the sum of the weights")
        parts.append(Part(name, weight))
    return parts
