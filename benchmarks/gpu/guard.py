"""Runs the tasks of a worker; one that fails is recorded, and the others run. Imports no jax."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.settings import Settings

# After these the CUDA context of the process may be broken, and all that follows would fail too.
BROKEN_CONTEXT = re.compile(r"CUDA_ERROR|illegal|misaligned|INTERNAL|poison")


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker process is told.

    Attributes:
      settings: those of the run.
      part: this process takes every `parts`-th task, from this one on.
      parts: how many processes divide the tasks among them.
      skip: so many tasks of its part were done by the process that this one replaces.
      case: of the worker "one": the timed case to call.
    """

    settings: Settings
    part: int = 0
    parts: int = 1
    skip: int = 0
    case: str = ""

    def own[Task](self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of this process."""
        return tasks[self.part :: self.parts]


def run_each[Task](
    tasks: Sequence[Task],
    do: Callable[[Task], None],
    failed: Callable[[Task, Exception], None],
    options: WorkerOptions,
) -> None:
    """Does every task of this process.

    After an error that may have broken CUDA's context it goes on in a fresh process.

    Args:
      tasks: those of all parts.
      do: does one task and records what it found.
      failed: records an error.
      options: those of the process.
    """
    for index, task in enumerate(options.own(tasks)):
        if index < options.skip:
            continue
        try:
            do(task)
        except Exception as error:
            traceback.print_exc()
            failed(task, error)
            if BROKEN_CONTEXT.search(str(error)) and not options.settings.dry:
                restart(skip=index + 1)


def restart(skip: int) -> None:
    """Replaces this process by one that goes on after the first `skip` tasks."""
    sys.stderr.flush()
    worker = [sys.executable, "-m", "benchmarks.gpu.worker", *sys.argv[1:]]
    os.execv(sys.executable, [*worker, f"--skip={skip}"])
