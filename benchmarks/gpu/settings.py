"""Where a run of the kit reads and writes, and the environment of its processes. Imports no jax."""

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKED = REPOSITORY / ".dev"
DEFAULT_OUT = REPOSITORY / "benchmarks" / "results"

# XLA runs the ptxas of the PATH; the CUDA of an image may not be on it.
CUDA_FOLDERS = ("cuda", "cuda-13*")


@dataclass(frozen=True)
class Settings:
    """What every process of a run is told.

    Attributes:
      out: folder of the results, of what the processes print, and of the summary.
      scratch: folder of unpacked wheels, compiled programs and training runs. A second run on the
        same machine finds there what the first has compiled.
      dry: tiny shapes, kernels interpreted on the CPU: to try the kit itself.
      ptxas: which assembler XLA uses in this process: "installed" (the machine's) or "packed".
    """

    out: Path
    scratch: Path
    dry: bool = False
    ptxas: str = "installed"

    @property
    def packages(self) -> Path:
        """Wheels that pack.sh brought, unpacked."""
        return self.scratch / "packages"

    @property
    def cuda(self) -> Path:
        """The ptxas that pack.sh brought, in a folder laid out like CUDA's."""
        return self.scratch / "cuda"

    @property
    def has_packed_ptxas(self) -> bool:
        return (self.cuda / "bin" / "ptxas").exists()

    def arguments(self) -> list[str]:
        """The command-line arguments from which `from_arguments` makes these settings again."""
        found = [
            f"--out={self.out}",
            f"--scratch={self.scratch}",
            f"--ptxas={self.ptxas}",
        ]
        if self.dry:
            found.append("--dry")
        return found


def default_scratch() -> Path:
    """In $TMPDIR, a name for each user."""
    return Path(tempfile.gettempdir()) / f"gatedjax_gpu_kit_{os.getuid()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Settings`."""
    out = os.environ.get("OUT", DEFAULT_OUT)
    parser.add_argument("--out", type=Path, default=out, help="folder of results (default: $OUT)")
    parser.add_argument("--scratch", type=Path, default=default_scratch(), help="folder of caches")
    parser.add_argument("--ptxas", default="installed", choices=("installed", "packed"))
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted on the CPU")


def from_arguments(args: argparse.Namespace) -> Settings:
    """The settings, folders as absolute paths."""
    return Settings(
        out=args.out.resolve(),
        scratch=args.scratch.resolve(),
        dry=args.dry,
        ptxas=args.ptxas,
    )


def environment(settings: Settings) -> dict[str, str]:
    """The environment of every process of a run."""
    inherited = os.environ.get("PYTHONPATH", "")
    python_path = [str(settings.packages), str(REPOSITORY)]
    if inherited:
        python_path.append(inherited)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(python_path),
        "PYTHONUNBUFFERED": "1",
        "PATH": _path_with_ptxas(),
        # Processes run side by side on one GPU.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The CPU too: float64 truths are computed there.
        "JAX_PLATFORMS": "cpu" if settings.dry else "cuda,cpu",
        # Every program goes into the cache, however small: one process compiles, another one runs.
        "JAX_COMPILATION_CACHE_DIR": str(settings.scratch / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TRITON_CACHE_DIR": str(settings.scratch / "triton"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def packed_ptxas(settings: Settings) -> dict[str, str]:
    """Makes XLA take the packed ptxas: jax asks CUDA_ROOT first, XLA also looks on the PATH."""
    return {
        "CUDA_ROOT": str(settings.cuda),
        "PATH": f"{settings.cuda / 'bin'}{os.pathsep}{_path_with_ptxas()}",
    }


def _path_with_ptxas() -> str:
    """PATH, and behind it the folder of CUDA's ptxas if there is none on it."""
    path = os.environ.get("PATH", "")
    if shutil.which("ptxas"):
        return path
    for pattern in CUDA_FOLDERS:
        for folder in sorted(Path("/usr/local").glob(f"{pattern}/bin")):
            if (folder / "ptxas").exists():
                return f"{path}{os.pathsep}{folder}"
    return path
