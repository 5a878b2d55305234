"""What the benchmarks share: a table for the eye, and a JSON file for the record."""

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell: the first one left-aligned, the others
    right-aligned.
    """
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    align = lambda i, c: c.ljust(widths[i]) if i == 0 else c.rjust(widths[i])
    return "\n".join("  ".join(align(i, c) for i, c in enumerate(row)).rstrip() for row in cells)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as the operating system tells it."""
    try:
        return re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        ).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def write_json(path: str, figures: Mapping[str, object], versions: Mapping[str, str]) -> None:
    """The figures, and what they were measured with: processor, versions, command, date."""
    ours = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    record = {
        "command": " ".join(["python", *(_without_folders(a) for a in sys.argv)]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model(),
        "cores": cores(),
        "versions": {"python": platform.python_version(), **ours, **versions},
        **figures,
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")


def known_rows(
    path: str | None, keys: Sequence[str], versions: Mapping[str, str]
) -> dict[tuple, dict]:
    """The `rows` that an earlier run with these versions wrote, failures aside: values of keys ->
    figures.
    """
    if not path or not Path(path).exists():
        return {}
    before = json.loads(Path(path).read_text())
    if any(before["versions"].get(name) != version for name, version in versions.items()):
        return {}
    figures = lambda row: {name: x for name, x in row.items() if name not in keys}
    return {
        tuple(row[key] for key in keys): figures(row)
        for row in before["rows"]
        if "error" not in row
    }


def _without_folders(argument: str) -> str:
    """An absolute path means nothing on another machine: its last part stays."""
    name, equals, value = argument.rpartition("=")
    return name + equals + (Path(value).name if Path(value).is_absolute() else value)
