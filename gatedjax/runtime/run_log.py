"""A run's log file: what the command says, with the time, beside what the console shows.

Lines wait in memory until the run directory is this run's: one that cannot start writes nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gatedjax.errors import InputError, printable

LOG_FILE = "log.txt"


class RunLog:
    """Lines, first in memory, then in a file."""

    def __init__(self):
        self._waiting: list[str] = []
        self._file: TextIO | None = None

    def open(self, run_dir: Path) -> None:
        """Goes on in the run directory's file, behind what earlier starts wrote.

        Raises:
          InputError: it cannot be written.
        """
        path = run_dir / LOG_FILE
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run)
        except OSError as error:
            raise InputError(f"could not write {path}: {error.strerror}") from error
        waiting = self._waiting
        self._waiting = []
        for line in waiting:
            self._write(line)

    def line(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(f"{stamp}  {printable(text)}\n")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _write(self, line: str) -> None:
        if self._file is None:
            self._waiting.append(line)
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise InputError(f"could not write {self._file.name}: {error.strerror}") from error


_log: RunLog | None = None  # of this command, if it keeps one


@contextlib.contextmanager
def keep() -> Iterator[RunLog]:
    """Inside the `with` block, what `note` gets goes to this log."""
    global _log
    _log = RunLog()
    try:
        yield _log
    finally:
        _log.close()
        _log = None


def note(text: str) -> None:
    """A line, or several, for the log; nothing where none is kept.

    Raises:
      InputError: it cannot be written.
    """
    if _log is not None:
        _log.line(text)
