"""What a run directory says of itself, and how a new run gets its place."""

import errno
import fcntl
import subprocess
from pathlib import Path

import pytest

from gatedjax.errors import InputError
from gatedjax.runtime import run_log
from gatedjax.training import run_record
from gatedjax.training.run_directory import set_aside


def a_run(folder: Path, text: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_runs_are_set_aside_one_after_the_other(tmp_path):
    said = []
    for text in ("first", "second", "third"):
        set_aside(a_run(tmp_path / "run", text), said.append)
    assert not (tmp_path / "run").exists()
    for number, text in enumerate(("first", "second", "third"), start=1):
        assert (tmp_path / f"run.{number}" / "metrics.jsonl").read_text() == text
    assert said[0] == f"--fresh: the run in {tmp_path / 'run'} is kept as {tmp_path / 'run.1'}"


def test_a_folder_without_a_run_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    set_aside(tmp_path, print)
    set_aside(tmp_path / "nothing", print)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_in_use_or_around_us_is_not_moved(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run", "first")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            set_aside(folder, print)
    monkeypatch.chdir(folder / "checkpoints")
    for given in (folder, Path("..")):
        with pytest.raises(InputError, match="is the working folder, or above it"):
            set_aside(given, print)
    assert folder.exists()


def test_what_cannot_be_renamed_is_one_line(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "busy")

    folder = a_run(tmp_path / "run", "first")
    monkeypatch.setattr("gatedjax.training.run_directory.os.rename", busy)
    with pytest.raises(InputError, match="--fresh: could not rename"):
        set_aside(folder, print)


def test_the_log_waits_for_its_folder_and_goes_on_in_it(tmp_path):
    for start in ("first", "second"):
        size = (tmp_path / "log.txt").stat().st_size if start == "second" else 0
        with run_log.keep() as log:
            run_log.note(f"{start}, before")
            assert not size or (tmp_path / "log.txt").stat().st_size == size
            log.open(tmp_path)
            run_log.note(f"{start}, \x1b[2J after")
    run_log.note("nobody keeps this")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[21:] for line in lines] == [
        "first, before",
        "first, \\x1b[2J after",
        "second, before",
        "second, \\x1b[2J after",
    ]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    with run_log.keep() as log, pytest.raises(InputError, match=r"could not write .*log\.txt"):
        log.open(tmp_path / "nowhere")


def test_the_commit_says_whether_files_differ(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]

    def run(*arguments):
        subprocess.run([*git, *arguments], check=True, capture_output=True)

    (tmp_path / "gatedjax").mkdir()
    code = tmp_path / "gatedjax" / "__init__.py"
    code.write_text("1")
    monkeypatch.setattr(run_record.gatedjax, "__file__", str(code))
    assert run_record.commit() is None, "neither a clone nor installed from one"
    run("init", "-q")
    run("add", "-A")
    run("commit", "-qm", "first")
    clean = run_record.commit()
    assert len(clean) == 40
    code.write_text("2")
    assert run_record.commit() == f"{clean}+changes"


def test_versions_are_those_that_results_depend_on():
    found = run_record.versions()
    assert {"python", "gatedjax", "jax", "jaxlib", "flax", "optax"} <= set(found)
