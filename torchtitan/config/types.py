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

    def allows(self, value: float) -> bool:
        return value in self.also or (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        signs = {">=": self.min, ">": self.above, "<=": self.max, "<": self.below}
        bounds = " and ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)
        return ", or ".join([bounds, *map(str, self.also)])


PositiveInt = Annotated[int, Range(min=1)]
NonNegativeInt = Annotated[int, Range(min=0)]
PositiveIntOrAuto = Annotated[int, Range(min=1, also=(-1,))]
NonNegativeFloat = Annotated[float, Range(min=0)]
FilePath = Annotated[str, Path]
