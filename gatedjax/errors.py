"""The exceptions that the commands print as one line."""

import reprlib
from typing import Any

# A value in a message: whole where it is of ordinary size; a file may hold anything.
_short = reprlib.Repr(
    maxlevel=3,
    maxtuple=20,
    maxlist=20,
    maxdict=20,
    maxstring=200,
    maxlong=60,
    maxother=200,
)


class InputError(ValueError):
    """The user's input is wrong: the commands print it as one line and exit with code 2."""


class TrainingError(RuntimeError):
    """A run cannot go on: the commands print it as one line and exit with code 1."""


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raises an InputError in the project's one wording, unless `ok`.

    Args:
      ok: whether `value` is acceptable.
      name: the argument or configuration key, as the user wrote it.
      value: what was given.
      expected: what would have been accepted, in words.

    Raises:
      InputError: "NAME: got VALUE, expected EXPECTED".
    """
    if not ok:
        raise InputError(f"{name}: got {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """The value as Python writes it, on one line and cut to a readable length."""
    return _short.repr(value)
