"""Writes docs/config.md from the dataclasses of the configuration: every key, its type, its default, its comment.

python docs/config_reference.py
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gatedjax.config import FEED_FORWARDS, MIXERS, Config  # noqa: E402 (found through the line above)

HEAD = """# Configuration

Every key of a run. A file in `configs/` returns `config_dict()` with some of them changed; `--config.KEY=VALUE` on the
command line changes one; a wrong key or type is refused at launch, with the nearest key named. This page is made from
`gatedjax/config` by `python docs/config_reference.py`.
"""


def page() -> str:
    """Groups of the run first, then the kinds of layers."""
    groups = [(f.name, typing.get_type_hints(Config)[f.name]) for f in dataclasses.fields(Config)]
    parts = [HEAD, *(section(f"`config.{name}`", cls) for name, cls in groups)]
    parts.append(
        "## Layers\n\nEntries of `model.mixers` and `model.ffns`, made by `layer(kind, **values)`.\n"
    )
    parts += [
        section(f'`layer("{kind}")`', cls, "###") for kind, cls in (MIXERS | FEED_FORWARDS).items()
    ]
    parts += [
        section(f"`{cls.__name__}`", cls, "###")
        for cls in nested([*MIXERS.values(), *FEED_FORWARDS.values()])
    ]
    return "\n".join(parts)


def nested(classes: list[type]) -> list[type]:
    """Dataclasses that are values of fields."""
    hints = [hint for cls in classes for hint in typing.get_type_hints(cls).values()]
    return list(dict.fromkeys(h for h in hints if dataclasses.is_dataclass(h)))


def section(title: str, cls: type, level: str = "##") -> str:
    """One dataclass as a table."""
    comments = field_comments(inspect.getsource(cls))
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for f in dataclasses.fields(cls):
        if f.name != "kind":
            rows.append(
                f"| `{f.name}` | {type_text(f.type)} | {default_text(f)} | {comments.get(f.name, '')} |"
            )
    return "\n".join([f"{level} {title}", "", inspect.cleandoc(cls.__doc__ or ""), "", *rows, ""])


def field_comments(source: str) -> dict[str, str]:
    """The comment above a field and the one behind it."""
    comments, above = {}, []
    for line in textwrap.dedent(source).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:#\s*(.*))?$", line)
        if only := re.match(r"    # (.*)", line):
            above.append(only[1])
        elif field:
            comments[field[1]] = " ".join([*above, field[2] or ""]).strip().replace("|", "\\|")
            above = []
        else:
            above = []
    return comments


def type_text(annotation) -> str:
    text = (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )
    text = re.sub(
        r"typing\.|collections\.abc\.|gatedjax\.(?:\w+\.)+|<class '|'>",
        "",
        text if "[" in text else str(annotation),
    )
    choices = re.fullmatch(r"Literal\[(.*)\]", text)
    shown = ", ".join(f"`{c.strip()}`" for c in choices[1].split(",")) if choices else f"`{text}`"
    return shown.replace("|", "\\|")


def default_text(f: dataclasses.Field) -> str:
    if f.default is not dataclasses.MISSING:
        return f"`{f.default!r}`"
    value = f.default_factory()
    return "see below" if dataclasses.is_dataclass(value) else f"`{', '.join(value)}`"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())
