"""How libtpu is started on a machine without a TPU: silently, and with its schedules written to a
private folder.

libtpu reads its flags once, when it is loaded: a process's first compilation decides whether
schedules are written.
"""

import os
import tempfile
from pathlib import Path

import jax  # noqa: F401 - on import it sets TPU_SKIP_MDS_QUERY=1 if the machine has no TPU

from gatedjax.aot.bundles import DUMP_LABELS

# Without these libtpu asks a metadata server and host names for a TPU that is not there, and says
# so at length.
_NO_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # need not match what is compiled for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock file
}
# The folder that libtpu was told to write to; it lives as long as the process.
_dump: tempfile.TemporaryDirectory | None = None


def quieten() -> None:
    """Keeps libtpu, if installed, from looking for a TPU on a machine that has none. Leaves a TPU
    machine alone.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") != "1":
        return
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def loaded() -> bool:
    """Whether this process has loaded libtpu."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text()


def start(schedule: bool) -> Path | None:
    """Prepares libtpu for a compilation; returns the folder that schedules are written to, emptied,
    or None.

    Raises:
      RuntimeError: `schedule` is set, but libtpu was loaded without them.
    """
    global _dump
    quieten()
    if not schedule:
        return None
    if _dump is None:
        if loaded():
            raise RuntimeError(
                "aot: schedule=True, but libtpu was loaded before without schedules; set "
                "JAX_PLATFORMS=cpu before jax starts, and give schedule=True from the first "
                "compilation on"
            )
        _dump = tempfile.TemporaryDirectory(prefix="gatedjax-aot-")
        _add_dump_flags(_dump.name)
    folder = Path(_dump.name)
    for path in folder.iterdir():
        path.unlink()
    return folder


def _add_dump_flags(folder: str) -> None:
    """Adds to the flags that libtpu reads from the environment when it is loaded."""
    flags = [
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={DUMP_LABELS}",
    ]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()


def installed() -> bool:
    """Whether jax finds a libtpu."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return "TPU_LIBRARY_PATH" in os.environ
    return True
