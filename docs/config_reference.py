"""Writes docs/config.md from the dataclasses of the configuration: every key, its type, its
default, its comment.

python docs/config_reference.py
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Found through the line above.
from gatedjax.config import FEED_FORWARDS, MIXERS, Config  # noqa: E402

HEAD = """# Configuration

Every key of a run. A file in `configs/` returns `config_dict()` with some of them changed;
`--config.KEY=VALUE` on the command line changes one; a wrong key or type is refused at launch, with
the nearest key named. This page is made from `gatedjax/config` by
`python docs/config_reference.py`.
"""
LAYERS = """## Layers

Entries of `model.mixers` and `model.ffns`, made by `layer(kind, **values)`.
"""
FIELD = re.compile(r"    (\w+): [^#]*(?:#\s*(.*))?$")
COMMENT_LINE = re.compile(r"    # (.*)")
# What a reader of the page does not need of a type's name.
MODULES = re.compile(r"typing\.|collections\.abc\.|gatedjax\.(?:\w+\.)+|<class '|'>")


def page() -> str:
    """Groups of the run first, then the kinds of layers."""
    parts = [HEAD]
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        parts.append(section(f"`config.{field.name}`", hints[field.name]))
    parts.append(LAYERS)
    layers = MIXERS | FEED_FORWARDS
    for kind, cls in layers.items():
        parts.append(section(f'`layer("{kind}")`', cls, "###"))
    for cls in nested(layers.values()):
        parts.append(section(f"`{cls.__name__}`", cls, "###"))
    return "\n".join(parts)


def nested(classes: Iterable[type]) -> list[type]:
    """Dataclasses that are values of fields, each once."""
    found = []
    for cls in classes:
        for hint in typing.get_type_hints(cls).values():
            if dataclasses.is_dataclass(hint) and hint not in found:
                found.append(hint)
    return found


def section(title: str, cls: type, level: str = "##") -> str:
    """One dataclass as a table."""
    comments = field_comments(inspect.getsource(cls))
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name == "kind":
            continue
        cells = [
            f"`{field.name}`",
            type_text(field.type),
            default_text(field),
            comments.get(field.name, ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    description = inspect.cleandoc(cls.__doc__ or "")
    return "\n".join([f"{level} {title}", "", description, "", *rows, ""])


def field_comments(source: str) -> dict[str, str]:
    """The comment above a field and the one behind it."""
    comments = {}
    above: list[str] = []
    for line in textwrap.dedent(source).splitlines():
        comment = COMMENT_LINE.match(line)
        if comment is not None:
            above.append(comment[1])
            continue
        field = FIELD.match(line)
        if field is not None:
            name, behind = field.groups()
            text = " ".join([*above, behind or ""]).strip()
            comments[name] = text.replace("|", "\\|")
        above = []
    return comments


def type_text(annotation: object) -> str:
    """As a cell of the table; of a Literal its choices."""
    text = MODULES.sub("", str(annotation))
    choices = re.fullmatch(r"Literal\[(.*)\]", text)
    if choices is None:
        shown = f"`{text}`"
    else:
        shown = ", ".join(f"`{choice.strip()}`" for choice in choices[1].split(","))
    return shown.replace("|", "\\|")


def default_text(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return "see below"
    return f"`{', '.join(value)}`"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())
