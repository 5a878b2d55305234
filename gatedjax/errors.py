"""The exceptions that the commands print as one line."""

from typing import Any


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
        raise InputError(f"{name}: got {value!r}, expected {expected}")
