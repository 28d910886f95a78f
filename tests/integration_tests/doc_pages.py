"""What README and docs/ name and show: options, flags, paths and commands, and whether these exist.

A page is read as prose and code: fences, indented blocks and `spans`. In a fence marked `bash` every line must be a
command that is known here; in other blocks a line that begins like one is taken for one. A block with the line
`<!-- not run: reason -->` before it is checked, not run.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import tomli

from torchtitan.cli.main import COMMANDS
from torchtitan.config.errors import ConfigError
from torchtitan.config.manager import resolve
from torchtitan.config.schema import get_options, get_sections
from torchtitan.config.upstream import UPSTREAM_OPTIONS
from torchtitan.launch.launcher import FLAGS, split_arguments

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]

_FOLDERS = ("torchtitan", "scripts", "tests", "docs", ".ci", ".github")
_NOT_OURS = {
    "bash",
    "cd",
    "cp",
    "export",
    "git",
    "head",
    "hf",
    "ls",
    "mkdir",
    "nvidia-smi",
    "pip",
    "pre-commit",
    "sbatch",
}
_NOT_OURS |= {"source", "squeue", "tail", "hf", "tensorboard", "./scripts/test.sh", ".ci/run"}
_OTHERS_FLAGS = {"--help", "--local-dir", "--ipc", "--nnodes", "--nproc_per_node", "--shm-size"}
_SUFFIXES = (".py", ".sh", ".md", ".slurm", ".toml", ".yml")
_MADE_BY_RUNS = {"config.toml"}
_FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w.-]*")
_LOOKS_LIKE_A_COMMAND = re.compile(
    r"(\w+=\S* )*(\./run_train\.sh|python3? (scripts/|-m )|torchrun -|torchtitan (-|[a-z]+ ))"
)
_OPERATORS = {"&&", "||", ";", "|", "&", ">", ">>", "<", "(", ")"}


@dataclass(frozen=True)
class Command:
    """One command of a page, as words."""

    where: str  # "docs/checkpoint.md:7"
    env: dict[str, str]
    words: tuple[str, ...]
    not_run: str = ""  # the reason

    def __str__(self) -> str:
        return " ".join([self.where, *(f"{name}={value}" for name, value in self.env.items()), *self.words])

    @property
    def is_training(self) -> bool:
        if self.words[0] == "torchtitan":
            return self.words[1:2] == ("train",) or (self.words[1:2] or ("-",))[0].startswith("-")
        return self.words[0] == "./run_train.sh"

    @property
    def training_words(self) -> tuple[str, ...]:
        """Flags and options of a training."""
        return self.words[2:] if self.words[1:2] == ("train",) else self.words[1:]

    @property
    def is_fragment(self) -> bool:
        """Options without a program."""
        return self.words[0].startswith("--")

    @property
    def is_placeholder(self) -> bool:
        return any("..." in word or re.search(r"<\w", word) for word in [*self.words, *self.env.values()])

    @property
    def compares_finished_runs(self) -> bool:
        """loss_compare.py with two folders starts no run, and refuses options of one."""
        runs = [value for flag, value in pairwise(self.words) if flag in ("--baseline", "--candidate")]
        return len(runs) == 2 and not any(value.startswith("-") for value in runs)

    def program(self) -> tuple[str, ...] | None:
        """The words from the Python program on: ("scripts/x.py", ...), ("-m", "module", ...) or ("torchtitan", ...)."""
        words = list(self.words)
        if words[0] == "torchrun":
            words = words[next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), 0) :]
        elif re.fullmatch(r"(\.venv/bin/)?python3?", words[0]):
            words = words[1:]
        elif words[0] != "torchtitan":
            return None
        return tuple(words[1:] if words[:2] == ["-m", "torchtitan"] else words)


@dataclass
class Block:
    """A fence or an indented block."""

    line: int
    language: str
    text: str = ""
    not_run: str = ""


@dataclass
class Page:
    name: str
    folder: Path
    text: str
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> "Page":
        return cls.parse(str(path.relative_to(REPO)), path.parent, path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, name: str, folder: Path, text: str) -> "Page":
        page = cls(name, folder, text)
        block: Block | None = None
        fence = not_run = ""
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            opening = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
            if fence:
                assert block is not None
                if line.strip() == fence:
                    fence, block = "", None
                else:
                    block.text += line + "\n"
            elif opening:
                fence = opening[1]
                block = Block(number, opening[2], not_run=not_run)
                page.blocks.append(block)
                not_run = ""
            elif line.startswith("    ") and (block is not None or not lines[number - 2].strip()):
                if block is None:
                    block = Block(number - 1, "", not_run=not_run)
                    page.blocks.append(block)
                block.text += line[4:] + "\n"
            else:
                block = None
                if note := re.match(r"\s*<!-- not run: (.+?) -->", line):
                    not_run = note[1]
                elif line.strip():
                    not_run = ""
                page.prose.append((number, line))
        return page

    def spans(self) -> Iterator[tuple[int, str]]:
        for number, line in self.prose:
            for _, span in re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", line):
                yield number, span.strip()

    def commands(self) -> Iterator[Command]:
        for block in self.blocks:
            yield from self.commands_of(block)

    def commands_of(self, block: Block) -> Iterator[Command]:
        strict = block.language in ("bash", "sh", "shell")
        if not strict and block.language not in ("", "text", "console"):
            return
        joined: list[tuple[int, str]] = []
        for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
            if joined and joined[-1][1].endswith("\\"):
                joined[-1] = (joined[-1][0], joined[-1][1][:-1] + " " + line.strip())
            else:
                joined.append((number, line.strip()))
        for number, line in joined:
            if strict or _LOOKS_LIKE_A_COMMAND.match(line):
                for env, words in _split(line):
                    yield Command(f"{self.name}:{number}", env, words, block.not_run)

    def files(self) -> dict[str, str]:
        """Files that the page tells to write: Python blocks that begin with a file's name in a comment."""
        files = {}
        for block in self.blocks:
            if name := file_name_of(block):
                files[name] = block.text
        return files


def file_name_of(block: Block) -> str | None:
    found = re.match(r"# ([\w/]+\.py)\n", block.text) if block.language == "python" else None
    return found[1] if found else None


def _split(line: str) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """The commands of a line; what comes after a pipe or a redirection is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    skipping = False
    for word in [*lexer, ";"]:
        if word not in _OPERATORS:
            if not skipping:
                words.append(word)
        elif word in ("&&", ";", "||"):
            env = {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, env[name] = words.pop(0).partition("=")
            if words:
                yield env, tuple(words)
            words, skipping = [], False
        else:
            skipping = True


def find_problems(page: Page) -> Iterator[str]:
    """Everything that the page names and that does not exist."""
    for number, line in page.prose:
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if problem := _about_link(page, target):
                yield f"{page.name}:{number}: {problem}"
    for number, span in page.spans():
        for problem in [*_about_flags(span, _all_flags()), *_about_option(span), *_about_path(span, page)]:
            yield f"{page.name}:{number}: {problem}"
    for block in page.blocks:
        for flag in _FLAG.findall(block.text):
            if "." in flag and (problem := _about_option_flag(flag)):
                yield f"{page.name}:{block.line}: {problem}"
        if block.language == "toml":
            yield from (f"{page.name}:{block.line}: {problem}" for problem in _about_toml(block.text))
        if block.language == "python":
            yield from (f"{page.name}:{block.line}: {problem}" for problem in _about_imports(block.text, page))
    for command in page.commands():
        yield from (f"{command.where}: {problem}" for problem in _about_command(command, page))


def _about_command(command: Command, page: Page) -> Iterator[str]:
    for word in command.words:
        yield from _about_path(word, page)
    if command.is_fragment or command.is_placeholder:
        yield from _about_flags(" ".join(command.words), _all_flags())
    elif "--help" in command.words:
        return
    elif command.is_training:
        options = [*(["--job.config_file", command.env["CONFIG_FILE"]] if "CONFIG_FILE" in command.env else [])]
        try:
            _, rest = split_arguments(command.training_words)
            resolve(options + rest)
        except ConfigError as error:
            yield str(error)
    elif program := command.program():
        source = program_file(program)
        if source is None:
            return
        if not source.is_file():
            yield f"{source.relative_to(REPO)} does not exist"
        else:
            yield from _about_flags(" ".join(program), _flags_of(source) | {"--help"})
    elif command.words[0] not in _NOT_OURS and command.words[0] != "torchrun":
        yield f"what is {command.words[0]!r}? The programs that pages may name are in {Path(__file__).name}"


def program_file(program: tuple[str, ...]) -> Path | None:
    """The file of our own program, behind its door if it is the package's, or None."""
    if program[0] in ("-m", "torchtitan"):
        module = program[1]
        if program[0] == "torchtitan":
            module = COMMANDS[module].module if module in COMMANDS else f"torchtitan.cli.{module}"
        path = REPO / (module.replace(".", "/") + ".py")
        return path if module.split(".")[0] in _FOLDERS else None
    if not program[0].endswith(".py"):
        return None
    path = REPO / program[0]
    door = re.search(r"main\(\[\"(\w+)\", \*sys", path.read_text() if path.exists() else "")
    return program_file(("torchtitan", door[1])) if door else path


def _about_flags(text: str, known: set[str] | frozenset[str]) -> Iterator[str]:
    for flag in _FLAG.findall(text):
        flag = flag.rstrip(".-")
        if "." in flag:
            if problem := _about_option_flag(flag):
                yield problem
        elif flag.replace("-", "_") not in {name.replace("-", "_") for name in known}:
            yield f"unknown flag {flag}"


def _about_option_flag(flag: str) -> str | None:
    section, _, name = flag[2:].rstrip(".").replace("-", "_").partition(".")
    if (section, name) in {("section", "option"), ("section", "field")} or section == "x":
        return None
    option = get_options().get(f"{section}.{name.removeprefix('no_')}")
    if f"{section}.{name}" in get_options().keys() | UPSTREAM_OPTIONS.keys():
        return None
    if name.startswith("no_") and option is not None and option.base is bool:
        return None
    return f"unknown option {flag}"


def _about_option(span: str) -> Iterator[str]:
    """`section.option`, also with a value or words after it; not `section.py` and not `section.method()`."""
    found = re.match(r"([a-z_]+)\.([a-z_0-9]+)(?=$| |=)", span)
    if not found or found[1] not in get_sections() or f".{found[2]}" in (*_SUFFIXES, ".json", ".jsonl"):
        return
    if found[0] not in get_options().keys() | UPSTREAM_OPTIONS.keys():
        yield f"unknown option {found[0]}"


def _about_path(span: str, page: Page) -> Iterator[str]:
    path, _, test = span.partition("::")
    path = path.removeprefix("./")
    if re.search(r"[\s*<>{}$|\"'(),=]", path) or path.startswith(("/", "-", "~", "http")) or "..." in path:
        return
    name = path.rpartition("/")[2]
    if path.startswith(tuple(f"{folder}/" for folder in _FOLDERS)):
        if not (REPO / path).exists():
            yield f"{path} does not exist"
            return
    elif path.endswith(_SUFFIXES) and path not in _SUFFIXES:
        ours = any(f"/{file}".endswith(f"/{path}") for file in _files())
        if not ours and not name.startswith(("my_", "my-")) and name not in _MADE_BY_RUNS | page.files().keys():
            yield f"there is no file {path}"
            return
    if test and not re.search(rf"def {re.escape(test.rpartition('::')[2])}\(", (REPO / path).read_text()):
        yield f"there is no test {test} in {path}"


def _about_link(page: Page, target: str) -> str | None:
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    file = page.folder / path
    if not file.exists():
        return f"link to {target}, which does not exist"
    if anchor and anchor not in _anchors(file.read_text(encoding="utf-8") if path else page.text):
        return f"link to {target}: there is no such heading"
    return None


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([\w-]+)"', text))


def _about_toml(text: str) -> Iterator[str]:
    try:
        sections = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        yield f"not TOML: {error}"
        return
    for section, options in sections.items():
        for name in options if isinstance(options, dict) else ():
            if problem := _about_option_flag(f"--{section}.{name}"):
                yield problem


def _about_imports(text: str, page: Page) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"not Python: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtitan":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    yield f"{node.module} has no {name.name}"


@cache
def _files() -> frozenset[str]:
    top = {path.name for path in REPO.iterdir() if path.is_file()}
    return frozenset(
        top
        | {str(path.relative_to(REPO)) for folder in _FOLDERS for path in (REPO / folder).rglob("*") if path.is_file()}
    )


@cache
def _flags_of(source: Path) -> frozenset[str]:
    """The flags that a program's source names, with the negation of those that have one."""
    text = source.read_text(encoding="utf-8")
    flags = set(re.findall(r"""["'](--[a-z][\w-]*)""", text))
    negated = re.findall(r"""["']--([a-z][\w-]*)["'][^\n]*BooleanOptionalAction""", text)
    return frozenset(flags | {f"--no-{flag}" for flag in negated})


@cache
def _all_flags() -> frozenset[str]:
    """Those of every program of ours, of the launcher and of torchrun."""
    programs = [*(REPO / "scripts").glob("*.py"), *(REPO / "torchtitan/cli").glob("*.py")]
    scripts = [flag for program in programs for flag in _flags_of(program)]
    return frozenset({f"--{flag}" for flag in FLAGS} | set(scripts) | _OTHERS_FLAGS)
