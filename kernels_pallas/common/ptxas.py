"""Which of NVIDIA's assemblers turns the GPU kernels into machine code, and whether it is sound.

XLA takes the first ptxas that it finds: in the folder that jax names (CUDA_ROOT, or else NVIDIA's
wheels), on the PATH, in CUDA's usual folders. Before CUDA 13.3 it miscompiles matrix instructions
of Hopper whose operands are in registers (wgmma), which the kernels of attention have.
"""

import functools
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kernels_pallas.common.device import device_kind

# The first that is right on Hopper.
OLDEST_ON_HOPPER = (13, 3)
# Parts of `jax.Device.device_kind`.
_HOPPER = ("H100", "H200", "H800", "H20")
_WHEELS = "nvidia.cu13"
_USUAL_FOLDERS = ("/usr/local/cuda", "/opt/cuda")

_log = logging.getLogger(__name__)


class Ptxas(NamedTuple):
    """An assembler. Its version is (major, minor) of the CUDA that it came with."""

    path: str
    version: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.version
        return f"ptxas {major}.{minor} ({self.path})"


def find_ptxas() -> str | None:
    """The path of the ptxas that XLA takes; None where there is none."""
    for folder in _folders_before_path():
        path = folder / "bin" / "ptxas"
        if path.exists():
            return str(path)
    on_path = shutil.which("ptxas")
    if on_path is not None:
        return on_path
    for name in _USUAL_FOLDERS:
        path = Path(name) / "bin" / "ptxas"
        if path.exists():
            return str(path)
    return None


def _folders_before_path() -> Iterator[Path]:
    """Where jax tells XLA to look first."""
    root = os.environ.get("CUDA_ROOT")
    if root is not None:
        yield Path(root)
        return
    try:
        wheels = importlib.util.find_spec(_WHEELS)
    except ModuleNotFoundError:
        return
    if wheels is not None:
        yield from (Path(folder) for folder in wheels.submodule_search_locations or ())


@functools.cache
def ptxas() -> Ptxas | None:
    """The assembler that XLA takes; None where there is none, or it does not tell its version."""
    path = find_ptxas()
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release is None:
        return None
    return Ptxas(path, (int(release[1]), int(release[2])))


def flaw(found: Ptxas | None, kind: str) -> str | None:
    """What is wrong with an assembler for a device kind, or None."""
    is_hopper = any(name in kind for name in _HOPPER)
    if found is None or not is_hopper or found.version >= OLDEST_ON_HOPPER:
        return None
    oldest = ".".join(str(part) for part in OLDEST_ON_HOPPER)
    return (
        f"{found} miscompiles matrix instructions of Hopper; {oldest} or newer does not "
        "(pip install 'nvidia-cuda-nvcc>=13.3')"
    )


def remark() -> tuple[int, str]:
    """(level of logging, which assembler is taken and what is wrong with it), in one line."""
    found = ptxas()
    problem = flaw(found, device_kind())
    if problem is not None:
        return logging.WARNING, f"GPU kernels: {problem}"
    taken = "what XLA brings: there is no ptxas" if found is None else str(found)
    return logging.INFO, f"GPU kernels: assembled by {taken}"


@functools.cache
def announce() -> None:
    """Logs the remark, once."""
    level, line = remark()
    _log.log(level, line)
