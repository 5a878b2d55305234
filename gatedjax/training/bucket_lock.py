"""One writer at a time in a run directory that is in a bucket.

Object stores have no locks that end with their holder. They can create an object unless there is
one of its name, and that is all that is needed here (Cloud Storage: `ifGenerationMatch=0`; S3:
`If-None-Match: *`). The holder is whoever created the object `lock-N` of the largest N. It writes
to it every `BEAT_SECONDS`; who comes later looks for `LEASE_SECONDS` whether it still does, and if
not creates `lock-<N+1>`, which only one of several can. The former holder, if it was only
suspended, finds that before its next checkpoint, and ends. No clocks are compared.

The newest lock stays when a run ends, marked as free, so that numbers never come again.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatedjax import buckets
from gatedjax.errors import InputError
from gatedjax.paths import Place

BEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0
PREFIX = "lock-"

_NAME = re.compile(rf"{PREFIX}([1-9]\d{{0,17}})", re.ASCII)
_LARGEST = 1 << 16


class BucketLock:
    """The lock of a run directory in a bucket, held from its making to `close`.

    Raises:
      InputError: another run is writing to the directory, or the store refuses.
    """

    def __init__(self, run_dir: Place, report: Callable[[str], None]):
        """Takes the lock; where the last holder may still be alive, after looking for a while.

        Args:
          run_dir: in a bucket.
          report: called with a line before it waits, and where the store has no locks.
        """
        self._run_dir = run_dir
        self._id = secrets.token_hex(8)
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="bucket-lock")
        with buckets.errors(f"could not lock the run directory {run_dir}", run_dir):
            last = self._newest()
            if last:
                self._require_free(last, report)
            self._number = last + 1
            if not self._create():
                raise InputError(f"{run_dir}: another run has just begun to write to it")
            if self._creates_again():
                report(
                    f"{run_dir}: this store writes over what it was asked not to: it has no locks; "
                    "nothing but you keeps a second run out of this directory"
                )
            outdated = [f"{PREFIX}{number}" for number in self._numbers() if number <= last]
            buckets.delete(run_dir, outdated)
        self._thread.start()

    def require_held(self) -> None:
        """InputError if another run has taken the directory, or it was emptied."""
        with buckets.errors(f"could not read {self._run_dir}", self._run_dir):
            newest = self._newest()
        if newest > self._number:
            raise InputError(
                f"{self._run_dir}: another run has taken this directory: this one had not been "
                f"heard of for {LEASE_SECONDS:.0f} s"
            )
        if newest < self._number:
            raise InputError(f"{self._run_dir}: was removed while the run was writing to it")

    def close(self) -> None:
        """Gives the directory free. What cannot be written now, is found out by who comes next."""
        self._stop.set()
        self._thread.join()
        try:
            self._write(is_held=False)
        except Exception as error:
            if buckets.trouble(error) is None and not isinstance(error, OSError):
                raise

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        files = buckets.file_system(self._run_dir)
        names = files.find(os.fspath(self._run_dir), prefix=PREFIX)
        found = (_NAME.fullmatch(name.rpartition("/")[2]) for name in names)
        return [int(name[1]) for name in found if name]

    def _path(self, number: int) -> Place:
        return self._run_dir / f"{PREFIX}{number}"

    def _content(self, is_held: bool) -> bytes:
        self._beats += 1
        content = {
            "held": is_held,
            "id": self._id,
            "beat": self._beats,
            "by": f"process {os.getpid()} on {socket.gethostname()}",
            "pid": os.getpid(),
            "machine": _machine(),
        }
        return json.dumps(content).encode()

    def _create(self) -> bool:
        path = self._path(self._number)
        if buckets.create(path, self._content(is_held=True)):
            return True
        # A request that was sent again, for want of an answer, has met itself.
        return _parsed(buckets.read(path, _LARGEST)).get("id") == self._id

    def _creates_again(self) -> bool:
        """Whether the store takes no notice of the condition."""
        return buckets.create(self._path(self._number), self._content(is_held=True))

    def _write(self, is_held: bool) -> None:
        buckets.write(self._path(self._number), self._content(is_held))

    def _beat(self) -> None:
        """The thread. A beat that fails is made up for by the next one."""
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._write(is_held=True)
            except Exception as error:
                # Printed by nobody: `require_held` asks the same store, and says what is wrong.
                if buckets.trouble(error) is None and not isinstance(error, OSError):
                    raise

    def _require_free(self, number: int, report: Callable[[str], None]) -> None:
        """InputError if the holder of a lock is alive; may take `LEASE_SECONDS`."""
        path = self._path(number)
        before = _parsed(buckets.read(path, _LARGEST))
        if not before.get("held") or _is_dead_here(before):
            return
        by = before.get("by")
        report(
            f"{self._run_dir}: locked by {by}; looking for up to {LEASE_SECONDS:.0f} s whether "
            "that run is alive"
        )
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(BEAT_SECONDS / 2, max(deadline - time.monotonic(), 0)))
            now = _parsed(buckets.read(path, _LARGEST))
            if not now.get("held"):
                return
            if now != before:
                raise InputError(
                    f"{self._run_dir}: another run is writing to this directory ({by})"
                )


def _parsed(content: bytes) -> dict[str, Any]:
    """What a lock says; {} if that is nothing."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_dead_here(content: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    machine = _machine()
    pid = content.get("pid")
    if machine is None or content.get("machine") != machine or not isinstance(pid, int):
        return False
    return not Path("/proc", str(pid)).exists()


def _machine() -> str | None:
    """Where process numbers mean what they mean here: this boot, this space of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
