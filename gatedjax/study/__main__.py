"""Runs a study, or what is left of it, and writes its table and pictures.

    python -m gatedjax.study mqar [--small] [--results=results] [--workers=4] [--ray=auto]

The study is one of configs/studies, a file of your own or a module (`gatedjax/config/files.py`).
Each finished run is a line of results/NAME/DEVICE/runs.jsonl (NAME-small with --small), which says
where and when it was made; a run that is there, with the same configuration, is not run again.
table.md and the pictures are made anew each time, from those lines alone.

Runs do not depend on each other: --workers makes several at a time on this machine, --ray on those
of a Ray cluster.
"""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gatedjax.config import files as config_files
from gatedjax.errors import InputError
from gatedjax.paths import expand
from gatedjax.reporting.console import format_duration, say
from gatedjax.runtime import cli
from gatedjax.study import report
from gatedjax.study.grid import Study
from gatedjax.study.study_file import load_study
from gatedjax.study.workers import Workers, planned_runs
from gatedjax.study.workers import workers as workers_of


def run_study(
    name: str,
    small: bool,
    results: Path,
    workers: Workers,
) -> None:
    """Name or file -> study -> runs that are missing -> table and pictures.

    Args:
      name: of the study, or its file.
      small: its ten-minute version.
      results: the folder of all results.
      workers: what makes the runs.

    Raises:
      InputError: see `config.files.find` and `load_study`.
    """
    path = config_files.find(name, "study", "studies")
    study = load_study(path, small)
    # The two sizes have different runs, and a folder each.
    folder_name = path.stem
    command = f"python -m gatedjax.study {name}"
    if small:
        folder_name += "-small"
        command += " --small"
    folder = results / folder_name / workers.device_name()
    records = run_missing(study, folder, workers)
    for written in write_report(study, records, folder, command):
        say(str(written))


def run_missing(
    study: Study,
    folder: Path,
    workers: Workers,
) -> list[dict[str, Any]]:
    """The records of all runs of the study, in its order.

    Runs that are not in runs.jsonl are made now, and appended to it as they finish.

    Args:
      study: the question.
      folder: of the file.
      workers: what makes the runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    known = _read_runs(path)
    plan = planned_runs(study)
    missing = [run for run in plan if run.key not in known]
    num_known = len(plan) - len(missing)
    say(f"{study.title}: {len(plan)} runs, {num_known} of them done")
    start = time.monotonic()
    for done, (run, made) in enumerate(workers.finished(missing, study), start=1):
        record = {
            "key": run.key,
            "labels": dict(run.cell.labels),
            "seed": run.seed,
            "values": _json_values(made.values),
            "made": made.place,
        }
        # At once: a study that is stopped keeps its finished runs.
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        known[run.key] = record
        seconds_per_run = (time.monotonic() - start) / done
        runs_left = len(missing) - done
        left = format_duration(seconds_per_run * runs_left)
        description = _describe_run(study, record)
        seconds = made.values["seconds"]
        say(f"{done}/{len(missing)}  {description}  ({seconds:.0f}s, eta {left})")
    return [known[run.key] for run in plan]


def _read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a file, by key."""
    if not path.exists():
        return {}
    runs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        runs[record["key"]] = record
    return runs


def _describe_run(study: Study, record: Mapping[str, Any]) -> str:
    """Labels, seed and the columns of the table."""
    parts = [f"{name} {value}" for name, value in record["labels"].items()]
    parts.append(f"seed {record['seed']}")
    columns = []
    for column in study.columns:
        value = record["values"].get(column)
        if value is None:
            value = math.nan
        columns.append(f"{column} {value:.4g}")
    return ", ".join(parts) + ": " + "  ".join(columns)


def write_report(
    study: Study,
    records: Sequence[report.Record],
    folder: Path,
    command: str,
) -> list[Path]:
    """Writes table.md and the pictures.

    Args:
      study: the question.
      records: of all its runs.
      folder: where the files go.
      command: how to run the study again, for the table's note.

    Returns:
      The paths of the files.
    """
    rows = report.rows(study, records)
    table = folder / "table.md"
    note = _note(study, records, command)
    table.write_text(report.markdown(study, rows, [note]), encoding="utf-8")
    paths = [table]
    for picture in study.pictures:
        path = folder / f"{_file_name(picture.y)}.png"
        report.draw(picture, rows, study.title).savefig(path)
        paths.append(path)
    return paths


def _note(study: Study, records: Sequence[report.Record], command: str) -> str:
    """How the table was made: where and when its records were, not where it is written now."""
    seconds = sum(record["values"]["seconds"] for record in records)
    seeds = ", ".join(str(seed) for seed in study.seeds)
    runs = f"{len(records)} runs, {format_duration(seconds)}"
    places: dict[tuple[str, str], list[str]] = {}
    for record in records:
        made = record.get("made", {})
        place = (made.get("machine", "a machine not recorded"), made.get("versions", ""))
        places.setdefault(place, []).append(made.get("date", ""))
    described = [_place(*place, dates) for place, dates in places.items()]
    if len(described) > 1:
        counts = [len(dates) for dates in places.values()]
        described = [f"{count} {text}" for count, text in zip(counts, described)]
        runs += ":"
    parts = [
        f"`{command}`",
        f"seeds {seeds} (mean ± standard deviation)",
        f"{runs} {'; '.join(described)}",
    ]
    return "; ".join(parts) + "."


def _place(machine: str, versions: str, dates: Sequence[str]) -> str:
    """Where and when some records were made; what is not known is left out."""
    parts = [f"on {machine}", versions]
    days = sorted({date for date in dates if date})
    if days:
        parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
    return "; ".join(part for part in parts if part)


def _file_name(column: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def _json_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """None where not finite: JSON has no NaN."""
    return {name: float(x) if math.isfinite(x) else None for name, x in values.items()}


def run() -> None:
    """The command: defines its flags, then runs the study that is named."""
    small = flags.DEFINE_bool("small", False, "The ten-minute version.")
    results = flags.DEFINE_string("results", "results", "Folder of all results.")
    cache = flags.DEFINE_string(
        "compile_cache", "~/.cache/gatedjax/xla", "Folder of compiled programs; empty for none."
    )

    num_workers = flags.DEFINE_integer(
        "workers", 1, "Runs at a time, in processes of their own cores or GPU.", lower_bound=1
    )
    ray = flags.DEFINE_string(
        "ray", None, "Address of a Ray cluster that makes the runs (auto, ray://HOST:10001, local)."
    )
    ray_cpus = flags.DEFINE_float("ray_cpus", 1, "CPU cores of a run on Ray.", lower_bound=0)
    ray_gpus = flags.DEFINE_float("ray_gpus", 0, "GPUs of a run on Ray.", lower_bound=0)

    def main(argv: Sequence[str]) -> None:
        if len(argv) != 2:
            known = ", ".join(config_files.own_names("studies"))
            raise InputError(f"study: got no name, expected a Python file or one of {known}")
        folder = expand(results.value, "--results")
        cli.use_compilation_cache(cache.value)
        chosen = workers_of(
            num_workers.value,
            ray.value,
            ray_cpus.value,
            ray_gpus.value,
        )
        with chosen as workers:
            run_study(argv[1], small.value, folder, workers)

    cli.run(main, takes=1)


if __name__ == "__main__":
    run()
