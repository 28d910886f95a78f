"""Types of options that say more than Python's: a range, or that the text is a path. schema.py reads them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Allowed values of a number: min and max are inclusive, above and below exclusive; `also` are allowed too."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()


PositiveInt = Annotated[int, Range(min=1)]
NonNegativeInt = Annotated[int, Range(min=0)]
PositiveIntOrAuto = Annotated[int, Range(min=1, also=(-1,))]
NonNegativeFloat = Annotated[float, Range(min=0)]
FilePath = Annotated[str, Path]
