"""Runs the processes of a stage side by side and ends them at its time limit. Imports no jax."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO

from benchmarks.gpu.records import LOG, append_record
from benchmarks.gpu.settings import REPOSITORY, Settings, environment


@dataclass(frozen=True)
class Job:
    """A process to start.

    Attributes:
      label: its name in records.
      command: program and arguments.
      environment: variables that differ from those of every process of the run.
      companion: runs as long as the others, and is ended with them.
    """

    label: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    companion: bool = False


def worker_job(
    settings: Settings,
    name: str,
    *options: str,
    environment: dict[str, str] | None = None,
) -> Job:
    """A process of `benchmarks.gpu.worker`.

    Args:
      settings: those of the run, which the worker gets as arguments.
      name: one of the worker's tasks.
      *options: further arguments of the worker.
      environment: variables that differ from those of every process of the run.

    Returns:
      The job, to be started by `run_together`.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.worker", name]
    command += settings.arguments()
    command += options
    return Job(" ".join((name, *options)), command, environment or {})


def run_together(settings: Settings, stage: str, jobs: list[Job], limit: float) -> None:
    """Runs jobs side by side; kills those that still run when the limit has passed.

    Records each process that failed or was killed, and the seconds of the stage.

    Args:
      settings: those of the run.
      stage: the name for the records.
      jobs: the processes.
      limit: seconds for all of them together.
    """
    began = time.monotonic()
    processes: list[subprocess.Popen] = []
    try:
        with open(settings.out / LOG, "ab") as log:
            for job in jobs:
                processes.append(_start(settings, job, log))
        awaited = [p for job, p in zip(jobs, processes) if not job.companion]
        while time.monotonic() - began < limit and any(p.poll() is None for p in awaited):
            time.sleep(0.1)
    finally:
        late = [process.poll() is None for process in processes]
        for process in processes:
            _kill(process)
    for job, process, was_late in zip(jobs, processes, late):
        if not job.companion and (was_late or process.returncode):
            append_record(
                settings.out,
                stage=stage,
                kind="process",
                process=job.label,
                late=was_late,
                exit_code=process.returncode,
            )
    seconds = time.monotonic() - began
    append_record(
        settings.out,
        stage=stage,
        kind="stage",
        seconds=round(seconds, 1),
        limit=round(limit, 1),
    )


def _start(settings: Settings, job: Job, log: IO[bytes]) -> subprocess.Popen:
    """In a session of its own, so that its children end with it."""
    return subprocess.Popen(
        job.command,
        stdout=log,
        stderr=log,
        cwd=REPOSITORY,
        env=environment(settings) | job.environment,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen) -> None:
    """The process and its children, if it still runs."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
