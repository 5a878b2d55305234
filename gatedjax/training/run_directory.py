"""A run's directory: one writer at a time, and errors that are one line on all processes."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from gatedjax import buckets
from gatedjax.errors import PASSING_ERRNOS, InputError, StorageError
from gatedjax.files import kind_of
from gatedjax.paths import Place, is_bucket
from gatedjax.training import bucket_lock
from gatedjax.training.bucket_lock import BucketLock

# Errors of reading that say that files are missing or broken. Any other errno (permission, limit of
# open files) says nothing of the files themselves.
_ERRNOS_OF_DAMAGE = (errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR)
# What flock says on a file system that has no locks, such as Lustre mounted without them.
_ERRNOS_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LARGEST_HOLDER = 200
# In a bucket, what lines are added to is read first.
_LARGEST_APPENDED = 1 << 28
# What orbax writes last into a step in a bucket (`step_folders`).
COMMITTED = "commit_success.txt"
# A directory without any of these holds no run.
_OF_A_RUN = ("checkpoints", "metrics.jsonl")
# What the libraries of buckets raise without a number.
_ERRNOS_OF_TYPES: dict[type, int] = {
    FileNotFoundError: errno.ENOENT,
    NotADirectoryError: errno.ENOTDIR,
}


class DamagedError(Exception):
    """A step on disk that is not what was saved."""


def lock_on_first_process(
    run_dir: Place,
    report: Callable[[str], None],
) -> IO | BucketLock | None:
    """The lock on the first process, to be closed; None on the others.

    `report` is called with a line where the file system or the store has no locks, and before a
    wait.

    Raises:
      InputError: on all processes, if another run is writing to the directory.
    """
    lock = None
    problem = None
    if jax.process_index() == 0:
        try:
            lock = _take_lock(run_dir, report)
        except InputError as error:
            problem = error
    raise_together(problem)
    return lock


def _take_lock(run_dir: Place, report: Callable[[str], None]) -> IO | BucketLock:
    """Two runs in one directory would each resume from the other's steps."""
    if is_bucket(run_dir):
        return BucketLock(run_dir, report)
    return _take_flock(Path(run_dir), report)


def _take_flock(run_dir: Path, report: Callable[[str], None]) -> IO:
    with plain_errors(f"could not lock the run directory {run_dir}"):
        lock = _open_lock(run_dir / "lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock.read(_LARGEST_HOLDER).strip()
            lock.close()
            message = f"{run_dir}: another run is writing to this directory ({holder})"
            raise InputError(message) from None
        except OSError as error:
            if error.errno not in _ERRNOS_WITHOUT_LOCKS:
                raise
            report(
                f"{run_dir}: this file system has no locks ({error.strerror}); "
                "nothing but you keeps a second run out of this directory"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        return lock


def _open_lock(path: Path) -> IO:
    """Opens the lock, made if it is not there. It is emptied later: it must be a file of its own.

    Raises:
      InputError: a link, a pipe, or one of several names of a file.
    """
    with contextlib.suppress(FileNotFoundError):
        # Looked at before it is opened: to open some devices is to act on them.
        _require_own_file(path, path.lstat())
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        _require_own_file(path, os.fstat(descriptor))
    except InputError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")


def _require_own_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is {kind_of(status.st_mode)}, expected a file; remove it")
    if status.st_nlink > 1:
        raise InputError(f"{path}: is another name of some other file; remove it")


def identity_of_place(
    checkpoints: Place,
    lock: IO | BucketLock | None,
) -> list[tuple[int, int]]:
    """What stays the same as long as nobody moves or empties the directories under the run.

    In a bucket that is the lock alone, of which the first process knows.
    """
    if is_bucket(checkpoints):
        if isinstance(lock, BucketLock):
            lock.require_held()
        return []
    places = [checkpoints.parent, checkpoints]
    if lock is not None:
        # A directory that was emptied while the run wrote to it is the same one, without it.
        places.append(checkpoints.parent / "lock")
    with plain_errors(f"could not read {checkpoints}"):
        statuses = [os.stat(path) for path in places]
    return [(status.st_dev, status.st_ino) for status in statuses]


def require_same_place(
    checkpoints: Place,
    lock: IO | BucketLock | None,
    opened: list[tuple[int, int]],
) -> None:
    """InputError, on all processes, if the run directory is no longer the one that was opened.

    What is saved into another one that has taken its place would be lost, or overwrite it.
    """
    problem = None
    try:
        found = identity_of_place(checkpoints, lock)
    except InputError as error:
        problem = error
        found = None
    if found != opened and not is_bucket(checkpoints):
        run_dir = checkpoints.parent
        problem = InputError(
            f"{run_dir}: was removed, renamed or replaced while the run was writing to it"
        )
    raise_together(problem)


def set_aside(run_dir: Place, report: Callable[[str], None]) -> None:
    """Gives the run in a directory another name: NAME.1, NAME.2 ... Nothing where there is no run.

    `report` is called with a line that says so. On several processes all return after the rename.
    In a bucket everything is copied and then deleted: a kill in between leaves both.

    Raises:
      InputError: on all processes, if another run is writing to the directory, if it is the working
        folder or above it, or if it cannot be renamed.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            _set_aside(run_dir, report)
        except InputError as error:
            problem = error
    raise_together(problem)


def _set_aside(run_dir: Place, report: Callable[[str], None]) -> None:
    with plain_errors(f"--fresh: could not read {run_dir}"):
        exists = buckets.exists if is_bucket(run_dir) else os.path.exists
        if not any(exists(run_dir / name) for name in _OF_A_RUN):
            return
    if is_bucket(run_dir):
        lock = _take_lock(run_dir, report)
        with contextlib.closing(lock), plain_errors(f"--fresh: could not move {run_dir}"):
            free = _free_name(run_dir)
            buckets.move(run_dir, free, marker=COMMITTED, leave=bucket_lock.PREFIX)
        report(f"--fresh: the run in {run_dir} is kept as {free}")
        return
    if Path.cwd().is_relative_to(run_dir.resolve()):
        raise InputError(f"--fresh: {run_dir} is the working folder, or above it: move it yourself")
    lock = _take_flock(Path(run_dir), report)
    with lock, plain_errors(f"--fresh: could not rename {run_dir}"):
        free = _free_name(run_dir.absolute())
        os.rename(run_dir.absolute(), free)
    report(f"--fresh: the run in {run_dir} is kept as {run_dir.with_name(free.name)}")


def _free_name(path: Place) -> Place:
    for number in itertools.count(1):
        free = path.with_name(f"{path.name}.{number}")
        is_taken = buckets.exists(free) if is_bucket(free) else os.path.lexists(free)
        if not is_taken:
            return free
    raise AssertionError("numbers have no end")


def replace_file(path: Place, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, finds the old content or the new one."""
    if is_bucket(path):
        buckets.write(path, data)
        return
    partial = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def append_line(path: Place, line: str) -> None:
    """Adds a line to a file. In a bucket the object is written anew."""
    if not is_bucket(path):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
        return
    before = b""
    with contextlib.suppress(FileNotFoundError):
        before = buckets.read(path, _LARGEST_APPENDED)
    buckets.write(path, before + line.encode())


def raise_together(problem: DamagedError | InputError | None) -> None:
    """Raises `problem`, or on processes that had none the worst kind of problem of the others.

    All processes must take the same path: a collective that some of them skip never ends.
    """
    severity = _severity(problem)
    worst = severity
    if jax.process_count() > 1:
        everybodys = multihost_utils.process_allgather(np.asarray(severity))
        worst = int(np.max(everybodys))
    if problem is not None and severity == worst:
        raise problem
    if worst == 0:
        return
    message = "another process could not use the run directory; its own message says why"
    raise _KINDS[worst - 1](message)


# From the mildest: an older step may do; the same command may succeed later; it will not.
_KINDS = (DamagedError, StorageError, InputError)


def _severity(problem: DamagedError | InputError | None) -> int:
    """0 for none, else the place of its kind in `_KINDS`, from 1."""
    if problem is None:
        return 0
    kinds = [i for i, kind in enumerate(_KINDS, start=1) if isinstance(problem, kind)]
    return min(kinds)


@contextlib.contextmanager
def plain_errors(attempt: str) -> Iterator[None]:
    """An error of the operating system becomes an InputError: the attempt that failed, and why.

    A StorageError, if the disk may work again.

    Anything else is a bug and keeps its traceback.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        code = _errno_of(error)
        if code is not None:
            kind = StorageError if code in PASSING_ERRNOS else InputError
            raise kind(f"{attempt}: {os.strerror(code)}") from error
        found = buckets.trouble(error)
        if found is None:
            raise
        kind = StorageError if found.passes else InputError
        raise kind(f"{attempt}: {found.reason}") from error


@contextlib.contextmanager
def failures_as_damage(what: str) -> Iterator[None]:
    """Any failure to read `what` becomes a DamagedError.

    Except a failure that says nothing of the files: memory, permission, the limit of open files.
    """
    try:
        yield
    except (DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        code = _errno_of(error)
        found = buckets.trouble(error) if code is None else None
        if found is not None:
            kind = StorageError if found.passes else InputError
            raise kind(f"could not read {what}: {found.reason}") from error
        if code is not None and code not in _ERRNOS_OF_DAMAGE:
            kind = StorageError if code in PASSING_ERRNOS else InputError
            raise kind(f"could not read {what}: {os.strerror(code)}") from error
        raise DamagedError(_first_line(error)) from error


def _errno_of(error: Exception) -> int | None:
    """The errno of an exception, None if it has none.

    Array files are read and written by tensorstore, which says it in the text.
    """
    if isinstance(error, OSError):
        return error.errno or _ERRNOS_OF_TYPES.get(type(error))
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    first = lines[0][:200] if lines else ""
    return f"{type(error).__name__}: {first}"
