"""Checkpoints: state, data position and resolved configuration, with a digest per array. Only this file imports orbax.

A run directory holds

  lock                      held with flock while a run writes here; the kernel lets go of it when the run dies
  checkpoints/<step>/       one committed step: `state` (the arrays, orbax's format) and `manifest` (JSON, ours)
  checkpoints/damaged-<step>   a step that did not verify, set aside when an older one took over; ours never deletes it

orbax writes a step under a temporary name and renames it when it is complete, so a kill at any moment leaves only whole
steps. It does not notice bits that change later: hence a digest per array, taken on the devices from what is saved and
from what comes back. Nothing is unpickled: arrays are read as numbers into a target that the caller names.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging as std_logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from gatedjax.config import differing_keys
from gatedjax.errors import InputError, TrainingError
from gatedjax.training.digests import Leaves, describe, digests_of, named_leaves

# Files of a step that are parsed as a whole. A leaf takes about 500 bytes in them.
_DESCRIPTIONS = ("manifest/metadata", "state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA")
_LARGEST_DESCRIPTION = 1 << 28


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint: the state, and how many batches the data iterator had given when it was saved."""

    step: int
    state: PyTree
    data_index: int
    config: Mapping[str, Any]


class _DamagedError(Exception):
    """A step on disk that is not what was saved."""


class Checkpointer:
    """Saves a run's state in the background and brings back the newest step that verifies.

    Use as a context manager: a normal exit waits for the save in flight. On several processes each one constructs it
    and makes the same calls; the directory is one that all of them see.

    Args:
      run_dir: a local or mounted directory, made if it does not exist.
      config: the resolved configuration (`config.to_dict`), stored as JSON with each step.
      keep: how many of the newest steps stay. With 1 there is none to fall back on.
      read_only: for evaluation beside a running training: takes no lock, changes nothing, cannot save.
      report: called with one line when a damaged step is found.

    Raises:
      InputError: the directory cannot be used, or another run is writing to it.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        config: Mapping[str, Any] | None = None,
        *,
        keep: int = 3,
        read_only: bool = False,
        report: Callable[[str], None] = logging.warning,
    ):
        if "://" in os.fspath(run_dir):
            raise InputError(
                f"run directory: got {os.fspath(run_dir)}, expected a path; mount a bucket to write to it"
            )
        if keep < 1:
            raise InputError(f"keep: got {keep}, expected at least 1")
        self.directory = Path(run_dir).absolute() / "checkpoints"
        self._config = json.loads(json.dumps(dict(config or {})))
        self._read_only, self._report = read_only, report
        self._saving: int | None = None
        self._lock = None
        # A failed save raises here, in one line; orbax would also log it, with its traceback, from each of its threads.
        std_logging.getLogger("absl").addFilter(_not_from_orbax)
        if not read_only:
            with _plain_errors(f"could not write to the run directory {run_dir}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = _lock_on_first_process(self.directory.parent)
        elif not self.directory.is_dir():
            raise InputError(f"{run_dir}: holds no checkpoints")
        self._manager = _open_manager(self.directory, keep, read_only)

    def steps(self) -> list[int]:
        """The committed steps on disk, oldest first; a damaged one counts until it is set aside."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, *, data_index: int, wait: bool = False) -> None:
        """Starts saving; returns once the state is copied off the devices, so that it may be donated or changed.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays, of any sharding.
          data_index: batches taken from the data iterator.
          wait: return only when the step is committed.

        Raises:
          InputError: this save, or the one before it, could not be written (disk full, no permission).
          ValueError: the step exists already, or a leaf is not an array or has a name that no file should have.
        """
        self.wait()
        if self._read_only or step in self.steps():
            raise ValueError(
                f"step {step}: {'opened read-only' if self._read_only else 'is saved already'}"
            )
        leaves = named_leaves(state)
        digests = digests_of(leaves)
        described = {n: describe(x) | {"digest": digests[n]} for n, x in leaves.items()}
        body = {"step": step, "data_index": data_index, "config": self._config, "leaves": described}
        manifest = {"body": body, "sha256": _sha256(body)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), manifest=ocp.args.JsonSave(manifest)
        )
        self._saving = step
        with _plain_errors(self._cannot_write(step)):
            # force: orbax would otherwise skip, silently, a step that is not newer than the newest on disk.
            self._manager.save(step, args=args, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight; raises InputError if the last one could not be written."""
        step, self._saving = self._saving, None
        with _plain_errors(self._cannot_write(step)):
            self._manager.wait_until_finished()

    def restore_latest(self, target: PyTree) -> Restored | None:
        """The newest step that verifies, or None where nothing was ever saved.

        A damaged step is reported, and the one before it is tried. When one verifies, the damaged ones are renamed to
        `damaged-<step>`, so that training can save those steps again.

        Args:
          target: a pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays): where and how the state comes back.

        Raises:
          InputError: a leaf of the target differs from the checkpoint's, named, with both shapes and dtypes; or every
            step is damaged.
        """
        self.wait()
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, target)
            except _DamagedError as e:
                self._report(
                    f"checkpoint of step {step} in {self.directory} is damaged: {e}; trying the one before it"
                )
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise InputError(f"{self.directory}: no intact checkpoint left; damaged steps: {steps}")
        return None

    def restore(self, step: int, target: PyTree) -> Restored:
        """That step and no other. Raises InputError as `restore_latest` does, or if the step is absent or damaged."""
        self.wait()
        self._require_step(step)
        try:
            return self._read(step, target)
        except _DamagedError as e:
            raise InputError(
                f"checkpoint of step {step} in {self.directory} is damaged: {e}"
            ) from None

    def config(self, step: int | None = None) -> Mapping[str, Any]:
        """The configuration saved with this step; by default with the newest step whose manifest is intact."""
        if step is not None:
            self._require_step(step)
        for s in reversed(self.steps()) if step is None else [step]:
            try:
                return self._manifest(s)["config"]
            except _DamagedError as e:
                self._report(f"manifest of step {s} in {self.directory} is damaged: {e}")
        raise InputError(f"{self.directory}: no intact checkpoint to read a configuration from")

    def close(self) -> None:
        """Waits for the save in flight and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exception_type, *_) -> None:
        if jax.process_count() > 1 and exception_type not in (None, InputError, TrainingError):
            return  # a save in flight would wait for processes that may be gone
        try:
            self.close()
        except InputError as e:
            if exception_type is None:
                raise
            self._report(str(e))  # the exception on its way out matters more

    def _cannot_write(self, step: int | None) -> str:
        return f"could not write the checkpoint of step {step} to {self.directory}"

    def _require_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            raise InputError(
                f"{self.directory}: no step {step}; it holds {', '.join(map(str, steps)) or 'none'}"
            )

    def _manifest(self, step: int) -> dict[str, Any]:
        with _as_damage(f"the manifest of step {step} in {self.directory}"):
            _require_plain_files(self.directory / str(step))
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            manifest = self._manager.restore(step, args=args)["manifest"]
            body, sha256 = manifest["body"], manifest["sha256"]
            if sha256 != _sha256(body) or body["step"] != step:
                raise _DamagedError("the manifest does not match its checksum")
            return body

    def _read(self, step: int, target: PyTree) -> Restored:
        wanted = named_leaves(target)
        problem = None
        try:
            manifest = self._manifest(step)
            saved = manifest["leaves"]
            self._require_same_leaves(step, manifest, wanted)
            leaves = self._arrays(step, saved, wanted)
        except (_DamagedError, InputError) as e:
            problem = e
        _raise_together(problem)
        digests = digests_of(leaves)
        for name in wanted:
            if digests[name] != saved[name]["digest"]:
                raise _DamagedError(
                    f"{name} is not what was saved (digest {digests[name]}, {saved[name]['digest']})"
                )
        state = jax.tree.unflatten(jax.tree.structure(target), [leaves[n] for n in wanted])
        return Restored(step, state, manifest["data_index"], manifest["config"])

    def _require_same_leaves(self, step: int, manifest: Mapping[str, Any], wanted: Leaves) -> None:
        """InputError naming the first leaf that differs, and the keys of the configuration that do."""
        saved = manifest["leaves"]
        for name in [*wanted, *(n for n in saved if n not in wanted)]:
            came = _show(saved[name]) if name in saved else "nothing"
            want = _show(describe(wanted[name])) if name in wanted else "nothing"
            if came != want:
                keys = differing_keys(manifest["config"], self._config) if self._config else []
                because = (
                    f"; {'; '.join(k.replace(' and ', ' there, now ') for k in keys)}"
                    if keys
                    else ""
                )
                place = self.directory / str(step)
                raise InputError(
                    f"{place} does not fit this configuration: {name} is {came} there, expected {want}{because}"
                )

    def _arrays(self, step: int, saved: Mapping[str, Any], wanted: Leaves) -> Leaves:
        args = ocp.args.StandardRestore({n: _with_sharding(n, x) for n, x in wanted.items()})
        with _as_damage(f"the arrays of step {step} in {self.directory}"):
            _require_stored_as_described(self._manager.item_metadata(step)["state"].tree, saved)
            return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def _set_aside(self, damaged: list[int]) -> None:
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                names = (f"damaged-{step}" + (f"-{i}" if i else "") for i in range(1000))
                free = next(n for n in names if not (self.directory / n).exists())
                with _plain_errors(
                    f"could not set aside the damaged step {step} in {self.directory}"
                ):
                    (self.directory / str(step)).rename(self.directory / free)
        _raise_together(None)  # the others look at the directory only after the renames
        self._manager.reload()


def read_config(run_dir: str | os.PathLike, step: int | None = None) -> Mapping[str, Any]:
    """The resolved configuration of a run, by default of its newest step: plain JSON, from which
    `config.from_config_dict` rebuilds the dataclasses. Raises InputError where there is none."""
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        return checkpointer.config(step)


def _show(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}[{', '.join(map(str, description['shape']))}]"


def _require_plain_files(step: Path) -> None:
    """Before anything of a step is read: no link that leads elsewhere, no description too large to parse."""
    for folder, folders, files in os.walk(step):
        for path in (Path(folder, name) for name in [*folders, *files]):
            if path.is_symlink():
                raise _DamagedError(f"{path.relative_to(step)} is a link")
    for path in (step / name for name in _DESCRIPTIONS):
        if path.is_file() and path.stat().st_size > _LARGEST_DESCRIPTION:
            raise _DamagedError(f"{path.relative_to(step)} has {path.stat().st_size:,} bytes")


def _require_stored_as_described(stored: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """What the array store says of itself, checked before any array is read: a file from elsewhere could name paths
    outside its directory, or sizes that fill the memory."""
    if set(stored) != set(described):
        raise _DamagedError(
            f"arrays and manifest disagree on {', '.join(set(stored) ^ set(described))}"
        )
    for name, array in stored.items():
        shape, chunk = tuple(array.shape), tuple(array.storage.chunk_shape)
        as_described = describe(array) == {k: described[name][k] for k in ("shape", "dtype")}
        if (
            array.name != name
            or not as_described
            or any(c > max(n, 1) for c, n in zip(chunk, shape))
        ):
            raise _DamagedError(
                f"{name} is stored as {array.name} {_show(describe(array))} in chunks of {chunk}"
            )


def _with_sharding(name: str, x: Any) -> jax.ShapeDtypeStruct:
    """The target of one leaf. Its sharding is never left open: orbax would take it from a file of the checkpoint."""
    sharding = getattr(x, "sharding", None)
    if sharding is None and jax.process_count() > 1:
        raise ValueError(f"target: got {name} without a sharding, expected one on each leaf")
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    sharding.shard_shape(x.shape)  # one that does not divide the shape fails here, not as damage
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _open_manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,  # what a killed run left; the lock says that nobody is writing it
        lightweight_initialize=True,
        save_root_metadata=False,
    )
    handlers = {"state": ocp.StandardCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _lock_on_first_process(run_dir: Path) -> IO | None:
    lock, problem = None, None
    if jax.process_index() == 0:
        try:
            lock = _take_lock(run_dir)
        except InputError as e:
            problem = e
    _raise_together(problem)
    return lock


def _take_lock(run_dir: Path) -> IO:
    """Two runs in one directory would each resume from the other's steps."""
    with _plain_errors(f"could not lock the run directory {run_dir}"):
        lock = open(run_dir / "lock", "a+")  # noqa: SIM115 (open as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise InputError(
                f"{run_dir}: another run is writing to this directory ({holder})"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        return lock


def _raise_together(problem: _DamagedError | InputError | None) -> None:
    """Raises `problem`, and the worst kind of problem on the processes that had none: all must take the same path."""
    kinds = [type(None), _DamagedError, InputError]
    worst = kinds.index(type(problem))
    if jax.process_count() > 1:
        worst = int(np.max(multihost_utils.process_allgather(np.asarray(worst))))
    if problem is not None and kinds.index(type(problem)) == worst:
        raise problem
    if worst:
        raise kinds[worst](
            "another process could not use the run directory; its own message says why"
        )


def _os_error(e: Exception) -> int | None:
    """The errno of an exception; array files are read and written by tensorstore, which says it in the text."""
    if isinstance(e, OSError):
        return e.errno
    found = re.search(r"os_error_code='(\d+)'", str(e))
    return int(found[1]) if found else None


def _first_line(e: Exception) -> str:
    lines = str(e).splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """The operating system's refusal as one line; anything else is a bug and keeps its traceback."""
    try:
        yield
    except Exception as e:
        if isinstance(e, InputError) or _os_error(e) is None:
            raise
        raise InputError(f"{doing}: {os.strerror(_os_error(e))}") from e


@contextlib.contextmanager
def _as_damage(what: str) -> Iterator[None]:
    """Any failure to read is damage, except one that says nothing of the files: memory, permission, open-file limit."""
    try:
        yield
    except (_DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        if _os_error(e) not in (None, errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR):
            raise InputError(f"could not read {what}: {os.strerror(_os_error(e))}") from e
        raise _DamagedError(_first_line(e)) from e


def _not_from_orbax(record: std_logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname
