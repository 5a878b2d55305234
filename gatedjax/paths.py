"""Paths as a person gives them: on this machine, or in a bucket."""

import os
import re
from pathlib import Path

from etils import epath

from gatedjax.errors import InputError

# Where something is: a path on this machine, or gs://BUCKET/PATH, s3://BUCKET/PATH.
type Place = Path | epath.Path

BUCKET_SCHEMES = ("gs", "s3")

_URL = re.compile(r"([A-Za-z][\w+.-]*)://(.*)", re.ASCII | re.DOTALL)
# What both stores allow as the name of a bucket, and more.
_BUCKET_NAME = re.compile(r"[a-zA-Z0-9][\w.-]{1,221}", re.ASCII)


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket: gs://... or s3://..."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKET_SCHEMES))


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
        expected = "a path on this machine; a bucket can be mounted"
        raise InputError(f"{name}: got {given}, expected {expected}")
    if "\0" in given:
        raise InputError(f"{name}: got {given!r}, expected a path without zero bytes")
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise InputError(
            f"{name}: got {os.fspath(path)!r}, expected a path without '~': this user has no home "
            "directory (HOME is not set)"
        ) from None


def expand_place(path: str | os.PathLike, name: str, *, whole_bucket: bool = False) -> Place:
    """As `expand`, and a path in a bucket stays one. Nobody is asked whether it is there.

    Args:
      path: as given.
      name: the flag or configuration key, for the message.
      whole_bucket: whether gs://BUCKET alone will do.

    Raises:
      InputError: as `expand`, a URL of another scheme, or of no bucket.
    """
    given = os.fspath(path)
    url = _URL.fullmatch(given)
    if url is None:
        return expand(path, name)
    scheme, rest = url.groups()
    expected = "a path, gs://BUCKET/PATH or s3://BUCKET/PATH"
    if scheme not in BUCKET_SCHEMES:
        raise InputError(f"{name}: got {given}, expected {expected}")
    bucket, *parts = rest.rstrip("/").split("/")
    # An object's name may hold any of these; a path would not find it again.
    is_plain = all(part not in ("", ".", "..") for part in parts) and "\0" not in rest
    if not _BUCKET_NAME.fullmatch(bucket) or not is_plain or not (parts or whole_bucket):
        raise InputError(f"{name}: got {given!r}, expected {expected}")
    return epath.Path(given)
