"""Starts a command again when it crashes: for machines without a scheduler that would do it.

    python -m gatedjax.runtime.supervise [--tries=5] [--wait=10] [--longest_wait=600] \\
        -- python train.py --config=...

Exit code 0 (finished, or stopped by SIGTERM) and 2 (bad input: it would fail again) end it, with
that code. All others are crashes: the command is started again after `wait` seconds, twice as long
after each further crash, and given up after `tries` crashes in a row. A command that ran for ten
minutes has made progress: the counting starts over. SIGTERM and SIGINT are forwarded to the
command. On several machines, run one on each: when a process is lost the others stop by themselves,
and all join again at the coordinator.

Imports nothing but the standard library: a broken environment must not keep it from reporting.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

PROGRESS_SECONDS = 600.0
FINAL_CODES = (0, 2)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def supervise(
    command: Sequence[str],
    tries: int,
    wait: float,
    longest_wait: float,
) -> int:
    """Runs `command` until it ends for good.

    Args:
      command: the program and its arguments.
      tries: crashes in a row before it gives up.
      wait: seconds before the first new start.
      longest_wait: seconds before any new start, at most.

    Returns:
      The exit code of the command (128 + n after signal n).
    """
    stop_signals: list[int] = []  # those that this process got
    crashes = 0
    while True:
        start = time.monotonic()
        code = _run(command, stop_signals)
        if code in FINAL_CODES or stop_signals:
            return code
        if time.monotonic() - start > PROGRESS_SECONDS:
            crashes = 0
        crashes += 1
        end = _describe(code)
        if crashes > tries:
            _say(f"{end}; {crashes} crashes in a row, giving up")
            return code
        seconds = min(wait * 2 ** (crashes - 1), longest_wait)
        _say(f"{end}; crash {crashes} in a row, starting again in {seconds:g} s")
        if _sleep(seconds, stop_signals):
            return code


def _run(command: Sequence[str], stop_signals: list[int]) -> int:
    """Runs the command once, forwarding signals to it; returns its exit code."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)
        process.send_signal(number)

    for number in _STOP_SIGNALS:
        signal.signal(number, forward)
    code = process.wait()
    # Popen gives -n after signal n, shells 128 + n.
    return 128 - code if code < 0 else code


def _sleep(seconds: float, stop_signals: list[int]) -> bool:
    """Waits; returns early, and True, if this process got a signal."""

    def remember(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)

    for number in _STOP_SIGNALS:
        signal.signal(number, remember)
    end = time.monotonic() + seconds
    while not stop_signals and time.monotonic() < end:
        left = max(end - time.monotonic(), 0.0)
        time.sleep(min(0.1, left))
    return bool(stop_signals)


def _describe(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    number = code - 128
    return f"signal {number} ({signal.Signals(number).name})"


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """The command: exits with the supervised command's code."""
    parser = argparse.ArgumentParser(
        prog="gatedjax.runtime.supervise", description="Starts a command again when it crashes."
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=5,
        help="crashes in a row before it gives up",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=10.0,
        help="seconds before the first new start",
    )
    parser.add_argument(
        "--longest_wait",
        type=float,
        default=600.0,
        help="seconds before any new start, at most",
    )
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    args = parser.parse_args()
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
