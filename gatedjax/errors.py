"""The exceptions that the commands print as one line, and what of a text may be printed."""

import re
from typing import Any

# What a terminal acts on: control characters except tab and line feed, and those that turn the
# direction of writing; and lone surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class InputError(ValueError):
    """The user's input is wrong: the commands print it as one line and exit with code 2."""


class TrainingError(RuntimeError):
    """A run cannot go on: the commands print it as one line and exit with code 1."""


class ExplodedError(TrainingError):
    """Too many steps in a row were bad: the newest checkpoints may be of the broken stretch."""


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


def printable(text: str) -> str:
    """The text with what a terminal would act on written out, such as \\x1b.

    File names, keys of a configuration and what a model writes may hold escape sequences. Every
    message and every line of the console goes through here.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
