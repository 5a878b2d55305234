"""A trace of a few steps of a run, for `xprof` or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax

STEPS = 5


class StepTrace:
    """Traces `STEPS` steps from a given one on; a context manager around the loop.

    However the loop ends, a trace that has begun is written.
    """

    def __init__(
        self,
        first: int,
        start: int,
        last: int,
        folder: Path,
        report: Callable[[str], None],
    ):
        """Does nothing yet.

        Args:
          first: the first step of the trace; 0 for none.
          start: steps done before the loop. The first step after them compiles: there is nothing
            to see in it, and the trace begins later.
          last: the last step of the loop.
          folder: where the trace goes.
          report: called with one line when it is written, or when no step was traced.
        """
        self._first = max(first, start + 2) if first else 0
        self._last = last
        self._folder = folder
        self._report = report
        self._traced: int | None = None  # steps since the trace began
        self._is_done = not first

    def after(self, step: int) -> None:
        """Called after each step."""
        if self._is_done:
            return
        if self._traced is not None:
            self._traced += 1
            if self._traced == STEPS:
                self._finish()
        elif step == self._first - 1 and step < self._last:
            jax.profiler.start_trace(self._folder)
            self._traced = 0

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_done:
            return
        if self._traced is None:
            self._report(f"no profile: the run ended before step {self._first}")
        else:
            self._finish()

    def _finish(self) -> None:
        self._is_done = True
        jax.profiler.stop_trace()
        self._report(f"profile of {self._traced} steps: {self._folder}")
