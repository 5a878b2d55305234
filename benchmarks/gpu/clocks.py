"""The clock, power and heat of the GPU while a stage measures. Imports no jax."""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import Job
from benchmarks.gpu.records import append_record
from benchmarks.gpu.samples import median_and_spread
from benchmarks.gpu.settings import Settings

# Names of nvidia-smi, and those of the record.
FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}
MILLISECONDS = 500


def companion(settings: Settings, stage: str) -> list[Job]:
    """A process that writes them down beside a stage; none where there is no nvidia-smi."""
    if settings.dry or shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    command += [f"--loop-ms={MILLISECONDS}", f"--filename={_log_file(settings, stage)}"]
    return [Job("nvidia-smi", command, companion=True)]


def record(settings: Settings, stage: str) -> None:
    """The lowest, the median and the highest of each while the stage ran."""
    path = _log_file(settings, stage)
    if path.exists():
        found = read_samples(path.read_text(errors="replace"))
        append_record(settings.out, stage=stage, kind="clocks", **found)
        path.unlink()


def read_samples(text: str) -> dict[str, Any]:
    """[lowest, median, highest] by name; lines that are not numbers are left out."""
    columns: dict[str, list[float]] = {name: [] for name in FIELDS.values()}
    for line in text.splitlines():
        try:
            numbers = [float(cell) for cell in line.split(",")]
        except ValueError:
            continue
        if len(numbers) == len(columns):
            for name, number in zip(columns, numbers):
                columns[name].append(number)
    found = {}
    for name, numbers in columns.items():
        if numbers:
            median, _ = median_and_spread(numbers)
            found[name] = [min(numbers), median, max(numbers)]
    return found


def _log_file(settings: Settings, stage: str) -> Path:
    return settings.scratch / f"clocks-{stage}.csv"
