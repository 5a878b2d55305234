"""The exceptions that the commands print as one line."""

import errno
from typing import Any

# Of the disk, and not of the path: the same call may succeed later.
PASSING_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
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
    }
)


class InputError(ValueError):
    """The user's input is wrong: the commands print it as one line and exit with code 2."""


class StorageError(InputError):
    """A disk could not be written or read, and may work again: one line and exit code 1.

    A full disk, a quota, a file server that does not answer: the same command may succeed later,
    so what supervises a run starts it again.
    """


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
