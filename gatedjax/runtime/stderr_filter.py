"""Makes one line on stderr of jax's C++ messages about a lost process, which fill pages.

jax's coordination service ends every process of a run when one of them is lost: by abort(), after a
stack trace, from a thread of its own. No Python runs any more at that moment, so the filter is a
process of its own that reads our stderr through a pipe. It is this very file, run as a script: it
imports nothing of ours and starts in a moment.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

LOST = "error: another process of this run was lost or cannot be reached ({reason})"
INTACT = "; the last checkpoint is intact"

_FATAL = re.compile(
    r"^F\d{4} .*Terminating process because the JAX distributed service.*?"
    r"(?:absl::Status: (.*))?$"
)
_NOISE = re.compile(
    r"^[EWI]\d{4} .*(coordination_service|preemption_|grpc)"
    r"|^=== Source Location Trace|^external/xla|^RPC: /xla"
    r"|^Additional GRPC error|^:UNAVAILABLE|^The tasks have crashed"
    r"|^learning/|^\. This is only expected"
    r"|^\[Gloo\] Rank|^:?\{.*grpc|^/?job:|^ for task: |^\s*$"
)
_NUMBER = re.compile(r"^\d+$")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_installed = False


def install(checkpoints: Path | None = None) -> None:
    """Sends file descriptor 2 of this process through the filter, once.

    Args:
      checkpoints: the folder in which this command saves steps, if it does.
    """
    global _installed
    if _installed:
        return
    _installed = True
    sys.stderr.flush()
    reading, writing = os.pipe()
    # A session of its own: signals that are meant for the run must not end the filter before it has
    # read the end.
    folder = [] if checkpoints is None else [str(checkpoints.absolute())]
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *folder],
        stdin=reading,
        start_new_session=True,
        close_fds=True,
    )
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)


def intact(checkpoints: Path | None) -> str:
    """What can be said of a command's checkpoints when it fails: nothing, where there are none."""
    if checkpoints is None:
        return ""
    try:
        names = os.listdir(checkpoints)
    except OSError:
        return ""
    return INTACT if any(name.isdigit() for name in names) else ""


def filtered(lines: Iterable[str], checkpoints: Path | None = None) -> Iterator[str]:
    """The lines worth reading. After a fatal one there is only its stack trace."""
    is_past_fatal = False
    for line in lines:
        text = line.rstrip("\n")
        fatal = _FATAL.match(text)
        if fatal:
            status = fatal[1] or "no answer"
            reason = status.split(". ")[0].strip().rstrip(":")
            yield LOST.format(reason=reason) + intact(checkpoints) + "\n"
            is_past_fatal = True
            continue
        is_noise = _NOISE.match(text) or _NUMBER.match(text)
        if not is_past_fatal and not is_noise:
            yield line


def main() -> None:
    """Filters standard input to stderr until the run closes it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Bytes that are not UTF-8 must not end the filter.
    lines = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115 (open for its whole life)
    checkpoints = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in filtered(lines, checkpoints):
        # Who reads stderr may be gone. The run must still be able to write to the pipe.
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()


if __name__ == "__main__":
    main()
