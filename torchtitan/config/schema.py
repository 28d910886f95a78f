"""The schema of sections/ as a table of options, by dotted name.

An `Option` knows what it allows, how one value is read from a TOML file or from the command line,
and its documentation, which is the string under the field. Nearest names for a misspelling come from here too.
"""

import ast
import inspect
import json
import math
import re
import types
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan.config.job_config import JobConfig
from torchtitan.config.types import Range

_BOOLEANS = {"true": True, "false": False}
_MAX_INT = 2**63 - 1  # what tensors and checkpoints hold
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list[int]: "a list of integers (1,2,3 on the command line)",
    list[str]: "a list of texts (a,b,c on the command line)",
    list[list[str]]: "a list of lists of texts (a,b c,d on the command line)",
}


@dataclass(frozen=True)
class Option:
    """One option: `base` is bool, int, float, str, list[int], list[str] or list[list[str]]."""

    name: str  # "training.seq_len"
    base: Any
    default: Any
    doc: str = ""
    range: Range | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    is_path: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    def allowed(self) -> str:
        """What a value may be, in words: `an integer >= 1, or -1`."""
        if self.choices:
            what = either(self.choices)
        elif self.is_path:
            what = "a path"
        else:
            what = f"{_TYPE_NAMES[self.base]} {self.range or ''}".rstrip()
        return f"{what}, or None" if self.optional else what

    def check(self, value: object) -> Any:
        """`value` as the option holds it (an integer may stand for a float); ValueError if it is not allowed."""
        if value is None and self.optional:
            return None
        if self.base is float and type(value) is int:
            with suppress(OverflowError):  # no float: refused below
                value = float(value)
        if not _is_a(value, self.base) or not self._in_bounds(value):
            meant = nearest(value, self.choices) if isinstance(value, str) else []
            raise ValueError(f"must be {self.allowed()}" + (f"; did you mean {meant[0]}?" if meant else ""))
        if type(value) is int and value > _MAX_INT:
            raise ValueError(f"must be {self.allowed()}; the largest is 2**63 - 1")
        if type(value) is float and not math.isfinite(value) and not (self.range and value in self.range.also):
            raise ValueError(f"must be {self.allowed()}, and finite")
        if not _is_utf8(value):
            raise ValueError(f"must be {self.allowed()}; these bytes are not UTF-8")
        if self.is_path and str(value).startswith("~"):
            try:
                return str(Path(str(value)).expanduser())
            except RuntimeError:
                raise ValueError(f"must be {self.allowed()}; no user has that home, and a name is ./{value}") from None
        return value

    def parse(self, text: str) -> Any:
        """The value that `text`, from the command line, stands for; ValueError if it is not allowed."""
        if self.optional and text == "None":
            return None
        value: object = text
        if self.base is bool:
            value = _BOOLEANS.get(text.lower())
        elif self.base is int or self.base is float:
            with suppress(ValueError):
                value = self.base(text)
        elif self.base == list[int]:
            with suppress(ValueError):
                value = [int(part) for part in _split(text)]
        elif self.base == list[str]:
            value = _split(text)
        elif self.base == list[list[str]]:
            value = [_split(part) for part in text.split()]
        return self.check(value)

    def _in_bounds(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.range is None or self.range.allows(value))
            and (not self.is_path or ("\0" not in value and value != ""))
        )


def option_of(name: str, annotation: Any, default: Any, doc: str = "") -> Option:
    """The option that a field of this name, type, default and documentation describes."""
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
        optional = True
    limits = None
    if get_origin(annotation) is Annotated:
        annotation, limits = get_args(annotation)
    choices: tuple[str, ...] = ()
    if get_origin(annotation) is Literal:
        annotation, choices = str, get_args(annotation)
    is_path = limits is Path
    return Option(name, annotation, default, doc, None if is_path else limits, choices, optional, is_path)


@cache
def get_options() -> dict[str, Option]:
    """Every option of JobConfig, by dotted name, in the order of the schema."""
    docs = _field_docs()
    options = {}
    for section, cls in get_sections().items():
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            name = f"{section}.{field.name}"
            options[name] = option_of(name, hints[field.name], default, docs.get((cls.__name__, field.name), ""))
    return options


def get_sections() -> dict[str, Any]:
    """The dataclass of each section, by name; its docstring documents the section."""
    hints = get_type_hints(JobConfig)
    return {field.name: hints[field.name] for field in fields(JobConfig) if is_dataclass(hints[field.name])}


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, at most three and often none, that `name` may have been meant to be.

    What follows the dot counts for most, so that the right option in the wrong section is found too.
    """
    section, _, field = name.rpartition(".")
    stem = field.removesuffix("d")  # enabled, where upstream has enable_...

    def likeness(candidate: str) -> float:
        other_section, _, other_field = candidate.rpartition(".")
        part_of_it = 0.95 if len(field) > 3 and stem in other_field else 0.0
        return 0.9 * max(part_of_it, _ratio(field, other_field)) + 0.1 * _ratio(section, other_section)

    scores = sorted(((likeness(candidate), candidate) for candidate in known), key=lambda pair: -pair[0])[:3]
    return [candidate for score, candidate in scores if score > max(0.65, scores[0][0] - 0.04)]


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()


def _field_docs() -> dict[tuple[str, str], str]:
    """The string under each field, by names of class and field."""
    docs = {}
    for cls in get_sections().values():
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[cls.__name__, statement.target.id] = " ".join(text.split())
    return docs


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_a(value: object, base: Any) -> bool:
    if get_origin(base) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(base)[0]) for item in value)
    return type(value) is base  # not isinstance: True is no integer


def _is_utf8(value: object) -> bool:
    """False for text with lone surrogates, which stand for bytes of the command line that are not UTF-8."""
    if isinstance(value, list):
        return all(map(_is_utf8, value))
    return not isinstance(value, str) or not re.search("[\ud800-\udfff]", value)


def meant_or_known(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is none of these: the nearest, else all."""
    names = list(names)
    meant = nearest(name, names)
    return f"did you mean {either(meant)}?" if meant else f"known are {', '.join(names)}"


def shown(value: object) -> str:
    """A value as users write it, shortened: text in quotes, true and false in small letters."""
    try:
        text = "None" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes; tables in tables in tables
        text = "..."
    return text if len(text) <= 80 else f"{text[:76]} ..."


def either(words: Iterable[object]) -> str:
    """`a, b or c`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last
