"""Checkpoints: state, data position, resolved configuration. Only this file imports orbax.

A run directory holds

  lock                        held with flock while a run writes here; the kernel releases it when
                              the run dies
  checkpoints/<step>/         one committed step: `state` (the arrays, orbax's format) and
                              `manifest` (JSON, ours)
  checkpoints/damaged-<step>  a step that did not verify, set aside when an older one took over;
                              we never delete it

orbax writes a step under a temporary name and renames it when it is complete, so a kill at any
moment leaves only whole steps. It does not notice bits that change later: hence a digest per array,
taken on the devices from what is saved and from what comes back. Nothing is unpickled: arrays are
read as numbers into a target that the caller names.
"""

import json
import logging as std_logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from gatedjax.errors import InputError, TrainingError
from gatedjax.training import manifest as manifests
from gatedjax.training.digests import Leaves, named_leaves
from gatedjax.training.run_directory import (
    DamagedError,
    failures_as_damage,
    lock_on_first_process,
    plain_errors,
    raise_together,
)


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    data_index: how many batches the data iterator had given when it was saved.
    """

    step: int
    state: PyTree
    data_index: int
    config: Mapping[str, Any]


class Checkpointer:
    """Saves a run's state in the background and brings back the newest step that verifies.

    Use as a context manager: a normal exit waits for the save in flight. On several processes each
    one constructs it and makes the same calls; the directory is one that all of them see.

    Args:
      run_dir: a local or mounted directory, made if it does not exist.
      config: the resolved configuration (`config.to_dict`), stored as JSON with each step.
      keep: how many of the newest steps stay. With 1 there is none to fall back on.
      read_only: for evaluation beside a running training: takes no lock, changes nothing, cannot
        save.
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
        place = os.fspath(run_dir)
        if "://" in place:
            expected = "a path; mount a bucket to write to it"
            raise InputError(f"run directory: got {place}, expected {expected}")
        if keep < 1:
            raise InputError(f"keep: got {keep}, expected at least 1")
        self.directory = Path(run_dir).absolute() / "checkpoints"
        # The round trip through JSON leaves what a checkpoint will give back: lists, not tuples.
        self._config = json.loads(json.dumps(dict(config or {})))
        self._read_only = read_only
        self._report = report
        self._step_in_flight: int | None = None
        self._lock = None
        # A failed save raises here, in one line; orbax would also log it, with its traceback, from
        # each of its threads.
        std_logging.getLogger("absl").addFilter(_not_from_orbax)
        if not read_only:
            with plain_errors(f"could not write to the run directory {run_dir}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = lock_on_first_process(self.directory.parent)
        elif not self.directory.is_dir():
            raise InputError(f"{run_dir}: holds no checkpoints")
        self._manager = _open_manager(self.directory, keep, read_only)

    def steps(self) -> list[int]:
        """The committed steps on disk, oldest first; a damaged one counts until it is set aside."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, *, data_index: int, wait: bool = False) -> None:
        """Starts saving. Returns once the state is copied off the devices and may be changed.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays, of any sharding.
          data_index: batches taken from the data iterator.
          wait: return only when the step is committed.

        Raises:
          InputError: this save, or the one before it, could not be written (disk full, no
            permission).
          ValueError: the step exists already, or a leaf is not an array or has a name that no file
            should have.
        """
        self.wait()
        if self._read_only:
            raise ValueError(f"step {step}: opened read-only")
        if step in self.steps():
            raise ValueError(f"step {step}: is saved already")
        leaves = named_leaves(state)
        manifest = manifests.make_manifest(step, data_index, self._config, leaves)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            manifest=ocp.args.JsonSave(manifest),
        )
        self._step_in_flight = step
        with plain_errors(self._save_of(step)):
            # force: orbax would otherwise skip, silently, a step that is not newer than the newest
            # on disk.
            self._manager.save(step, args=items, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight; InputError if the last one could not be written."""
        step = self._step_in_flight
        self._step_in_flight = None
        with plain_errors(self._save_of(step)):
            self._manager.wait_until_finished()

    def restore_latest(self, target: PyTree) -> Restored | None:
        """The newest step that verifies, or None where nothing was ever saved.

        A damaged step is reported, and the one before it is tried. When one verifies, the damaged
        ones are renamed to `damaged-<step>`, so that training can save those steps again.

        Args:
          target: a pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays): where and how
            the state comes back.

        Raises:
          InputError: a leaf of the target differs from the checkpoint's, named, with both shapes
            and dtypes; or every step is damaged.
        """
        self.wait()
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, target)
            except DamagedError as error:
                self._report(f"{self._damage(step, error)}; trying the one before it")
                damaged.append(step)
            else:
                self._set_aside(damaged)
                return restored
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise InputError(f"{self.directory}: no intact checkpoint left; damaged steps: {steps}")
        return None

    def restore(self, step: int, target: PyTree) -> Restored:
        """That step and no other.

        Raises:
          InputError: as `restore_latest`, or the step is absent or damaged.
        """
        self.wait()
        self._require_step(step)
        try:
            return self._read(step, target)
        except DamagedError as error:
            raise InputError(self._damage(step, error)) from None

    def config(self, step: int | None = None) -> Mapping[str, Any]:
        """The configuration saved with a step.

        Args:
          step: which one; by default the newest step whose manifest is intact.
        """
        if step is None:
            candidates = list(reversed(self.steps()))
        else:
            self._require_step(step)
            candidates = [step]
        for candidate in candidates:
            try:
                return self._manifest(candidate)["config"]
            except DamagedError as error:
                place = f"manifest of step {candidate} in {self.directory}"
                self._report(f"{place} is damaged: {error}")
        raise InputError(f"{self.directory}: no intact checkpoint to read a configuration from")

    def close(self) -> None:
        """Waits for the save in flight and releases the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_ours = exception_type in (None, InputError, TrainingError)
        if jax.process_count() > 1 and not is_ours:
            return  # a save in flight would wait for processes that may be gone
        try:
            self.close()
        except InputError as error:
            if exception_type is None:
                raise
            # The exception that ends the run matters more.
            self._report(str(error))

    def _save_of(self, step: int | None) -> str:
        return f"could not write the checkpoint of step {step} to {self.directory}"

    def _damage(self, step: int, error: DamagedError) -> str:
        return f"checkpoint of step {step} in {self.directory} is damaged: {error}"

    def _require_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            held = ", ".join(map(str, steps)) or "none"
            raise InputError(f"{self.directory}: no step {step}; it holds {held}")

    def _manifest(self, step: int) -> dict[str, Any]:
        """The verified body of a step's manifest."""
        with failures_as_damage(f"the manifest of step {step} in {self.directory}"):
            manifests.require_plain_files(self.directory / str(step))
            items = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
            return manifests.verified_body(restored["manifest"], step)

    def _read(self, step: int, target: PyTree) -> Restored:
        """A step, verified on all processes together."""
        wanted = named_leaves(target)
        body = {}
        leaves = {}
        problem = None
        try:
            body = self._manifest(step)
            manifests.require_same_leaves(
                self.directory / str(step),
                body,
                wanted,
                self._config,
            )
            leaves = self._arrays(step, body["leaves"], wanted)
        except (DamagedError, InputError) as error:
            problem = error
        # The digests are a collective: all processes come to it, or none.
        raise_together(problem)
        manifests.require_same_digests(body, leaves)
        in_order = [leaves[name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(target), in_order)
        return Restored(step, state, body["data_index"], body["config"])

    def _arrays(self, step: int, described: Mapping[str, Any], wanted: Leaves) -> Leaves:
        targets = {name: _with_sharding(name, leaf) for name, leaf in wanted.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
        with failures_as_damage(f"the arrays of step {step} in {self.directory}"):
            stored = self._manager.item_metadata(step)["state"].tree
            manifests.require_stored_as_described(stored, described)
            return self._manager.restore(step, args=items)["state"]

    def _set_aside(self, damaged: list[int]) -> None:
        """Renames damaged steps, so that their numbers are free again."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                with plain_errors(
                    f"could not set aside the damaged step {step} in {self.directory}"
                ):
                    (self.directory / str(step)).rename(self._free_name(step))
        raise_together(None)  # the others look at the directory only after the renames
        self._manager.reload()

    def _free_name(self, step: int) -> Path:
        free = self.directory / f"damaged-{step}"
        count = 0
        while free.exists():
            count += 1
            free = self.directory / f"damaged-{step}-{count}"
        return free


def read_config(run_dir: str | os.PathLike, step: int | None = None) -> Mapping[str, Any]:
    """The resolved configuration of a run, by default of its newest step.

    It is plain JSON, from which `config.from_config_dict` rebuilds the dataclasses. Raises
    InputError where there is none.
    """
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        return checkpointer.config(step)


def _with_sharding(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of one leaf.

    Its sharding is never left open: orbax would take it from a file of the checkpoint.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(f"target: got {name} without a sharding, expected one on each leaf")
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    # A sharding that does not divide the shape fails here, not as damage.
    sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _open_manager(directory: Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        read_only=read_only,
        create=not read_only,
        # What a killed run left; the lock says that nobody is writing it.
        cleanup_tmp_directories=not read_only,
        lightweight_initialize=True,
        save_root_metadata=False,
    )
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "manifest": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _not_from_orbax(record: std_logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}checkpoint{os.sep}" not in record.pathname
