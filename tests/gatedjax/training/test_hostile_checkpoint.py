"""Files of a checkpoint that are something else than files, and manifests that are none."""

import hashlib
import json
import logging as std_logging
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.errors import InputError
from gatedjax.training import run_directory
from gatedjax.training.checkpoint import Checkpointer
from gatedjax.training.manifest import rows_taken
from gatedjax.training.quiet_orbax import drop_late_callbacks

STATE = {"w": jnp.arange(6.0), "n": jnp.arange(3)}
CONFIG = {"optim": {"name": "adamw"}, "train": {"batch_size": 4}}
TARGET = jax.eval_shape(lambda: STATE)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with Checkpointer(directory, CONFIG) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, STATE, data_index=step)
    return directory


@pytest.fixture
def run_dir(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run")


def restore(directory, **options):
    said = []
    with Checkpointer(directory, report=said.append, **options) as checkpointer:
        return checkpointer.restore_latest(TARGET), said


def become_pipe(path):
    path.unlink()
    os.mkfifo(path)


def become_socket(path):
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def become_link(path):
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def become_large(path):
    os.truncate(path, 1 << 40)  # sparse: nothing is written


def become_folder(path):
    path.unlink()
    path.mkdir()


def files_of_step(directory):
    root = directory / "checkpoints" / "2"
    return sorted(p.relative_to(directory) for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "become",
    [become_pipe, become_socket, become_link, become_large, become_folder],
)
def test_every_file_of_a_step_in_turn(two_steps, tmp_path, become):
    """None hangs, none fills the memory: the step before takes over, in one line."""
    for i, path in enumerate(files_of_step(two_steps)):
        directory = shutil.copytree(two_steps, tmp_path / str(i))
        become(directory / path)
        restored, said = restore(directory, read_only=True)
        # An index of the array store that nothing asks for may be missing.
        assert restored.step == 1 or become is become_folder, path
        if restored.step == 1:
            assert len(said) == 1 and "\n" not in said[0]
        np.testing.assert_array_equal(restored.state["w"], STATE["w"])


def test_a_device_in_place_of_a_file(run_dir):
    path = run_dir / "checkpoints" / "2" / "manifest" / "metadata"
    path.unlink()
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")
    restored, said = restore(run_dir)
    assert restored.step == 1 and "manifest/metadata is a device" in said[0]


def test_a_step_that_is_a_link_and_one_that_is_a_pipe(run_dir, tmp_path):
    step = run_dir / "checkpoints" / "2"
    shutil.move(step, tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(run_dir / "checkpoints" / "7")
    restored, _ = restore(run_dir, read_only=True)
    assert restored.step == 1


# --- manifests


def write_manifest(run_dir, manifest):
    path = run_dir / "checkpoints" / "2" / "manifest" / "metadata"
    path.write_text(json.dumps(manifest))


def body_of(run_dir):
    path = run_dir / "checkpoints" / "2" / "manifest" / "metadata"
    return json.loads(path.read_text())["body"]


def signed(body):
    text = json.dumps(body, sort_keys=True)
    return {"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def without(*keys):
    def change(body):
        group = body
        for key in keys[:-1]:
            group = group[key]
        del group[keys[-1]]
        return signed(body)

    return change


def with_value(value, *keys):
    def change(body):
        group = body
        for key in keys[:-1]:
            group = group[key]
        group[keys[-1]] = value
        return signed(body)

    return change


MANIFESTS = {
    "leaves missing": without("leaves"),
    "config missing": without("config"),
    "step missing": without("step"),
    "position missing": without("data_index"),
    "digest missing": without("leaves", "w", "digest"),
    "shape missing": without("leaves", "w", "shape"),
    "dtype missing": without("leaves", "w", "dtype"),
    "a list": lambda body: [body],
    "null": lambda body: None,
    "body is a list": lambda body: signed([body]),
    "no checksum": lambda body: {"body": body},
    "checksum is a number": lambda body: {"body": body, "sha256": 3},
    "leaves are a list": with_value([], "leaves"),
    "a leaf is null": with_value(None, "leaves", "w"),
    "config is null": with_value(None, "config"),
    "config is nested": with_value(json.loads('{"a":' * 900 + "1" + "}" * 900), "config"),
    "step is another": with_value(7, "step"),
    "step is true": with_value(True, "step"),
    "position is negative": with_value(-1, "data_index"),
    "position is a word": with_value("first", "data_index"),
    "shape is a word": with_value("wide", "leaves", "w", "shape"),
    "shape is negative": with_value([-6], "leaves", "w", "shape"),
    "shape is a fraction": with_value([6.5], "leaves", "w", "shape"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_another_shape_is_damage_in_one_line(run_dir, name):
    write_manifest(run_dir, MANIFESTS[name](body_of(run_dir)))
    restored, said = restore(run_dir, read_only=True)
    assert restored.step == 1
    assert len(said) == 1 and "\n" not in said[0] and len(said[0]) < 500


def test_no_dtype_is_one_line(run_dir):
    change = with_value("dtype of my own", "leaves", "w", "dtype")
    write_manifest(run_dir, change(body_of(run_dir)))
    with pytest.raises(InputError, match="w is dtype of my own"):
        restore(run_dir, read_only=True)


def test_step_metadata_of_another_shape(run_dir):
    path = run_dir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    for handlers in ([], 3, {"state": [1]}):
        path.write_text(json.dumps({**metadata, "item_handlers": handlers}))
        restored, _ = restore(run_dir, read_only=True)
        assert restored.step in (1, 2)


def test_escape_sequences_never_reach_the_terminal(run_dir):
    change = with_value(4, "leaves", "w\x1b]0;pwned\x07\x1b[2J")
    write_manifest(run_dir, change(body_of(run_dir)))
    _, said = restore(run_dir, read_only=True)
    assert "\x1b" not in said[0] and "\\x1b]0;pwned" in said[0]


# --- what a checkpoint says of optimizer and data


def test_the_state_of_another_optimizer_of_the_same_shape_is_refused(run_dir):
    other = {**CONFIG, "optim": {"name": "adabelief"}}
    with (
        Checkpointer(run_dir, other) as checkpointer,
        pytest.raises(InputError, match=r"optim\.name: got 'adabelief', .* is of 'adamw'"),
    ):
        checkpointer.restore_latest(TARGET)
    with Checkpointer(run_dir, {**CONFIG, "optim": {"name": "adamw", "lr": 1.0}}) as checkpointer:
        assert checkpointer.restore_latest(TARGET).step == 2
    with Checkpointer(run_dir, read_only=True) as checkpointer:
        assert checkpointer.restore_latest(TARGET).step == 2


def test_schedule_free_averages_with_the_beta_that_it_was_trained_with(tmp_path):
    def config(beta1):
        return {"optim": {"name": "schedule_free", "beta1": beta1}}

    with Checkpointer(tmp_path, config(0.9)) as checkpointer:
        checkpointer.save(1, STATE, data_index=0)
    with (
        Checkpointer(tmp_path, config(0.95)) as checkpointer,
        pytest.raises(InputError, match=r"optim\.beta1: got 0.95"),
    ):
        checkpointer.restore_latest(TARGET)


def test_an_older_manifest_counted_batches():
    body = {"data_index": 10, "config": {"train": {"batch_size": 4}}}
    assert rows_taken(body) == 40
    assert rows_taken({**body, "format": 2}) == 10


# --- the lock


def test_a_lock_that_is_no_file_of_its_own_is_refused(tmp_path):
    lock = tmp_path / "lock"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.mkfifo(lock)
    with pytest.raises(InputError, match="lock: is a pipe"):
        Checkpointer(tmp_path)
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(InputError, match="lock: is a link"):
        Checkpointer(tmp_path)
    lock.unlink()
    lock.hardlink_to(victim)
    with pytest.raises(InputError, match="another name"):
        Checkpointer(tmp_path)
    assert victim.read_text() == "mine"


def test_a_file_system_without_locks_runs_and_says_so(tmp_path, monkeypatch):
    import errno

    said = []
    for code in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):

        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(run_directory.fcntl, "flock", refuse)
        Checkpointer(tmp_path, report=said.append).close()
    assert len(said) == 3 and all("has no locks" in line for line in said)


# --- the directory under a run


def test_a_directory_that_goes_away_is_one_line(tmp_path):
    def vanish(run_dir):
        shutil.rmtree(run_dir)

    def move(run_dir):
        (run_dir / "checkpoints").rename(run_dir / "elsewhere")

    def replace(run_dir):
        run_dir.rename(run_dir.with_name("old"))
        (run_dir / "checkpoints").mkdir(parents=True)

    def empty(run_dir):
        (run_dir / "lock").unlink()

    for i, change in enumerate((vanish, move, replace, empty)):
        run_dir = tmp_path / str(i) / "run"
        checkpointer = Checkpointer(run_dir)
        checkpointer.save(1, STATE, data_index=0, wait=True)
        change(run_dir)
        with pytest.raises(InputError, match="was removed, renamed or replaced"):
            checkpointer.save(2, STATE, data_index=0, wait=True)
        checkpointer.close()


def test_a_folder_named_like_a_coming_step(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, STATE, data_index=0, wait=True)
        (tmp_path / "checkpoints" / "2").mkdir()
        with pytest.raises(InputError, match="step 2: is saved already"):
            checkpointer.save(2, STATE, data_index=0)
    restored, said = restore(tmp_path)
    assert restored.step == 1 and len(said) == 1


# --- an explosion


def test_the_last_checkpoint_from_before_an_explosion_stays(tmp_path):
    losses = {2: 3.0, 4: 1.7, 6: 5.6, 8: 5.7, 10: 5.8}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, STATE, data_index=0, loss=loss)
        checkpointer.save(12, STATE, data_index=0, loss=float("nan"), skipped_in_a_row=1)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 10, 12]
    # Another process, started again, knows it from the disk.
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (14, 16, 18):
            checkpointer.save(step, STATE, data_index=0, loss=float("nan"), skipped_in_a_row=9)
        assert checkpointer.set_aside_exploded() == 4
        assert checkpointer.steps() == [4]
        checkpointer.save(16, STATE, data_index=0, loss=9.0)
        assert checkpointer.set_aside_exploded() == 4
        kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert kept == {"4", "exploded-16", "exploded-18"}


def test_a_healthy_run_keeps_no_more_than_asked(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step, loss in enumerate((4.0, 3.0, 2.9, 3.1, 2.8), start=1):
            checkpointer.save(step, STATE, data_index=0, loss=loss)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 5]
        checkpointer.save(6, STATE, data_index=0, loss=2.8, skipped_in_a_row=1)
        checkpointer.save(7, STATE, data_index=0, loss=2.8)
        checkpointer.wait()
        assert checkpointer.steps() == [6, 7]


def test_without_a_sound_checkpoint_nothing_is_set_aside(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, STATE, data_index=0, loss=1.0, skipped_in_a_row=3)
        assert checkpointer.set_aside_exploded() is None
        assert checkpointer.steps() == [1]


# --- the log


def test_only_orbax_is_kept_off_the_log_and_only_while_ours_is_at_work(tmp_path):
    logger = std_logging.getLogger("absl")
    before = list(logger.filters)

    def passes(path):
        record = std_logging.LogRecord("absl", 40, path, 1, "x", (), None)
        return all(bool(f.filter(record)) for f in logger.filters)

    orbax = os.path.join("site-packages", "orbax", "checkpoint", "x.py")
    with Checkpointer(tmp_path) as checkpointer:
        assert passes(orbax)
        checkpointer.save(1, STATE, data_index=0)
        assert not passes(orbax) and passes("other/library.py")
        checkpointer.wait()
        assert passes(orbax)
    assert logger.filters == before


def test_only_late_callbacks_of_a_failed_save_are_dropped(monkeypatch):
    passed = []
    monkeypatch.setattr(sys, "unraisablehook", passed.append)
    drop_late_callbacks()
    drop_late_callbacks()

    def unraisable(error, origin=None):
        return SimpleNamespace(exc_value=error, object=origin)

    closed = RuntimeError("Event loop is closed")
    sys.unraisablehook(unraisable(closed))
    assert passed == []
    for other in (unraisable(closed, "a library"), unraisable(RuntimeError("x")), unraisable(None)):
        sys.unraisablehook(other)
    assert len(passed) == 3


def test_a_pipe_in_an_older_step_does_not_stop_the_saves(run_dir):
    (metadata,) = (run_dir / "checkpoints" / "1").glob("_CHECKPOINT_METADATA")
    become_pipe(metadata)
    said = []
    with Checkpointer(run_dir, CONFIG, report=said.append) as checkpointer:
        assert checkpointer.restore_latest(TARGET).step == 2 and said == []
        checkpointer.save(3, STATE, data_index=0, wait=True)
        assert checkpointer.steps() == [2, 3]
    assert len(said) == 1 and "_CHECKPOINT_METADATA is a pipe; it is set aside" in said[0]
