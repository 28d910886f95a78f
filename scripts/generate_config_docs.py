"""Write docs/configuration.md from the schema, so that the two cannot drift apart.

python scripts/generate_config_docs.py            # writes the page
python scripts/generate_config_docs.py --check    # exits 1 if the page is not what would be written
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

from torchtitan.config.schema import get_options, get_sections, shown
from torchtitan.config.upstream import UPSTREAM_NAMES, UPSTREAM_OPTIONS, UPSTREAM_VALUES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/generate_config_docs.py from torchtitan/config/sections/: edit those files, then run it. -->

A run is described by a TOML file (1.1) and by flags. A flag wins over the file, the file over the defaults below.

```bash
CONFIG_FILE="./torchtitan/models/llama3/train_configs/debug_model.toml" ./run_train.sh --training.steps 20
```

`[section]` and `option = value` in the file are `--section.option value` on the command line:

| | on the command line |
|---|---|
| any value | `--training.steps 20` or `--training.steps=20`; `-` and `_` are the same; the last of several wins |
| true | `--training.compile`, `--training.compile True`, `--training.compile=true` |
| false | `--training.no-compile`, `--training.no_compile`, `--training.compile False`, `--training.compile=false` |
| list | `--checkpoint.exclude_from_loading optimizer,dataloader`; `""` is the empty list |
| list of lists | `--parallelism.module_fqns_per_model_part tok_embeddings,layers.0 layers.1,norm,output` |
| no value | `--training.seed None`, where None is allowed |

What is unknown, of the wrong type or out of range stops the run before anything starts, with one message that names
the option, what was given, what is allowed, and the nearest name. Integers go up to 2**63 - 1, numbers are finite, text
is UTF-8, and `~` at the beginning of a path is the home folder. A text that begins with dashes is given in one word,
`--job.description=...`.

```bash
python -m torchtitan.config.manager --training.compile    # prints the resolved configuration, as TOML
python -m torchtitan.config.manager --help training       # the options of a section; without a name, all
```

What the first command prints can be saved and run again. Each run saves the same in its `job.dump_folder`.
"""

UPSTREAM = """\
## Options of upstream torchtitan

TOML files and flags written for upstream are read unedited: those of v0.1.0 (June 2025), of v0.2.0 to v0.2.2, the last
releases that read TOML (February 2026), and of the months between. [Moving from upstream](upstream.md) says what is
different beside them. Options that this package lacks are accepted where they change nothing, and named in one warning
unless they have upstream's default; any other value asks for something that is not done here, and is refused.

| option of upstream | here |
|---|---|
"""


def render() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_sections(), UPSTREAM + "\n".join(_upstream())]) + "\n"


def _sections() -> Iterator[str]:
    for section, cls in get_sections().items():
        rows = [
            f"| `{option.name.partition('.')[2]}` | {option.allowed()} | `{shown(option.default)}` | {option.doc} |"
            for option in get_options().values()
            if option.name.startswith(f"{section}.")
        ]
        table = "\n".join(["| option | value | default | |", "|---|---|---|---|", *rows])
        yield f"## [{section}]\n\n{cls.__doc__}\n\n{table}\n"


def _upstream() -> Iterator[str]:
    for name, entry in UPSTREAM_OPTIONS.items():
        if entry.here:
            accepted = f"`{entry.here}`"
        elif entry.instead:
            accepted = f"only `{shown(entry.option.default)}`: {entry.instead}"
        else:
            accepted = "any value, without effect"
        yield f"| `{name}` | {accepted} |"
    for name, values in [*UPSTREAM_VALUES.items(), *UPSTREAM_NAMES.items()]:
        for value, other in values.items():
            yield f"| `{name}` `{value}` | {f'`{other.here}`' if other.here else f'refused: {other.instead}'} |"


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        if PAGE.read_text(encoding="utf-8") == render():
            return 0
        print(f"{PAGE} is not current; run python scripts/generate_config_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
