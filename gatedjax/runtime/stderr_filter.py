"""Turns what jax's C++ says of a lost process, pages of it, into one line on stderr.

jax's coordination service ends every process of a run when one of them is lost: by abort(), after a
stack trace, from a thread of its own. No Python runs any more at that moment, so the filter is a
process of its own that reads our stderr through a pipe. It is this very file, run as a script: it
imports nothing of ours and starts in a moment.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

LOST = "error: another process of this run was lost or cannot be reached ({reason}); the last checkpoint is intact"

_FATAL = re.compile(
    r"^F\d{4} .*Terminating process because the JAX distributed service.*?(?:absl::Status: (.*))?$"
)
_NOISE = re.compile(
    r"^[EWI]\d{4} .*(coordination_service|preemption_|grpc)|^=== Source Location Trace|^external/xla|^RPC: /xla|"
    r"^Additional GRPC error|^:UNAVAILABLE|^The tasks have crashed|^learning/|^\. This is only expected|"
    r"^\[Gloo\] Rank|^:?\{.*grpc|^/?job:|^\s*$"
)
_installed = False


def install() -> None:
    """Sends file descriptor 2 of this process through the filter, once."""
    global _installed
    if _installed:
        return
    _installed = True
    sys.stderr.flush()
    reading, writing = os.pipe()
    # A session of its own: signals that are meant for the run must not end the filter before it has
    # read the end.
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=reading,
        start_new_session=True,
        close_fds=True,
    )
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)


def filtered(lines: Iterable[str]) -> Iterator[str]:
    """The lines worth reading. After a fatal one there is only its stack trace."""
    fatal, number = False, re.compile(r"^\d+$")
    for line in lines:
        text = line.rstrip("\n")
        found = _FATAL.match(text)
        if found:
            reason = (found[1] or "no answer").split(". ")[0].strip().rstrip(":")
            yield LOST.format(reason=reason) + "\n"
            fatal = True
        elif not (fatal or _NOISE.match(text) or number.match(text)):
            yield line


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    lines = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115 (the whole life of this process)
    for line in filtered(lines):
        sys.stderr.write(line)
        sys.stderr.flush()


if __name__ == "__main__":
    main()
