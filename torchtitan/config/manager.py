"""From defaults, a TOML file and the command line to a JobConfig; the later wins.

Command line: `--section.option value` or `--section.option=value`, with `-` and `_` alike; the last of several wins.
A `--` alone, as other programs use it between their options and those of a run, is passed over.
Booleans: `--x.flag`, `--x.no-flag`, `--x.flag True|False`, `--x.flag=true|false`. Lists: one token, comma-separated
(`a,b`; "" is the empty list); lists of lists: one token or several (`a,b c,d`). Optional values may be `None`.

Everything wrong with the TOML and the command line is reported at once. Rules across options are in validate.py.
`python -m torchtitan.config.manager [arguments]` prints the resolved configuration as TOML, which can be run again.
"""

import errno
import logging
import os
import re
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from torchtitan.config.errors import ConfigError, raise_all
from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import Option, get_options, get_sections, nearest, shown
from torchtitan.config.upstream import UPSTREAM_OPTIONS, here, is_worth_a_warning, refusal, value_here

REPOSITORY = Path(__file__).resolve().parents[2]
_CONFIG_FILE = "job.config_file"


class ConfigManager:
    """What train.py calls; `resolve` is the same without side effects."""

    def parse_args(self, argv: Sequence[str], *, warn: bool = True) -> JobConfig:
        """The configuration that the arguments, without the program's name, stand for.

        Warns, once, about options that have no effect. `--help [section ...]` prints the options and raises SystemExit.
        Raises ConfigError with every mistake that was found.
        """
        if asked := [i for i, word in enumerate(argv) if word in ("--help", "-h")]:
            words = takewhile(lambda word: not word.startswith("-"), argv[asked[0] + 1 :])
            _print(help_text([_section_of(word) for word in words]))
            raise SystemExit(0)
        config, no_effect = resolve(argv)
        if no_effect and warn:
            logging.getLogger("torchtitan").warning(
                f"Options of upstream torchtitan that have no effect here: {', '.join(no_effect)}"
            )
        return config


@dataclass(frozen=True)
class _Setting:
    """One option that was given: its value, or what is wrong with it."""

    name: str
    given: str  # as the user wrote it, after the file's name if it is from one
    value: Any = None
    problem: str | None = None

    def error(self) -> ConfigError:
        # Other bytes than UTF-8 are lone surrogates in it, which neither a log nor a terminal takes.
        text = f"{self.given}: {self.problem}".encode(errors="surrogateescape")
        return ConfigError(text.decode(errors="backslashreplace"))


def resolve(argv: Sequence[str]) -> tuple[JobConfig, list[str]]:
    """The configuration, and the names of the options that have no effect; ConfigError if anything is wrong."""
    settings = list(_read_command_line(argv))
    config_files = [setting.value for setting in settings if setting.name == _CONFIG_FILE and not setting.problem]
    if config_files and config_files[-1] is not None:
        settings = [*_read_toml(config_files[-1]), *settings]

    settings = [replace(setting, name=here(setting.name)) for setting in settings]
    used = {setting.name: setting for setting in settings if not setting.problem}  # the later wins
    foreign = [used.pop(name) for name in list(used) if name in UPSTREAM_OPTIONS]
    refused = [replace(setting, problem=refusal(setting.name, setting.value)) for setting in foreign]
    raise_all([setting.error() for setting in settings + refused if setting.problem])

    config = JobConfig()
    for setting in used.values():
        section, field = setting.name.split(".")
        setattr(getattr(config, section), field, setting.value)
    if config.model.hf_folder is not None:
        if "model.tokenizer_path" not in used:
            config.model.tokenizer_path = config.model.hf_folder
        if config.checkpoint.initial_load_in_hf and config.checkpoint.initial_load_path is None:
            config.checkpoint.initial_load_path = config.model.hf_folder
    config.model.tokenizer_path = _find_tokenizer(config.model.tokenizer_path)
    return config, [setting.name for setting in foreign if is_worth_a_warning(setting.name, setting.value)]


def _find_tokenizer(path: str) -> str:
    """A path that is not there from the working directory may be beside the package: its TOML files run anywhere."""
    with suppress(OSError):  # of a path that cannot be looked at, preflight.py tells
        if not Path(path).exists() and (REPOSITORY / path).exists():
            return str(REPOSITORY / path)
    return path


def get_ready_files() -> dict[str, Path]:
    """The TOML files that come with the package, by the names that job.config_file knows them by."""
    return {path.stem: path for path in sorted(Path(__file__).parents[1].glob("models/*/train_configs/*.toml"))}


def to_toml(config: JobConfig) -> str:
    """The configuration as TOML. None, which TOML lacks, is left out: it is the default wherever it is allowed."""
    sections = config.to_dict()
    return tomli_w.dumps(
        {section: {k: v for k, v in options.items() if v is not None} for section, options in sections.items()}
    )


def write_resolved(config: JobConfig, path: str | Path) -> None:
    """Save the configuration so that `--job.config_file path` gives the same options.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}, for the options in force, cannot be written: {error.strerror}") from None


def help_text(only_sections: Sequence[str] = ()) -> str:
    """Every option, or those of some sections: what it may be, its default and its documentation."""
    lines = [
        "usage: ./run_train.sh [--section.option value ...]",
        "",
        "Values come from the command line, else from the TOML file (CONFIG_FILE), else from the defaults below.",
        "Booleans: --x.flag, --x.no-flag, --x.flag True|False. Lists: one comma-separated value.",
        f"Ready files, by name (--job.config_file llama3_1b): {', '.join(get_ready_files())}",
    ]
    for section, cls in get_sections().items():
        if only_sections and section not in only_sections:
            continue
        lines += ["", f"[{section}] {cls.__doc__}"]
        for option in get_options().values():
            if option.name.startswith(f"{section}."):
                lines.append(f"  {option.flag} ({option.allowed()}; default: {shown(option.default)})")
                lines.append(textwrap.fill(option.doc, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


def _read_command_line(argv: Sequence[str]) -> Iterator[_Setting]:
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        if token == "--":
            continue
        if not token.startswith("--"):
            yield _about_stray(token, tokens)
            continue
        flag, equals, text = token.partition("=")
        name = flag[2:].replace("-", "_")
        option, negated = _find(name)
        values = [text] if equals else _take_values(tokens, option)
        given = token if equals else " ".join([token, *(value or '""' for value in values)])
        if option is None:
            yield _Setting("", given, problem=_about_unknown(name, "--"))
        elif option.base is bool and not values:
            yield _Setting(option.name, given, not negated)
        elif negated:
            yield _Setting(option.name, given, problem=f"takes no value; there is {option.flag} True or False")
        elif not values:
            hint = f"; one that begins with -- is written {option.flag}=..." if option.base is str and tokens else ""
            yield _Setting(option.name, given, problem=f"needs a value, {option.allowed()}{hint}")
        else:
            yield _read(option, given, option.parse, " ".join(values))


def _take_values(tokens: deque[str], option: Option | None) -> list[str]:
    """Remove from `tokens` those that belong to the flag before them: one, but all for a list of lists."""
    several = option is not None and option.base == list[list[str]]
    values: list[str] = []
    while tokens and not tokens[0].startswith("--") and (several or not values):
        values.append(tokens.popleft())
    return values


def _find(name: str) -> tuple[Option | None, bool]:
    """The option of this name, and whether the name is that of a boolean with `no_` put before it."""
    section, _, field = name.rpartition(".")
    plain = _known().get(f"{section}.{field.removeprefix('no_')}")
    if name not in _known() and plain is not None and plain.base is bool:
        return plain, True
    return _known().get(name), False


def _read_toml(file: str) -> Iterator[_Setting]:
    known_sections = {name.partition(".")[0] for name in _known()}
    for section, table in _load_toml(Path(file)).items():
        if not isinstance(table, dict):
            meant = [f"[{section}]"] if section in known_sections else nearest(section, get_options())
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            yield _Setting("", f"{file}: {section} = {shown(table)}", problem=f"stands outside the sections{hint}")
        elif section not in known_sections and not table:
            yield _Setting("", f"{file}: [{section}]", problem=_about_unknown_section(section))
        else:
            for name, value in _flatten(section, table):
                given = f"{file}: {name} = {shown(value)}"
                if name in _known():
                    yield _read(_known()[name], given, _known()[name].check, value)
                else:
                    yield _Setting("", given, problem=_about_unknown(name))


def _flatten(section: str, table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and their values; some options of upstream's stand in tables of tables."""
    for field, value in table.items():
        name = f"{section}.{field}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in _known()):
            yield from _flatten(name, value)
        else:
            yield name, value


def _load_toml(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            path = get_ready_files().get(str(path), path)
        if path.exists() and not path.is_file() and not path.is_dir():  # it may have no end, or be read only once
            raise OSError(errno.EINVAL, "a pipe or a device, which not every process of a run can read; name a file")
        return tomli.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except tomli.TOMLDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}, {place}: not valid TOML: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read: arrays or tables are nested too deep") from None
    except ValueError as error:  # of an integer with more digits than Python reads
        raise ConfigError(f"{path}: cannot be read: {str(error).partition(';')[0]}") from None
    except OSError as error:  # a folder too
        hint = ""
        if isinstance(error, FileNotFoundError):
            files = [*path.parent.glob("*.toml"), *(map(Path, get_ready_files()) if path.name == str(path) else ())]
            others = get_close_matches(path.name, [file.name for file in files], n=1)
            hint = f"; did you mean {path.parent / others[0]}?" if others else f" (looked in {Path.cwd()})"
        raise ConfigError(f"cannot read {_CONFIG_FILE} {path}: {error.strerror}{hint}") from None


def _read(option: Option, given: str, read: Callable[[Any], Any], value: object) -> _Setting:
    try:
        return _Setting(option.name, given, read(value_here(option.name, value)))
    except ValueError as error:
        return _Setting(option.name, given, problem=str(error))


def _known() -> dict[str, Option]:
    return get_options() | {name: entry.option for name, entry in UPSTREAM_OPTIONS.items()}


def _about_unknown(name: str, prefix: str = "") -> str:
    section = name.partition(".")[0]
    option, is_negated = _find(re.sub(r"^no_(\w+)\.", r"\1.no_", name))
    if is_negated and option is not None and prefix:
        return f"unknown option; did you mean {prefix}{option.name.replace('.', '.no-')}?"
    if meant := nearest(name, get_options()):
        return f"unknown option; did you mean {' or '.join(prefix + other for other in meant)}?"
    if section not in get_sections():
        return _about_unknown_section(section)
    fields = (other.partition(".")[2] for other in get_options() if other.startswith(f"{section}."))
    return f"unknown option; [{section}] has {', '.join(fields)}"


def _about_unknown_section(section: str) -> str:
    if meant := nearest(section, get_sections()):
        return f"unknown section; did you mean [{meant[0]}]?"
    return f"unknown section; there are {', '.join(get_sections())}"


def _about_stray(token: str, tokens: deque[str]) -> _Setting:
    """What is wrong with an argument without `--`; where it names an option, its values are removed from `tokens`."""
    word = token.lstrip("-")
    name, equals, _ = word.partition("=")
    option, _ = _find(name.replace("-", "_"))
    values = _take_values(tokens, option) if option and not equals else []
    hint = f"; did you mean --{word}?" if option else ""
    problem = f"unexpected argument: options are --section.option value, and a list is one value, a,b,c{hint}"
    return _Setting("", " ".join([token, *values]), problem=problem)


def _section_of(word: str) -> str:
    """The section that a word after --help names; ConfigError if it is none."""
    section = word.partition(".")[0].replace("-", "_")
    if section not in get_sections():
        raise ConfigError(f"--help {word}: {_about_unknown_section(section)}")
    return section


def _print(text: str) -> None:
    try:
        print(text.rstrip(), flush=True)
    except BrokenPipeError:  # the reader, `| head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str]) -> int:
    """Print the resolved configuration; the exit status."""
    try:
        _print(to_toml(ConfigManager().parse_args(argv)))
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
