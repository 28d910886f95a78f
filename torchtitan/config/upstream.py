"""Upstream torchtitan's options and values that this package names otherwise, needs not, or does not have.

Upstream's TOML files and flags are read unedited. Each name of its schema is either ours, or stands in upstream.toml in
one of three kinds: another name of an option of ours; without effect here, accepted, and named in one warning unless it
has upstream's default; or restricted to the values that change nothing, while others are refused with what to do
instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from torchtitan.config.schema import Option, get_options, option_of, shown

_TABLES = tomli.loads(Path(__file__).with_name("upstream.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class UpstreamOption:
    """Its default asks for nothing, nor do None and an empty text."""

    option: Option
    here: str = ""  # the option of this package that it is, if it is one
    instead: str = ""  # why other values than the default are refused, or what to do instead, if they are


class UpstreamValue(NamedTuple):
    """What upstream's value of an option of both is here, or what to do instead."""

    here: str = ""
    instead: str = ""


def _option(name: str, default: Any) -> Option:
    if default == "":
        return option_of(name, str | None, default)
    return option_of(name, list[str] if isinstance(default, list) else type(default), default)


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, UpstreamValue]]:
    by_option: dict[str, dict[str, UpstreamValue]] = {row["option"]: {} for row in rows}
    for row in rows:
        entry = UpstreamValue(row.get("here", ""), row.get("instead", ""))
        by_option[row["option"]] |= dict.fromkeys(row["values"], entry)
    return by_option


UPSTREAM_OPTIONS: Mapping[str, UpstreamOption] = {
    **{
        name: UpstreamOption(replace(get_options()[ours], name=name), here=ours)
        for name, ours in _TABLES["renamed"].items()
    },
    **{name: UpstreamOption(_option(name, default)) for name, default in _TABLES["no_effect"].items()},
    **{
        name: UpstreamOption(_option(name, row["default"]), instead=row["instead"])
        for row in _TABLES["only"]
        for name in row["options"]
    },
}
UPSTREAM_VALUES = _values(_TABLES["values"])
UPSTREAM_NAMES = _values(_TABLES["names"])
"""As UPSTREAM_VALUES, of options whose values are registered: to be asked only where there is no such name."""
UPSTREAM_VARIABLES: Mapping[str, str] = _TABLES["variables"]
"""Of the environment, each with what to do instead."""


def here(name: str) -> str:
    """The name that an option has here."""
    entry = UPSTREAM_OPTIONS.get(name)
    return entry.here or name if entry else name


def value_here(name: str, value: object) -> object:
    """What is given for an option, as this package calls it: one text, several with commas between, or a list.

    Raises ValueError where it is upstream's and has no counterpart.
    """
    values = UPSTREAM_VALUES.get(name)
    if values is None:
        return value
    if isinstance(value, list):
        return [value_here(name, part) for part in value]
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        if part in values and not values[part].here:
            raise ValueError(_about(part, values[part]))
    return ",".join(values[part].here if part in values else part for part in parts)


def about_unknown_name(name: str, value: str) -> str | None:
    """What to say of a name that nothing is registered under, if it is one of upstream's."""
    entry = UPSTREAM_NAMES[name].get(value)
    return _about(value, entry) if entry else None


def _about(value: str, entry: UpstreamValue) -> str:
    return f"{value} is upstream's, and not supported here: {entry.instead}"


def refusal(name: str, value: object) -> str | None:
    """Why an option of the table cannot have this value; None if it can."""
    entry = UPSTREAM_OPTIONS[name]
    if not entry.instead or _asks_nothing(entry, value):
        return None
    default = entry.option.default
    supported = "nothing" if default in ("", []) else f"only {shown(default)}"
    return f"upstream's option, of which {supported} is supported here: {entry.instead}"


def is_worth_a_warning(name: str, value: object) -> bool:
    """Whether an accepted value says what is not done here: upstream's own defaults ask for nothing."""
    entry = UPSTREAM_OPTIONS[name]
    return not entry.instead and not _asks_nothing(entry, value)


def _asks_nothing(entry: UpstreamOption, value: object) -> bool:
    return value in (None, "", entry.option.default)
