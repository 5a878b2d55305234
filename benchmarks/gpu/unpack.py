"""Unpacks what pack.sh has put into .dev: wheels, and a newer ptxas. Imports no jax."""

import lzma
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.records import LOG, append_record, one_line
from benchmarks.gpu.settings import CUDA_FOLDERS, PACKED, Settings


def unpack(settings: Settings, packed: Path = PACKED) -> None:
    """Wheels to `settings.packages`, ptxas to `settings.cuda`, once. A failure is recorded."""
    steps = {"wheels": unpack_wheels, "ptxas": unpack_ptxas}
    for name, step in steps.items():
        try:
            step(settings, packed)
        except Exception as error:
            append_record(
                settings.out,
                stage="unpack",
                kind="stage",
                error=f"{name}: {one_line(error)}",
            )


def unpack_wheels(settings: Settings, packed: Path) -> None:
    """Into a folder of their own on the Python path: the machine's packages stay as they are."""
    wheels = sorted((packed / "wheels").glob("*.whl"))
    if not wheels or settings.packages.exists():
        return
    unfinished = settings.packages.with_name("packages.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install"]
    command += ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command += [f"--target={unfinished}"]
    command += [str(wheel) for wheel in wheels]
    with open(settings.out / LOG, "ab") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)
    unfinished.rename(settings.packages)


def unpack_ptxas(settings: Settings, packed: Path) -> None:
    """bin/ptxas and, beside it, the machine's nvvm: XLA wants libdevice in the same CUDA folder."""
    archive = packed / "ptxas.xz"
    if not archive.exists() or settings.has_packed_ptxas:
        return
    target = settings.cuda / "bin" / "ptxas"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name("ptxas.unfinished")
    with lzma.open(archive) as source, open(unfinished, "wb") as file:
        shutil.copyfileobj(source, file)
    unfinished.chmod(0o755)
    unfinished.rename(target)
    nvvm = _installed_nvvm()
    if nvvm is not None:
        (settings.cuda / "nvvm").symlink_to(nvvm)


def _installed_nvvm() -> Path | None:
    """The folder nvvm of an installed CUDA, or of NVIDIA's wheels."""
    candidates: list[Path] = []
    for pattern in CUDA_FOLDERS:
        candidates += sorted(Path("/usr/local").glob(f"{pattern}/nvvm"))
    candidates.append(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "nvvm")
    for folder in candidates:
        if (folder / "libdevice").is_dir():
            return folder
    return None
