"""The exceptions that entry points print as one line."""

from typing import Any


class InputError(ValueError):
    """What the user gave is wrong: the entry points print it as one line and exit 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the entry points print it as one line and exit 1."""


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raises InputError, in the words all of them use, unless `ok`."""
    if not ok:
        raise InputError(f"{name}: got {value!r}, expected {expected}")
