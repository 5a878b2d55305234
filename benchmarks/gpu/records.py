"""The results: one line for each thing found, written as soon as it is known. Imports no jax."""

import json
from pathlib import Path
from typing import Any

RESULTS = "gpu_results.jsonl"
LOG = "gpu_log.txt"
SUMMARY = "gpu_summary.txt"


def append_record(out: Path, **fields: Any) -> None:
    """Appends one line to the results, in one write: several processes append at once."""
    line = json.dumps(fields, default=str) + "\n"
    with open(out / RESULTS, "ab", buffering=0) as file:
        file.write(line.encode())


def read_records(out: Path) -> list[dict[str, Any]]:
    """All records. A line that a killed process left unfinished is not one."""
    path = out / RESULTS
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def one_line(error: BaseException, characters: int = 240) -> str:
    """An error as a line of a record."""
    text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:characters]
