"""Keeps off the console what orbax and tensorstore say of a failure that raises here anyway."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any


class QuietOrbax(logging.Filter):
    """Keeps orbax's own account of a failure off the log while one of our checkpoints is at work.

    The failure raises here, in one line; orbax would also log it, with its traceback, from each of
    its threads. Nothing else is kept off, and nothing at any other time: the whole process shares
    this logger, absl's.
    """

    def start(self) -> None:
        logging.getLogger("absl").addFilter(self)

    def stop(self) -> None:
        logging.getLogger("absl").removeFilter(self)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname


# The hooks that `drop_late_callbacks` installed.
_late_callbacks_hook: list[Callable[[Any], None]] = []


def drop_late_callbacks() -> None:
    """Keeps off stderr what tensorstore's threads print after a save has failed.

    The writes that were under way end later, and tell an event loop that orbax has closed: a
    traceback for each, after the error that counts. Installed once; all else is printed.
    """
    previous = sys.unraisablehook
    if previous in _late_callbacks_hook:
        return

    def hook(unraisable: Any) -> None:
        is_late = isinstance(unraisable.exc_value, RuntimeError) and unraisable.object is None
        if is_late and str(unraisable.exc_value) == "Event loop is closed":
            return
        previous(unraisable)

    _late_callbacks_hook.append(hook)
    sys.unraisablehook = hook
