"""Notices a run that stands still: a collective that never ends, a disk that does not answer, a
deadlock.
"""

import datetime
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from gatedjax.runtime.cli import leave


class Watchdog:
    """Wants a `beat` at least every `seconds`; a context manager.

    Without one it writes the stacks of all threads to `folder`/stacks-<process>.txt, says so in one
    line and counts it in `stalls`; after as many seconds again it ends the process with a line and
    exit code 1: what supervises the run starts it again from the last checkpoint, which beats
    waiting for ever on a machine that is paid for.

    Args:
      seconds: 0 for none. More than the longest compilation, evaluation or save.
      end: what ends the process (`cli.leave`).
    """

    def __init__(self, seconds: float, folder: Path, end: Callable[[str, int], None] = leave):
        self.stalls = 0
        self._seconds, self._path, self._end = (
            seconds,
            folder / f"stacks-{jax.process_index()}.txt",
            end,
        )
        self._last, self._doing = time.monotonic(), "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, doing: str) -> None:
        """The run is alive, and begins `doing`."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._last = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        seen = None  # the beat after which the run was found standing
        while not self._stop.wait(min(self._seconds / 10, 5.0)):
            last, still = self._last, time.monotonic() - self._last
            if still > 2 * self._seconds and seen == last:
                self._end(
                    f"{self._doing}: nothing happened for {still:.0f} s; the last checkpoint is intact",
                    1,
                )
            elif still > self._seconds and seen != last:
                seen = last
                self.stalls += 1
                self._dump(still)

    def _dump(self, still: float) -> None:
        where = f"stacks of all threads: {self._path}"
        try:
            with open(self._path, "a") as f:
                now = datetime.datetime.now().isoformat(timespec="seconds")
                f.write(f"--- {now}, {self._doing}: nothing happened for {still:.0f} s\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
        except OSError as e:
            where = f"stacks could not be written to {self._path}: {e.strerror}"
        print(
            f"warning: {self._doing}: nothing happened for {still:.0f} s; {where}",
            file=sys.stderr,
            flush=True,
        )
