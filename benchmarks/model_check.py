"""Makes the stored model times anew; ends with exit code 1 if one grew by more than 3 %.

    python benchmarks/model_check.py [--of=step,attention,delta_scan,moe]

A row is what a benchmark writes into its file in results/: the same script makes it again here,
into a file that is thrown away. All of them take hours of CPU time, `--of=step` most of one.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# The scripts, each with a file RESULTS/{name}_tpu.json.
SCRIPTS = ("step", "attention", "delta_scan", "moe")
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


def compared(before: Mapping, after: Mapping, keys: tuple[str, ...]) -> list[str]:
    """A line for each time that grew, and for each row that is not there any more.

    Args:
      before: a benchmark's record.
      after: another one, made later.
      keys: which values of a row name it.
    """
    found = {tuple(row[key] for key in keys): row for row in after["rows"]}
    lines = []
    for row in before["rows"]:
        name = tuple(row[key] for key in keys)
        if "error" in row:
            continue
        new = found.get(name, {"error": "not made"})
        if "error" in new:
            lines.append(f"{name}: {new['error']}")
            continue
        new_times = dict(times(new))
        for key, old in times(row):
            # Kernels that are called otherwise now have nothing to be compared with.
            if key in new_times and new_times[key] > (1.0 + TOLERANCE) * old:
                lines.append(f"{name}: {key} {old:.2f} -> {new_times[key]:.2f}")
    return lines


def flags() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--of", default=",".join(SCRIPTS), help="comma-separated")
    args = made.parse_args()
    for name in args.of.split(","):
        if name not in SCRIPTS:
            made.error(f"--of: got {name!r}, expected some of {', '.join(SCRIPTS)}")
    return args


def main() -> int:
    slower = 0
    for name in flags().of.split(","):
        stored = RESULTS / f"{name}_tpu.json"
        if not stored.exists():
            print(f"{name}: nothing is stored yet")
            continue
        keys = importlib.import_module(name).KEYS
        with tempfile.TemporaryDirectory() as folder:
            anew = Path(folder) / "rows.json"
            command = [sys.executable, str(HERE / f"{name}.py"), f"--json={anew}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = compared(json.loads(stored.read_text()), json.loads(anew.read_text()), keys)
        slower += len(lines)
        print(f"{name}: {len(lines)} times grew by more than {TOLERANCE:.0%}", flush=True)
        for line in lines:
            print(f"  {line}", flush=True)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
