"""Starts a command again when it crashes: for machines without a scheduler that would do it.

    python -m gatedjax.runtime.supervise [--tries=5] [--wait=10] [--longest_wait=600] -- python train.py --config=...

Exit code 0 (finished, or stopped by SIGTERM) and 2 (bad input: it would fail again) end it, with
that code. All others are crashes: the command is started again after `wait` seconds, twice as long
after each further crash, and given up after `tries` crashes in a row. A command that ran for ten
minutes has made progress: the counting starts over. SIGTERM and SIGINT go on to the command. On
several machines, run one on each: when a process is lost the others stop by themselves, and all
meet again at the coordinator.

Imports nothing but the standard library: what is broken in an environment must not stop it from
saying so.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PROGRESS_SECONDS = 600.0
FINAL = (0, 2)


def supervise(command: Sequence[str], tries: int, wait: float, longest_wait: float) -> int:
    """Runs `command` until it ends for good; returns its exit code (128 + n after signal n)."""
    stopped: list[int] = []
    crashes = 0
    while True:
        start = time.monotonic()
        code = _run(command, stopped)
        if code in FINAL or stopped:
            return code
        crashes = 1 if time.monotonic() - start > PROGRESS_SECONDS else crashes + 1
        what = (
            f"signal {code - 128} ({signal.Signals(code - 128).name})"
            if code > 128
            else f"exit code {code}"
        )
        if crashes > tries:
            _say(f"{what}; {crashes} crashes in a row, giving up")
            return code
        seconds = min(wait * 2 ** (crashes - 1), longest_wait)
        _say(f"{what}; crash {crashes} in a row, starting again in {seconds:g} s")
        if _sleep(seconds, stopped):
            return code


def _run(command: Sequence[str], stopped: list[int]) -> int:
    process = subprocess.Popen(command)

    def forward(number, _):
        stopped.append(number)
        process.send_signal(number)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, forward)
    code = process.wait()
    return 128 - code if code < 0 else code


def _sleep(seconds: float, stopped: list[int]) -> bool:
    """Whether a signal came meanwhile."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: stopped.append(number))
    end = time.monotonic() + seconds
    while not stopped and time.monotonic() < end:
        time.sleep(min(0.1, max(end - time.monotonic(), 0.0)))
    return bool(stopped)


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gatedjax.runtime.supervise", description="Starts a command again when it crashes."
    )
    parser.add_argument("--tries", type=int, default=5, help="crashes in a row before it gives up")
    parser.add_argument(
        "--wait", type=float, default=10.0, help="seconds before the first new start"
    )
    parser.add_argument(
        "--longest_wait", type=float, default=600.0, help="seconds before any new start, at most"
    )
    parser.add_argument("command", nargs="+", help="after --: the command and its arguments")
    args = parser.parse_args()
    try:
        code = supervise(args.command, args.tries, args.wait, args.longest_wait)
    except OSError as e:
        _say(f"{args.command[0]}: {e.strerror}")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
