"""Makes the stored model times anew; ends with exit code 1 if one grew by more than 3 %.

    python benchmarks/model_check.py [--only=tpu:v5e,bwd]
        [--of=step,attention,causal_conv,delta_scan,linear_scan,moe,rotary]

A row is what a benchmark writes into its file in results/: the same script makes it again here, and
what it prints is compared. Rows of other projects' packages are left out. All of them take hours of
CPU time, `--of=step` most of one. --only keeps rows that have all of these values under their keys.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from report import run_row

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# The scripts, each with a file RESULTS/{name}_tpu.json.
SCRIPTS = ("step", "attention", "causal_conv", "delta_scan", "linear_scan", "moe", "rotary")
# The keys under which a row has model times.
TIMES = ("milliseconds", "microseconds", "program_microseconds")
TOLERANCE = 0.03


def times(row: Mapping, path: str = "") -> Iterator[tuple[str, float]]:
    """Every model time of a row, with the keys that lead to it."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from times(value, f"{path}{key}.")
        elif key in TIMES:
            yield f"{path}{key}", value


def compared(before: Mapping, after: Mapping, name: tuple) -> list[str]:
    """A line for each time of a row that grew, and for a row that could not be made.

    Args:
      before: a stored row.
      after: the same, made later.
      name: what the lines call it.
    """
    if "error" in after:
        return [f"{name}: {after['error']}"]
    lines = []
    new_times = dict(times(after))
    for key, old in times(before):
        # Kernels that are called otherwise now have nothing to be compared with.
        if old is not None and (new_times.get(key) or 0.0) > (1.0 + TOLERANCE) * old:
            lines.append(f"{name}: {key} {old:.2f} -> {new_times[key]:.2f}")
    return lines


def rows_of_ours(name: str, only: set[str]) -> Iterator[tuple[tuple, Mapping]]:
    """Of the file of a script: the values that name a row, and the row."""
    module = importlib.import_module(name)
    for row in json.loads((RESULTS / f"{name}_tpu.json").read_text())["rows"]:
        key = tuple(row[key] for key in module.KEYS)
        # The first of the keys is the op, or the case.
        is_a_peer = key[0] in getattr(module, "PEERS", {})
        if "error" not in row and not is_a_peer and only <= {str(value) for value in key}:
            yield key, row


def flags() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--of", default=",".join(SCRIPTS), help="comma-separated")
    made.add_argument("--only", default="", help="values of a row's keys, comma-separated")
    args = made.parse_args()
    for name in args.of.split(","):
        if name not in SCRIPTS:
            made.error(f"--of: got {name!r}, expected some of {', '.join(SCRIPTS)}")
    return args


def main() -> int:
    args = flags()
    only = set(filter(None, args.only.split(",")))
    slower = 0
    for name in args.of.split(","):
        made = 0
        lines = []
        for key, row in rows_of_ours(name, only):
            again = run_row(str(HERE / f"{name}.py"), *(str(value) for value in key))
            made += 1
            grown = compared(row, again, key)
            lines += grown
            # A row takes minutes.
            said = "; ".join(grown) or "no time grew"
            print(f"{name} {' '.join(map(str, key))}: {said}", file=sys.stderr, flush=True)
        slower += len(lines)
        print(f"{name}: {made} rows, {len(lines)} times grew by more than {TOLERANCE:.0%}")
        for line in lines:
            print(f"  {line}", flush=True)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
