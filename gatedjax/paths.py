"""Paths as a person gives them."""

import os
from pathlib import Path

from gatedjax.errors import InputError


def expand(path: str | os.PathLike, name: str) -> Path:
    """The path, with `~` replaced as a shell would: a shell leaves it in `--workdir=~/run`.

    Args:
      path: as given.
      name: the flag or configuration key, for the message.

    Raises:
      InputError: empty, a URL, not a name that files can have, or nobody's home directory is known:
        HOME is not set, and the user has no entry in the system's list.
    """
    given = os.fspath(path)
    if not given:
        raise InputError(f"{name}: got an empty path, expected a file or folder")
    if "://" in given:
        raise InputError(f"{name}: got {given}, expected a path; mount a bucket to use it")
    if "\0" in given:
        raise InputError(f"{name}: got {given!r}, expected a path without zero bytes")
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise InputError(
            f"{name}: got {os.fspath(path)!r}, expected a path without '~': this user has no home "
            "directory (HOME is not set)"
        ) from None
