"""Runs a study, or what is left of it, and writes its table and pictures.

    python -m gatedjax.study configs/studies/mqar.py [--small] [--results=results]

Each finished run is a line of results/NAME/DEVICE/runs.jsonl (NAME-small with --small); a run that
is there, with the same configuration, is not run again. table.md and the pictures are made anew
each time.
"""

import importlib.util
import json
import math
import os
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
from absl import flags

from gatedjax.errors import InputError
from gatedjax.reporting.console import format_duration, say
from gatedjax.runtime import cli
from gatedjax.study import report
from gatedjax.study.cell import run_cell
from gatedjax.study.grid import Study, run_key

_SMALL = flags.DEFINE_bool("small", False, "The ten-minute version.")
_RESULTS = flags.DEFINE_string("results", "results", "Folder of all results.")
_CACHE = flags.DEFINE_string(
    "compile_cache", "~/.cache/gatedjax/xla", "Folder of compiled programs; empty for none."
)


def main(argv: list[str]) -> None:
    """File -> study -> runs that are missing -> table and pictures."""
    if len(argv) != 2:
        raise InputError("study: got no file, expected one of configs/studies/")
    path = Path(argv[1])
    study = load_study(path, _SMALL.value)
    cli.use_compilation_cache(_CACHE.value)
    device = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
    folder = Path(_RESULTS.value) / (path.stem + ("-small" if _SMALL.value else "")) / device
    records = run_missing(study, folder)
    command = f"python -m gatedjax.study {path}" + (" --small" if _SMALL.value else "")
    for written in write_report(study, records, folder, command):
        say(str(written))


def load_study(path: Path, small: bool) -> Study:
    """What the file's `get_study(small)` returns.

    Raises:
      InputError: no such file, or one without `get_study`.
    """
    if not path.is_file():
        raise InputError(
            f"study: got {path}, expected a Python file such as configs/studies/mqar.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_study"):
        raise InputError(f"study: {path} has no get_study(small)")
    return module.get_study(small)


def run_missing(study: Study, folder: Path) -> list[dict]:
    """The records of all runs of the study, in its order; those that are not in runs.jsonl are run
    now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    known = (
        {r["key"]: r for r in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else {}
    )
    plan = [
        (cell, seed, run_key(cell, seed, study)) for cell in study.cells for seed in study.seeds
    ]
    missing = sum(key not in known for *_, key in plan)
    say(f"{study.title}: {len(plan)} runs, {len(plan) - missing} of them done")
    start, done = time.monotonic(), 0
    for cell, seed, key in plan:
        if key in known:
            continue
        values = run_cell(cell, seed, study)
        known[key] = {
            "key": key,
            "labels": dict(cell.labels),
            "seed": seed,
            "values": _plain(values),
        }
        with path.open("a") as file:
            file.write(json.dumps(known[key]) + "\n")
        done += 1
        left = (time.monotonic() - start) / done * (missing - done)
        labels = ", ".join(f"{n} {v}" for n, v in cell.labels.items())
        shown = "  ".join(f"{c} {values.get(c, math.nan):.4g}" for c in study.columns)
        say(
            f"{done}/{missing}  {labels}, seed {seed}: {shown}  ({values['seconds']:.0f}s, eta {format_duration(left)})"
        )
    return [known[key] for *_, key in plan]


def write_report(study: Study, records: list[dict], folder: Path, command: str) -> list[Path]:
    """table.md and the pictures; returns their paths."""
    found = report.rows(study, records)
    seconds = sum(r["values"]["seconds"] for r in records)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")
    )
    seeds = ", ".join(map(str, study.seeds))
    notes = [
        f"`{command}`; seeds {seeds} (mean ± standard deviation); {len(records)} runs, {format_duration(seconds)} on "
        f"{_machine()}; {versions}, Python {sys.version.split()[0]}."
    ]
    paths = [folder / "table.md"]
    paths[0].write_text(report.markdown(study, found, notes))
    for picture in study.pictures:
        paths.append(folder / f"{re.sub(r'[^a-z0-9]+', '_', picture.y.lower()).strip('_')}.png")
        report.draw(picture, found, study.title).savefig(paths[-1])
    return paths


def _machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    # Not all of the machine's, if the run was pinned.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU core{'s' if cores != 1 else ''}"


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {n: float(x) if math.isfinite(x) else None for n, x in values.items()}


if __name__ == "__main__":
    cli.run(main, takes=1)
