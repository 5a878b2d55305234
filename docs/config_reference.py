"""Writes docs/config.md from the dataclasses of the configuration: every key, its type, its default
and its comment.

python docs/config_reference.py
"""

import dataclasses
import inspect
import math
import re
import sys
import textwrap
import typing
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Found through the line above.
from gatedjax.config import FEED_FORWARDS, MIXERS, Config  # noqa: E402
from gatedjax.config.checks import (  # noqa: E402
    Range,
    field_ranges,
    field_types,
    is_optional,
    not_none,
)

HEAD = """# Configuration

Every key of a run. A file in `configs/` returns `config_dict()` with some of them changed;
`--config.KEY=VALUE` on the command line changes one; a wrong key, type or number is refused in one
line that names the key, however the configuration was made. A range [1, 10) holds 1 and not 10; a
float is taken as the float32 that it becomes. This page is made from `gatedjax/config` by
`python docs/config_reference.py`.
"""

LAYERS = """## Layers

Entries of `model.mixers` and `model.ffns`, made by `layer(kind, **values)`.
"""

# Markdown takes a bar for the border of a table's cell, in code too; this one it shows.
BAR = "&#124;"


def page() -> str:
    """Groups of the run first, then the kinds of layers."""
    hints = typing.get_type_hints(Config)
    parts = [HEAD]
    for field in dataclasses.fields(Config):
        parts.append(section(f"`config.{field.name}`", hints[field.name]))
    parts.append(LAYERS)
    layers = MIXERS | FEED_FORWARDS
    for kind, cls in layers.items():
        title = f'`layer("{kind}")`'
        parts.append(section(title, cls, level="###", left_out=("kind", *inherited(cls))))
    groups = [hints[field.name] for field in dataclasses.fields(Config)]
    for cls in nested([*groups, *layers.values()]):
        parts.append(section(f"`{cls.__name__}`", cls, level="###"))
    return "\n".join(parts)


def inherited(cls: type) -> list[str]:
    """The keys that a layer shares with the one it is made from: those stand there."""
    own = inspect.get_annotations(cls)
    return [field.name for field in dataclasses.fields(cls) if field.name not in own]


def nested(classes: typing.Iterable[type]) -> list[type]:
    """Dataclasses that are values of fields, and of those of them, each once."""
    found: dict[type, None] = {}
    for cls in classes:
        for hint in typing.get_type_hints(cls).values():
            # A value of its own, or the values of a Mapping.
            for value in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(value):
                    found |= dict.fromkeys([value, *nested([value])])
    return list(found)


def section(
    title: str,
    cls: type,
    level: str = "##",
    left_out: typing.Collection[str] = (),
) -> str:
    """One dataclass as a table, without the fields that are left out."""
    comments = field_comments(inspect.getsource(cls))
    rows = ["| key | type | range | default | |", "|---|---|---|---|---|"]
    hints = field_types(cls)
    ranges = field_ranges(cls)
    for field in dataclasses.fields(cls):
        if field.name in left_out:
            continue
        cells = [
            code(field.name),
            type_text(hints[field.name]),
            interval(ranges[field.name]) if field.name in ranges else "",
            default_text(field),
            comments.get(field.name, ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    description = inspect.cleandoc(cls.__doc__ or "")
    return "\n".join([f"{level} {title}", "", description, "", *rows, ""])


def field_comments(source: str) -> dict[str, str]:
    """field -> the comment above it and the one behind it."""
    comments = {}
    above: list[str] = []
    for line in textwrap.dedent(source).splitlines():
        only_comment = re.match(r"    # (.*)", line)
        if only_comment:
            above.append(only_comment[1])
            continue
        field = re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line)
        if field:
            behind = field[2] or ""
            text = " ".join([*above, behind]).strip()
            comments[field[1]] = text.replace("|", BAR)
        above = []
    return comments


def code(text: str) -> str:
    """Code in a cell of a table."""
    if "|" in text:
        return f"<code>{text.replace('|', BAR)}</code>"
    return f"`{text}`"


def type_text(annotation: typing.Any) -> str:
    if is_optional(annotation):
        return code(f"{not_none(annotation).__name__} | None")
    text = annotation if isinstance(annotation, str) else str(annotation)
    if isinstance(annotation, type) and "[" not in text:
        text = annotation.__name__
    text = re.sub(r"typing\.|collections\.abc\.|gatedjax\.(?:\w+\.)+", "", text)
    choices = re.fullmatch(r"Literal\[(.*)\]", text)
    if choices:
        return ", ".join(code(choice.strip()) for choice in choices[1].split(","))
    return code(text)


def interval(allowed: Range) -> str:
    """A range as an interval: [1, 2^24], (0, inf)."""
    left = "[" if allowed.includes_low else "("
    is_closed = allowed.includes_high and allowed.high < math.inf
    right = "]" if is_closed else ")"
    return f"{left}{number(allowed.low)}, {number(allowed.high)}{right}"


def number(x: float) -> str:
    """The larger powers of two as such."""
    for offset, suffix in ((0, ""), (1, " - 1")):
        power = x + offset
        if 2**16 <= power < math.inf and math.log2(power).is_integer():
            return f"2^{int(math.log2(power))}{suffix}"
    return f"{x:g}"


def default_text(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return code(repr(field.default))
    value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return "see below"
    return code(", ".join(value) or "{}")


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())
