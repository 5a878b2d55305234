"""What the benchmarks share: a table for the eye, a JSON file for the record, a process of its own
for each compilation.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """Of a benchmark's flags: its docstring as it is written, and --json."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", help="also write the figures to this file")
    return made


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell: the first one left-aligned, the others
    right-aligned.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as the operating system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match is None:
        return platform.processor() or platform.machine()
    return match[1]


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: str, figures: Mapping[str, object], versions: Mapping[str, str]) -> None:
    """The figures, and what they were measured with: processor, versions, command, date."""
    arguments = [_without_folders(argument) for argument in sys.argv]
    record = {
        "command": " ".join(["python", *arguments]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_model(),
        "cores": cores(),
        "versions": {
            "python": platform.python_version(),
            "jax": metadata.version("jax"),
            "jaxlib": metadata.version("jaxlib"),
            **versions,
        },
        **figures,
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n")


def known_rows(
    path: str | None,
    keys: Sequence[str],
    versions: Mapping[str, str],
) -> dict[tuple, dict]:
    """The `rows` that an earlier run with these versions wrote, failures aside: values of keys ->
    figures.
    """
    if not path or not Path(path).exists():
        return {}
    before = json.loads(Path(path).read_text())
    for name, version in versions.items():
        if before["versions"].get(name) != version:
            return {}
    found = {}
    for row in before["rows"]:
        if "error" not in row:
            key = tuple(row[name] for name in keys)
            found[key] = {name: value for name, value in row.items() if name not in keys}
    return found


def each_row(
    path: str | None,
    keys: Sequence[str],
    versions: Mapping[str, str],
    wanted: Iterable[tuple],
    make: Callable[..., dict],
    **figures: object,
) -> Iterator[tuple[tuple, dict]]:
    """The rows that are wanted, in their order: those that the file has, the others made now.

    Args:
      path: of the JSON file, or None. It is written after every row that is made, and keeps the
        rows that nobody wants now: a run of hours may be cut short.
      keys: what the values that name a row are called in the file.
      versions: of packages. A file of others begins anew.
      wanted: the values that name a row.
      make: the figures of a row, from those values.
      figures: stand above the rows in the file.

    Yields:
      (the values that name a row, its figures).
    """
    rows = known_rows(path, keys, versions)
    for row in wanted:
        if row not in rows:
            rows[row] = make(*row)
            if path:
                written = [dict(zip(keys, name)) | found for name, found in rows.items()]
                write_json(path, {**figures, "rows": written}, versions)
        yield row, rows[row]


def print_rows(
    header: Sequence[str],
    rows: Iterable[tuple[tuple, dict]],
    line: Callable[..., list[str]],
) -> None:
    """Each row as it comes, on stderr: they take minutes. All of them in the end, as a table.

    Args:
      header: of the table.
      rows: of `each_row`.
      line: the cells of a row, from the values that name it and its figures.
    """
    lines = []
    for row, found in rows:
        lines.append(line(row, found))
        print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    print(table(header, lines))


def run_row(script: str, *row: object) -> dict:
    """What `python SCRIPT --row ...` prints as JSON, or {"error": ...} if it fails.

    libtpu reads its flags once and keeps its memory, so every compilation has a process of its own.
    """
    return run_worker([sys.executable, script, "--row", *(str(value) for value in row)])


def run_worker(command: Sequence[str]) -> dict:
    """What a command prints last as JSON, with the day, or {"error": ...} if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        # A file keeps rows of earlier runs: its own date is that of the last one.
        return found | {"date": datetime.date.today().isoformat()}
    said = done.stderr.strip().splitlines() or ["no message"]
    errors = [line for line in said if "Error: " in line]
    return {"error": (errors or said)[-1][:300]}


def _without_folders(argument: str) -> str:
    """An absolute path means nothing on another machine: its last part stays."""
    name, equals, value = argument.rpartition("=")
    if Path(value).is_absolute():
        value = Path(value).name
    return f"{name}{equals}{value}"
