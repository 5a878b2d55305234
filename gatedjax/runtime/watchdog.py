"""Notices a stalled run: a collective that never ends, a disk that does not answer, a deadlock."""

import datetime
import faulthandler
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from gatedjax.runtime.cli import EXIT_FAILED, leave
from gatedjax.runtime.streams import print_error


class Watchdog:
    """Expects a `beat` at least every `seconds`; a context manager.

    Without one it writes the stacks of all threads to `folder`/stacks-<process>.txt, says so in one
    line and counts it in `stalls`; after as many seconds again it ends the process with a line and
    exit code 1: what supervises the run starts it again from the last checkpoint, which is better
    than waiting for ever on a machine that is paid for.
    """

    def __init__(self, seconds: float, folder: Path, end: Callable[[str, int], None] = leave):
        """Does nothing yet: it watches inside its `with` block.

        Args:
          seconds: 0 for none. More than the longest compilation, evaluation or save.
          folder: where the stacks go.
          end: what ends the process, with a message and an exit code.
        """
        self.stalls = 0
        self._seconds = seconds
        self._path = folder / f"stacks-{jax.process_index()}.txt"
        self._end = end
        self._last_beat = time.monotonic()
        self._doing = "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, doing: str) -> None:
        """The run is alive, and begins `doing`."""
        self._last_beat = time.monotonic()
        self._doing = doing

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._last_beat = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        """The thread: looks ten times in `seconds`, at least every five seconds."""
        stalled_since = None  # the beat after which a stall was reported
        while not self._stop.wait(min(self._seconds / 10, 5.0)):
            # The main thread may beat at any time: one look at the clock, one at the beat.
            last_beat = self._last_beat
            silence = time.monotonic() - last_beat
            is_reported = stalled_since == last_beat
            if silence > 2 * self._seconds and is_reported:
                self._end(self._stalled(silence), EXIT_FAILED)
            elif silence > self._seconds and not is_reported:
                stalled_since = last_beat
                self.stalls += 1
                self._dump(silence)

    def _stalled(self, silence: float) -> str:
        return f"{self._doing}: nothing happened for {silence:.0f} s"

    def _dump(self, silence: float) -> None:
        """Writes the stacks of all threads, and a line on stderr."""
        stalled = self._stalled(silence)
        where = f"stacks of all threads: {self._path}"
        try:
            with open(self._path, "a") as file:
                now = datetime.datetime.now().isoformat(timespec="seconds")
                file.write(f"--- {now}, {stalled}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as e:
            where = f"stacks could not be written to {self._path}: {e.strerror}"
        print_error(f"warning: {stalled}; {where}")
