"""The folders of a run's steps, `checkpoints/<step>`: which there are, and giving one another name.

On a file system orbax writes a step under a temporary name and renames it when it is complete. In a
bucket nothing can be renamed: there orbax writes the object `commit_success.txt` last, and a folder
without it is no step. What a killed run left is deleted when the next one begins to save.
"""

import os
import re
import shutil
from pathlib import Path

from gatedjax import buckets
from gatedjax.paths import Place, is_bucket
from gatedjax.training.run_directory import COMMITTED, plain_errors

FOLDER = "checkpoints"

# How orbax names a committed step.
_STEP_NAME = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)


def steps(checkpoints: Place) -> list[int]:
    """The committed steps, oldest first.

    Raises:
      InputError: the folder cannot be read.
    """
    with plain_errors(f"could not read {checkpoints}"):
        names = _names(checkpoints)
    return sorted(int(name) for name in names)


def _names(checkpoints: Place) -> list[str]:
    if not is_bucket(checkpoints):
        return [name for name in os.listdir(checkpoints) if _STEP_NAME.fullmatch(name)]
    files = buckets.file_system(checkpoints)
    try:
        found = files.ls(os.fspath(checkpoints), detail=False)
    except FileNotFoundError:
        # A folder is there as long as something is in it.
        return []
    names = [path.rstrip("/").rpartition("/")[2] for path in found]
    names = [name for name in names if _STEP_NAME.fullmatch(name)]
    return [name for name in names if files.exists(os.fspath(checkpoints / name / COMMITTED))]


def has_steps(run_dir: str | os.PathLike) -> bool:
    """Whether a run has saved something there, which the same command would go on from."""
    folder = _place(run_dir) / FOLDER
    if not is_bucket(folder) and not folder.is_dir():
        return False
    return bool(steps(folder))


def _place(path: str | os.PathLike) -> Place:
    """As it is, if it is one already: pathlib would make gs:/ of gs://."""
    return path if is_bucket(path) else Path(path)  # pyrefly: ignore


def named_step(path: Place) -> tuple[Place, int | None]:
    """(run directory, step) of RUN/checkpoints/STEP; (RUN, None) of a run directory itself."""
    if path.parent.name == FOLDER and _STEP_NAME.fullmatch(path.name):
        return path.parent.parent, int(path.name)
    return path, None


def set_aside(checkpoints: Place, step: int, why: str) -> None:
    """Renames a step to `<why>-<step>`, so that its number is free again.

    Of a run that is started again and again and explodes again and again one is kept.
    """
    free = checkpoints / f"{why}-{step}"
    if why == "exploded":
        _remove(free)
    exists = buckets.exists if is_bucket(checkpoints) else os.path.lexists
    count = 0
    while exists(free):
        count += 1
        free = checkpoints / f"{why}-{step}-{count}"
    if is_bucket(checkpoints):
        buckets.move(checkpoints / str(step), free, marker=COMMITTED)
    else:
        os.rename(checkpoints / str(step), free)


def _remove(folder: Place) -> None:
    if is_bucket(folder):
        buckets.delete(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
