"""The exceptions that the commands print as one line, and what of a text may be printed."""

import errno
import re
import reprlib
from typing import Any

# What a terminal acts on: control characters except tab and line feed, and those that turn the
# direction of writing; and lone surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

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

# Of the disk, and not of the path: the same call may succeed later.
PASSING_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ENFILE,
        errno.EMFILE,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
    }
)


class InputError(ValueError):
    """The user's input is wrong: the commands print it as one line and exit with code 2."""


class StorageError(InputError):
    """A disk could not be written or read, and may work again: one line and exit code 1.

    A disk or a file server that does not answer: the same command may succeed later, so what
    supervises a run starts it again. A full disk does not empty itself: that is an InputError.
    """


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
        raise InputError(f"{name}: got {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """The value as Python writes it, on one line and cut to a readable length."""
    return _short.repr(value)


def printable(text: str) -> str:
    """The text with what a terminal would act on written out, such as \\x1b.

    File names, keys of a configuration and what a model writes may hold escape sequences. Every
    message and every line of the console goes through here.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
