"""Starts a command again when it crashes: for machines without a scheduler that would do it.

    python -m gatedjax.runtime.supervise [--tries=5] [--wait=10] [--longest_wait=600] \\
        -- python train.py --config=...

Exit code 0 (finished, or stopped by SIGTERM) and 2 (bad input: it would fail again) end it, with
that code. All others are crashes: the command is started again after `wait` seconds, twice as long
after each further crash, and given up after `tries` crashes in a row. A command that ran for ten
minutes has made progress: the counting starts over.

SIGTERM, SIGINT and SIGHUP are passed on to the command and everything it started, once each, and
then nothing is started again. The command runs in a process group of its own, so that a terminal
does not send it the same signal a second time. If this process dies without a word (kill -9), Linux
sends the command SIGTERM; elsewhere it is left running. On several machines, run one on each: when
a process is lost the others stop by themselves, and all join again at the coordinator.

Imports nothing but the standard library: a broken environment must not keep it from reporting.
"""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

PROGRESS_SECONDS = 600.0
FINAL_CODES = (0, 2)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_NOT_STARTED = 126  # shells' code for a command that is there and could not be started
# Why no start of the command can succeed. Any other failure of a start may pass.
_FINAL_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOEXEC,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.E2BIG,
    errno.ENAMETOOLONG,
)


def supervise(
    command: Sequence[str],
    tries: int,
    wait: float,
    longest_wait: float,
) -> int:
    """Runs `command` until it ends for good. Call it in the main thread.

    Args:
      command: the program and its arguments.
      tries: crashes in a row before it gives up.
      wait: seconds before the first new start.
      longest_wait: seconds before any new start, at most.

    Returns:
      The exit code of the command (128 + n after signal n).

    Raises:
      OSError: the command cannot be started, and never will.
    """
    with _Forwarder() as forwarder:
        crashes = 0
        while True:
            start = time.monotonic()
            status = forwarder.run(command)
            # Popen gives -n after signal n, shells 128 + n.
            code = 128 - status if status < 0 else status
            if code in FINAL_CODES or forwarder.has_signal:
                return code
            if time.monotonic() - start > PROGRESS_SECONDS:
                crashes = 0
            crashes += 1
            end = _describe(status)
            if crashes > tries:
                _say(f"{end}; {crashes} crashes in a row, giving up")
                return code
            # The exponent is bounded: a float has an end.
            seconds = min(wait * 2.0 ** min(crashes - 1, 60), longest_wait)
            _say(f"{end}; crash {crashes} in a row, starting again in {seconds:g} s")
            if forwarder.sleep(seconds):
                return code


class _Forwarder:
    """Runs commands and passes the stop signals of this process on to them.

    The handlers stand from before the first start to after the last end: a signal that comes while
    a command is being started waits in `_pending` until it has a process.
    """

    def __init__(self):
        self.has_signal = False
        self._pending: list[int] = []
        self._process: subprocess.Popen | None = None
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> "_Forwarder":
        for number in _STOP_SIGNALS:
            before = signal.getsignal(number)
            # What nohup, or a shell for its background jobs, switched off stays off.
            if before == signal.SIG_IGN and number != signal.SIGTERM:
                continue
            self._handlers_before[number] = before or signal.SIG_DFL
            signal.signal(number, self._take)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, before in self._handlers_before.items():
            signal.signal(number, before)  # pyrefly: ignore  (what getsignal gave)

    def run(self, command: Sequence[str]) -> int:
        """Runs the command once; returns its exit code, or -n after signal n."""
        try:
            process = subprocess.Popen(
                command,
                process_group=0,
                preexec_fn=_end_with_parent(),
            )
        except OSError as error:
            if error.errno in _FINAL_ERRNOS:
                raise
            _say(f"{command[0]}: {error.strerror}")
            return _NOT_STARTED
        self._process = process
        self._pass_on()
        status = process.wait()
        self._process = None
        return status

    def sleep(self, seconds: float) -> bool:
        """Waits; returns early, and True, if this process got a signal."""
        end = time.monotonic() + seconds
        while not self.has_signal and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))
        return self.has_signal

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.has_signal = True
        self._pending.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        """Sends what is pending. A handler may interrupt this: each signal is taken out once."""
        process = self._process
        while process is not None and process.returncode is None and self._pending:
            number = self._pending.pop(0)
            # Nobody is left, or the command became another user's: its end says how it went.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)


def _end_with_parent() -> Callable[[], None] | None:
    """What a new process of the command does first, on Linux: SIGTERM when this process dies."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It died before we asked.
            os._exit(128 + signal.SIGTERM)

    return ask


def _describe(status: int) -> str:
    """An exit code, or a signal; shells, and our own runs in them, turn signal n into 128 + n."""
    number = -status if status < 0 else status - 128
    if number not in signal.valid_signals():
        return f"exit code {status}"
    return f"signal {number} ({_signal_name(number)})"


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    # The real-time signals in between have no names of their own.
    return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _say(text: str) -> None:
    # Who reads stderr may be gone; the command must not be left alone for that.
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    """A flag's value.

    Raises:
      argparse.ArgumentTypeError: not a number of seconds.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds, at least 0")
    return seconds


def _count(text: str) -> int:
    """A flag's value.

    Raises:
      argparse.ArgumentTypeError: not a number of tries.
    """
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 0")
    return int(text)


def main() -> None:
    """The command: exits with the supervised command's code."""
    parser = argparse.ArgumentParser(
        prog="gatedjax.runtime.supervise", description="Starts a command again when it crashes."
    )
    parser.add_argument(
        "--tries",
        type=_count,
        default=5,
        help="crashes in a row before it gives up",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=10.0,
        help="seconds before the first new start",
    )
    parser.add_argument(
        "--longest_wait",
        type=_seconds,
        default=600.0,
        help="seconds before any new start, at most",
    )
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    args = parser.parse_args()
    if "--fresh" in args.command:
        _say("--fresh: every start would begin anew; give it once, to the command alone")
        sys.exit(2)
    try:
        code = supervise(
            args.command,
            args.tries,
            args.wait,
            args.longest_wait,
        )
    except OSError as e:
        _say(f"{args.command[0]}: {e.strerror}")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
