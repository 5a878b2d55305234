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
      InputError: nobody's home directory is known: HOME is not set, and the user has no entry in
        the system's list.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{name}: got {os.fspath(path)!r}, expected a path without '~': this user has no home "
            "directory (HOME is not set)"
        ) from None
