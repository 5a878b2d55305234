"""Checkpoints: state, data position, resolved configuration.

A run directory, on a file system or in a bucket, holds

  lock                        held with flock while a run writes here; the kernel releases it when
                              the run dies. In a bucket lock-N (`bucket_lock`)
  checkpoints/<step>/         one committed step: `state` (the arrays, orbax's format) and
                              `manifest` (JSON, ours)
  checkpoints/damaged-<step>  a step that did not verify, set aside when an older one took over;
                              we never delete it
  checkpoints/exploded-<step> a step of a run that gave up, saved after it had begun to explode;
                              the next one of that number replaces it
  tokenizer.json              the tokenizer, where it is a file (`identity`)

A kill at any moment leaves only whole steps (`step_folders`). orbax's manager looks into all steps
at once, so it is opened only to save, and only after every step was found to hold plain files.
orbax does not notice bits that change later: hence a digest per array, taken on the devices from
what is saved and from what comes back.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from gatedjax.errors import InputError, TrainingError, printable
from gatedjax.files import require_utf8
from gatedjax.paths import expand_place, is_bucket
from gatedjax.training import manifest as manifests
from gatedjax.training import orbax_store, ownership, saved_step, step_folders
from gatedjax.training.digests import Leaves, named_leaves
from gatedjax.training.preservation import NewestAndSound
from gatedjax.training.quiet_orbax import QuietOrbax, drop_late_callbacks
from gatedjax.training.run_directory import (
    DamagedError,
    identity_of_place,
    lock_on_first_process,
    plain_errors,
    raise_together,
    require_same_place,
)
from gatedjax.training.saved_step import Restored


class Checkpointer:
    """Saves a run's state in the background and brings back the newest step that verifies.

    Use as a context manager: a normal exit waits for the save in flight. On several processes each
    one constructs it and makes the same calls; the directory is one that all of them see.

    Args:
      run_dir: a directory, made if it does not exist, or gs://BUCKET/PATH, s3://BUCKET/PATH.
      config: the resolved configuration (`config.to_dict`), stored as JSON with each step.
      data: what the data are (`identity.identity_of`), stored likewise.
      keep: how many of the newest steps stay, besides the newest sound one (`preservation`). With 1
        there is none to fall back on.
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
        data: Mapping[str, Any] | None = None,
        keep: int = 3,
        read_only: bool = False,
        report: Callable[[str], None] | None = None,
    ):
        if keep < 1:
            raise InputError(f"keep: got {keep}, expected at least 1")
        place = expand_place(run_dir, "run directory")
        if not is_bucket(place):
            place = place.absolute()
        self.directory = place / step_folders.FOLDER
        require_utf8("run directory", self.directory)
        # The round trip through JSON leaves what a checkpoint will give back: lists, not tuples.
        self._config = json.loads(json.dumps(dict(config or {})))
        self._data = dict(data or {})
        self._read_only = read_only
        self._report_line = report or _log_warning
        self._step_in_flight: int | None = None
        self._lock = None
        self._is_noted = False
        self._preservation = NewestAndSound(keep)
        self._quiet = QuietOrbax()
        if not read_only:
            with plain_errors(f"could not write to the run directory {run_dir}"):
                if not is_bucket(place):
                    self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = lock_on_first_process(place, self._report)
        elif not self._is_there():
            raise InputError(f"{run_dir}: holds no checkpoints")
        self._identity = identity_of_place(self.directory, self._lock)
        self._manager_if_open: orbax_store.Manager | None = None

    def _is_there(self) -> bool:
        if is_bucket(self.directory):
            return bool(self.steps())
        return self.directory.is_dir()

    def steps(self) -> list[int]:
        """The committed steps, oldest first; a damaged one counts until it is set aside."""
        return step_folders.steps(self.directory)

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data_index: int,
        places: Mapping[str, Any] | None = None,
        wait: bool = False,
        loss: float | None = None,
        skipped_in_a_row: int = 0,
    ) -> None:
        """Starts saving. Returns once the state is copied off the devices and may be changed.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays, of any sharding.
          data_index: rows taken from the data (`BatchIterator.next_index`).
          places: where streams go on (`BatchIterator.places`); None without streams.
          wait: return only when the step is committed.
          loss: of this step, by which a later explosion is recognized; None if it is not known.
          skipped_in_a_row: the steps up to this one that the guard skipped.

        Raises:
          InputError: this save, or the one before it, could not be written (disk full, no
            permission, the directory is gone), or something of this step's name is there already.
          ValueError: a leaf is not an array or has a name that no file should have.
        """
        self.wait()
        if self._read_only:
            raise ValueError(f"step {step}: opened read-only")
        require_same_place(self.directory, self._lock, self._identity)
        if step in self.steps():
            raise InputError(f"{self.directory}: step {step}: is saved already")
        leaves = named_leaves(state)
        self._note_steps_on_disk()
        is_sound = self._preservation.judge(loss, skipped_in_a_row)
        data_config = self._config.get("data")
        signed = ownership.signature(data_config) if isinstance(data_config, dict) else None
        contents = {
            "data_index": data_index,
            "places": dict(places or {}),
            "data": self._data,
            "data_signature": signed,
            "loss": loss if is_sound else None,
            "is_sound": is_sound,
            "config": self._config,
        }
        manifest = manifests.make_manifest(step, contents, leaves)
        self._preservation.note(step, loss, is_sound)
        manager = self._manager()
        drop_late_callbacks()
        self._step_in_flight = step
        self._quiet.start()
        with self._save_errors(step):
            orbax_store.start_saving(
                manager,
                step,
                leaves,
                manifest,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight; InputError if the last one could not be written."""
        step = self._step_in_flight
        self._step_in_flight = None
        try:
            with self._save_errors(step):
                if self._manager_if_open is not None:
                    self._manager_if_open.wait_until_finished()
        finally:
            self._quiet.stop()

    def set_aside_exploded(self) -> int | None:
        """After a run gave up: sets aside the steps that are newer than the newest sound one.

        The same command then goes on from there.

        Returns:
          The newest sound step; None, and nothing is set aside, if none is left.
        """
        self.wait()
        self._note_steps_on_disk()
        steps = self.steps()
        sound = self._preservation.newest_sound(steps)
        if sound is None:
            return None
        self._set_aside([step for step in steps if step > sound], "exploded")
        return sound

    def restore_latest(
        self,
        target: PyTree,
        unread: Collection[str] = (),
    ) -> Restored | None:
        """The newest step that verifies, or None where nothing was ever saved.

        A damaged step is reported, and the one before it is tried. When one verifies, the damaged
        ones are renamed to `damaged-<step>`, so that training can save those steps again.

        Args:
          target: a pytree of `jax.ShapeDtypeStruct` with shardings (or of arrays): where and how
            the state comes back.
          unread: names of leaves (`digests.named_leaves`) that are compared by shape and dtype, and
            not read: a `jax.ShapeDtypeStruct` comes back in their place.

        Raises:
          InputError: a leaf of the target differs from the checkpoint's, named, with both shapes
            and dtypes; the optimizer is another one; or every step is damaged.
        """
        self.wait()
        damaged = []
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, target, unread)
            except DamagedError as error:
                self._report(
                    f"{saved_step.damage(self.directory, step, error)}; trying the one before it"
                )
                damaged.append(step)
            else:
                self._set_aside(damaged, "damaged")
                return restored
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise InputError(f"{self.directory}: no intact checkpoint left; damaged steps: {steps}")
        return None

    def restore(
        self,
        step: int,
        target: PyTree,
        unread: Collection[str] = (),
    ) -> Restored:
        """That step and no other.

        Args:
          step: which one.
          target: as of `restore_latest`.
          unread: as of `restore_latest`.

        Raises:
          InputError: as `restore_latest`, or the step is absent or damaged.
        """
        self.wait()
        self._require_step(step)
        try:
            return self._read(step, target, unread)
        except DamagedError as error:
            raise InputError(saved_step.damage(self.directory, step, error)) from None

    def read_leaves(self, step: int, wanted: Leaves) -> Leaves:
        """Some arrays of a step by name, verified, and no others.

        Args:
          step: which one.
          wanted: names of `manifest(step)["leaves"]`, each with a `jax.ShapeDtypeStruct` of the
            shape and dtype that stand there, and with a sharding.

        Raises:
          InputError: the step is absent or damaged.
        """
        self._require_step(step)
        try:
            return saved_step.read_leaves(
                self.directory,
                step,
                wanted,
                self._quiet,
            )
        except DamagedError as error:
            raise InputError(saved_step.damage(self.directory, step, error)) from None

    def config(self, step: int | None = None) -> Mapping[str, Any]:
        """The configuration saved with a step; see `manifest`."""
        return self.manifest(step)["config"]

    def manifest(self, step: int | None = None) -> Mapping[str, Any]:
        """What a step says of itself: `config`, `data`, `leaves` and more.

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
                return saved_step.read_manifest(self.directory, candidate)
            except DamagedError as error:
                place = f"manifest of step {candidate} in {self.directory}"
                self._report(f"{place} is damaged: {error}")
        raise InputError(f"{self.directory}: no intact checkpoint to read a configuration from")

    def close(self) -> None:
        """Waits for the save in flight and releases the directory."""
        try:
            self.wait()
        finally:
            self._quiet.stop()
            if self._manager_if_open is not None:
                self._manager_if_open.close()
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
        # In this order: a configuration reads another run's before the processes know each other.
        if not is_ours and jax.process_count() > 1:
            return  # a save in flight would wait for processes that may be gone
        try:
            self.close()
        except InputError as error:
            if exception_type is None:
                raise
            # The exception that ends the run matters more.
            self._report(str(error))

    def _report(self, line: str) -> None:
        self._report_line(printable(line))

    @contextlib.contextmanager
    def _save_errors(self, step: int | None) -> Iterator[None]:
        """What fails while a step is written, as one line."""
        try:
            with plain_errors(f"could not write the checkpoint of step {step} to {self.directory}"):
                yield
        except InputError:
            raise
        except Exception:
            # orbax does not always name the operating system's error.
            require_same_place(self.directory, self._lock, self._identity)
            raise

    def _note_steps_on_disk(self) -> None:
        """Once: which of the steps that are there already are sound."""
        if self._is_noted:
            return
        self._is_noted = True
        for step in self.steps():
            try:
                body = saved_step.read_manifest(self.directory, step)
            except (DamagedError, InputError):
                self._preservation.note(step, None, is_sound=False)
                continue
            loss = body.get("loss")
            self._preservation.note(
                step,
                loss if isinstance(loss, float) else None,
                is_sound=body.get("is_sound", True) is True,
            )

    def _require_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            held = ", ".join(map(str, steps)) or "none"
            raise InputError(f"{self.directory}: no step {step}; it holds {held}")

    def _read(
        self,
        step: int,
        target: PyTree,
        unread: Collection[str],
    ) -> Restored:
        return saved_step.read_state(
            self.directory,
            step,
            target,
            unread,
            self._config,
            self._quiet,
        )

    def _set_aside(self, steps: list[int], why: str) -> None:
        """Renames steps to `<why>-<step>`, so that their numbers are free again."""
        if self._read_only or not steps:
            return
        problem = None
        if jax.process_index() == 0:
            try:
                for step in steps:
                    with plain_errors(f"could not set aside the step {step} in {self.directory}"):
                        step_folders.set_aside(self.directory, step, why)
            except InputError as error:
                problem = error
        raise_together(problem)  # the others look at the directory only after the renames
        if self._manager_if_open is not None:
            self._manager_if_open.reload()

    def _manager(self) -> orbax_store.Manager:
        """orbax's manager, opened at the first save.

        It reads a file of every step: one that it could not read is set aside before.
        """
        if self._manager_if_open is None:
            unreadable = []
            problem = None
            for step in self.steps():
                try:
                    saved_step.require_readable_by_orbax(self.directory, step)
                except DamagedError as error:
                    self._report(
                        f"{saved_step.damage(self.directory, step, error)}; it is set aside"
                    )
                    unreadable.append(step)
                except InputError as error:
                    problem = error
            raise_together(problem)
            self._set_aside(unreadable, "damaged")
            with self._quiet, plain_errors(f"could not read {self.directory}"):
                self._manager_if_open = orbax_store.open_manager(
                    self.directory,
                    self._preservation,
                )
        return self._manager_if_open


def read_config(run_dir: str | os.PathLike, step: int | None = None) -> Mapping[str, Any]:
    """The resolved configuration of a run, by default of its newest step.

    It is plain JSON, from which `config.from_config_dict` rebuilds the dataclasses. Raises
    InputError where there is none.
    """
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        return checkpointer.config(step)


def _log_warning(line: str) -> None:
    logging.warning("%s", line)
