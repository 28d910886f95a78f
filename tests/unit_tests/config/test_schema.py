"""The schema is documented, consistent with itself, and every option of it is used."""

import ast
from pathlib import Path

import pytest

from scripts.generate_config_docs import PAGE, render
from torchtitan.config.schema import get_options, get_sections, nearest

PACKAGE = Path(__file__).parents[3] / "torchtitan"
OPTIONS = get_options()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_documented_by_one_sentence(name):
    doc = OPTIONS[name].doc
    assert doc.endswith((".", ")."))
    assert 10 < len(doc) < 200


@pytest.mark.parametrize("section", get_sections())
def test_every_section_is_documented(section):
    assert get_sections()[section].__doc__.endswith(".")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_default_is_allowed(name):
    option = OPTIONS[name]
    assert option.check(option.default) == option.default


@pytest.mark.parametrize("name", OPTIONS)
def test_none_is_the_default_wherever_it_is_allowed(name):
    # TOML has no None: an option is left out of the resolved file to say it
    assert OPTIONS[name].optional == (OPTIONS[name].default is None)


def test_the_page_on_configuration_is_current():
    assert PAGE.read_text(encoding="utf-8") == render()


def test_the_page_names_every_option():
    page = render()
    for option in OPTIONS.values():
        assert f"| `{option.name.partition('.')[2]}` | {option.allowed()} |" in page


def test_nearest_prefers_the_same_section_and_gives_up_on_nonsense():
    assert nearest("validation.seqlen", OPTIONS) == ["validation.seq_len"]
    assert nearest("training.seqlen", OPTIONS) == ["training.seq_len"]
    assert nearest("model.lr", OPTIONS) == ["optimizer.lr"]
    assert nearest("training.qqqqq", OPTIONS) == []


def test_every_option_is_read_beyond_its_rules():
    read = _attributes_read()
    unread = {name for name, option in OPTIONS.items() if len(option.choices) != 1 and not _is_read(name, read)}
    unread -= {"job.config_file"}  # read where the file is loaded
    assert not unread


def _attributes_read() -> set[tuple[str, str]]:
    """(a, b) for each `a.b` and `x.a.b` in the package: the name before the dot and the one after it.

    In a file or folder that is named as a section, `config` is that section. What the schema is made of, and its rules,
    use no option.
    """
    pairs = set()
    for file in PACKAGE.rglob("*.py"):
        if file.is_relative_to(PACKAGE / "config") and file.stem not in ("block_modes", "degrees", "pipeline_split"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                before = (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")).strip("_")
                sections = (file.stem, file.parent.name) if before == "config" else (before,)
                pairs |= {(section, node.attr) for section in sections}
    return pairs


def _is_read(name: str, read: set[tuple[str, str]]) -> bool:
    """Whether the field is read from something named as its section; where only one section has a long name like it,
    from anything."""
    section, field = name.split(".")
    namesakes = [other for other in OPTIONS if other.endswith(f".{field}")]
    if "_" in field and len(namesakes) == 1:
        return any(attribute == field for _, attribute in read)
    return (section, field) in read
