"""The stage "ncu": hardware counters of two kernels, by NVIDIA Nsight Compute. Imports no jax."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import cases
from benchmarks.gpu.processes import Job, worker_job
from benchmarks.gpu.records import append_record
from benchmarks.gpu.settings import Settings

SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
METRICS = re.compile(
    r"Throughput|Registers|Achieved Occupancy|Duration|No Eligible|Local|Stall"
    r"|Warp Cycles Per Issued",
    re.IGNORECASE,
)


class Profiled(NamedTuple):
    """A kernel, by the name that its pallas_call gives it, and a timed program that runs it."""

    case: str
    kernel: str


def profiled(dry: bool) -> list[Profiled]:
    headline = cases.headline(dry)
    return [
        Profiled(f"{headline.scan.case} both", "linear_scan_vector_products"),
        Profiled(f"{headline.gated_attention.case} both", "attention_forward"),
    ]


def jobs(settings: Settings) -> list[Job]:
    """One call of each program under ncu, which reads the counters of the kernel's first launch."""
    return [_job(settings, case, kernel) for case, kernel in profiled(settings.dry)]


def _job(settings: Settings, case: str, kernel: str) -> Job:
    # Without command buffers (CUDA graphs) each kernel is a launch that ncu sees.
    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
    worker = worker_job(settings, "one", f"--case={case}", environment=environment)
    command = ["ncu", "--clock-control=none", "--launch-count=1"]
    command += [f"--kernel-name=regex:{kernel}"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--csv", "--log-file", str(_log_file(settings, kernel))]
    command += worker.command
    return Job(f"ncu {kernel}", command, environment)


def record(settings: Settings) -> None:
    """The counters of each kernel."""
    for _, kernel in profiled(settings.dry):
        path = _log_file(settings, kernel)
        if path.exists():
            append_record(
                settings.out,
                stage="ncu",
                kind="ncu",
                kernel=kernel,
                metrics=read_metrics(path.read_text(errors="replace")),
            )


def read_metrics(text: str) -> dict[str, str]:
    """{"name [unit]": value} of ncu's CSV; lines that the program printed are between its rows."""
    rows = [line for line in text.splitlines() if line.startswith('"')]
    found = {}
    for row in csv.DictReader(rows):
        name = row.get("Metric Name") or ""
        if METRICS.search(name):
            found[f"{name} [{row['Metric Unit']}]"] = row["Metric Value"]
    return found


def _log_file(settings: Settings, kernel: str) -> Path:
    return settings.scratch / f"ncu-{kernel}.csv"
