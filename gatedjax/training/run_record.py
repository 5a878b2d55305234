"""What a run directory says of itself besides checkpoints and metrics.

  config.json    the resolved configuration of the newest start
  starts.jsonl   a line for each start: when, by which command, from which step, on which devices,
                 with which versions and commit, and the hashes of its text and tokenizer

Both are for people and their scripts; the commands read the checkpoints.
"""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import gatedjax
from gatedjax.errors import InputError
from gatedjax.paths import Place
from gatedjax.training.identity import Identity
from gatedjax.training.run_directory import append_line, plain_errors, raise_together, replace_file

CONFIG_FILE = "config.json"
STARTS_FILE = "starts.jsonl"

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)


def keep_record(
    run_dir: Place,
    config: Mapping[str, Any],
    *,
    step: int,
    devices: str,
    data: Identity,
) -> None:
    """The first process writes both files.

    Args:
      run_dir: the run directory, which is this run's.
      config: the resolved configuration (`config.to_dict`).
      step: optimizer steps done before this start.
      devices: in words.
      data: what the run is trained on.

    Raises:
      InputError: on all processes, if they cannot be written.
    """
    problem = None
    if jax.process_index() == 0:
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.orig_argv),
            "folder": str(Path.cwd()),
            "step": step,
            "host": socket.gethostname(),
            "processes": jax.process_count(),
            "devices": devices,
            "commit": commit(),
            "versions": versions(),
            "data": data,
        }
        try:
            with plain_errors(f"could not write {run_dir / CONFIG_FILE}"):
                text = json.dumps(config, indent=1) + "\n"
                replace_file(run_dir / CONFIG_FILE, text.encode())
            with plain_errors(f"could not write {run_dir / STARTS_FILE}"):
                line = json.dumps(start) + "\n"
                append_line(run_dir / STARTS_FILE, line)
        except InputError as error:
            problem = error
    raise_together(problem)


def versions() -> dict[str, str]:
    """Python's version, gatedjax's, and those of the packages that results depend on."""
    found = {"python": sys.version.split()[0], "gatedjax": gatedjax.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of gatedjax's code, with "+changes" if files differ from it.

    None where it is neither a clone nor installed from one.
    """
    clone = Path(gatedjax.__file__).parents[1]
    if not (clone / ".git").exists():
        return _installed_commit()
    head = _git(clone, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(clone, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changes else head


def _git(clone: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, or it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(clone), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed_commit() -> str | None:
    """pip notes the commit of what it installed from a repository."""
    try:
        text = metadata.distribution("gatedjax").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    return origin.get("vcs_info", {}).get("commit_id")
