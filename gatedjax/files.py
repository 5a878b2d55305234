"""Paths as people write them, and files that may be something else than files.

A path may come from a flag, from a configuration or from a checkpoint of a stranger, and what is
there may be a pipe that never ends, a device, a socket or a file of a terabyte without contents.
Nothing here opens before it has looked, and nothing waits.
"""

import os
import stat
from pathlib import PurePath
from typing import IO

from gatedjax.errors import InputError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)


def require_utf8(name: str, path: PurePath) -> None:
    """InputError if the path holds bytes that are not UTF-8: C++ libraries cannot be given it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: got {str(path)!r}, expected a path in UTF-8") from None


def kind_of(mode: int) -> str:
    """What a file mode describes, in words: "a file", "a pipe", "a device", ..."""
    for is_kind, words in _KINDS:
        if is_kind(mode):
            return words
    return "a file" if stat.S_ISREG(mode) else "no file"


def open_plain(
    path: str | os.PathLike,
    largest: int | None = None,
    *,
    follow_links: bool = True,
) -> IO[bytes]:
    """Opens a regular file for reading.

    Args:
      path: the file.
      largest: the most bytes that it may have; None for any number.
      follow_links: False refuses a link, whatever it leads to.

    Raises:
      NotPlainError: a pipe, a device, a socket, a folder, a link or too large.
      OSError: it cannot be opened.
    """
    # Looked at before it is opened: to open some devices is to act on them.
    before = os.stat(path, follow_symlinks=follow_links)
    _require_plain(path, before, largest)
    # And again when it is open: it may have been exchanged. O_NONBLOCK: a pipe opens at once.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not follow_links:
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    try:
        _require_plain(path, os.fstat(descriptor), largest)
    except NotPlainError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_plain(path: str | os.PathLike, largest: int) -> bytes:
    """The contents of a regular file of at most `largest` bytes.

    Raises:
      NotPlainError: as `open_plain`.
      OSError: it cannot be read.
    """
    with open_plain(path, largest) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise NotPlainError(f"has more than {largest:,} bytes")
    return data


def require_no_holes(file: IO[bytes]) -> None:
    """NotPlainError if the file has a hole: space that nobody wrote, which reads as zeros.

    Text has none. A file of a terabyte without contents is one hole.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
    except OSError:
        return  # a file system that does not say
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    if hole < size:
        raise NotPlainError(f"has a hole from byte {hole:,} on, of {size:,}; it is no text")


class NotPlainError(OSError):
    """What is at a path is not the plain file that it should be; the message says what it is."""


def _require_plain(path: str | os.PathLike, status: os.stat_result, largest: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError(f"is {kind_of(status.st_mode)}, expected a file")
    if largest is not None and status.st_size > largest:
        raise NotPlainError(f"has {status.st_size:,} bytes, expected at most {largest:,}")
