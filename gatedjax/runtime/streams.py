"""Standard streams that are closed, lose their reader, or cannot write most letters."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

# What a write says when the other end is gone: a closed pipe, a closed terminal.
READER_GONE = (errno.EPIPE, errno.EIO)

_STREAMS = (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"))


def open_absent() -> None:
    """Connects absent standard streams to nothing, as a daemon starts (`<&- >&- 2>&-`).

    Otherwise the next file that is opened becomes standard output, and what a library prints goes
    into it.
    """
    vacant = [descriptor for _, descriptor, _ in _STREAMS if _occupy(descriptor)]
    for name, descriptor, mode in _STREAMS:
        if getattr(sys, name) is not None:
            continue
        # If not vacant, a file that is in use has that number by now.
        place = descriptor if descriptor in vacant else os.devnull
        closes = place == os.devnull
        stream = open(place, mode, encoding="utf-8", closefd=closes)  # noqa: SIM115 (stays open)
        setattr(sys, name, stream)


def _occupy(descriptor: int) -> bool:
    """Opens the descriptor if it is closed; whether it was."""
    try:
        os.fstat(descriptor)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != descriptor:
            os.dup2(nothing, descriptor)
            os.close(nothing)
        return True
    return False


def write_any_text() -> None:
    """A letter that the terminal's encoding lacks is written as an escape, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def utf8_command(environment: Mapping[str, str]) -> list[str] | None:
    """How to start this process again in Python's UTF-8 mode; None where there is no need.

    Python chooses that mode by itself in the C locale. Where it was switched off (PYTHONUTF8=0),
    file names, flags and text are limited to ASCII, and that can be changed only at the start.
    """
    is_ascii = sys.getfilesystemencoding() in ("ascii", "ANSI_X3.4-1968", "646")
    if not is_ascii or environment.get("PYTHONUTF8") == "1":
        return None
    return [sys.executable, "-X", "utf8=1", *sys.orig_argv[1:]]


def start_again_in_utf8() -> None:
    """Does so, in this process, if there is need."""
    command = utf8_command(os.environ)
    if command is not None:
        os.execve(command[0], command, os.environ | {"PYTHONUTF8": "1"})


def print_error(text: str) -> None:
    """A line on stderr, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class LastingStream:
    """A text stream whose writes never fail: who reads it may leave before the run ends."""

    def __init__(self, stream: TextIO, notice: str):
        """Writes to `stream`, and `notice` to stderr at the first line that is lost."""
        self._stream = stream
        self._notice = notice

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno in READER_GONE:
            # Nobody will read again. The buffer is flushed once more when Python ends.
            connect_to_nothing(self._stream)
        if self._notice:
            notice = self._notice
            self._notice = ""
            print_error(f"warning: standard output: {error.strerror}; {notice}")


def connect_to_nothing(stream: TextIO) -> None:
    """What is written to this stream from now on is dropped."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


@contextlib.contextmanager
def lasting_stdout(notice: str) -> Iterator[None]:
    """Standard output inside the `with` block never fails.

    Args:
      notice: what to say on stderr when it would have, once.
    """
    before = sys.stdout
    with contextlib.redirect_stdout(LastingStream(before, notice)):  # pyrefly: ignore
        yield
