"""The stage "versions": what is installed, which ptxas XLA takes, how fast the device is."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

from benchmarks.gpu.records import append_record
from benchmarks.gpu.settings import Settings, packed_ptxas

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "torch",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvcc",
    "fla-core",
    "jax-linear-attention",
    "grain",
    "transformers",
)
GPU_FIELDS = "name,driver_version,power.limit,clocks.max.sm,clocks.sm,memory.total"

# A program for XLA to compile, and the log in which it says by which ptxas.
SMALL_PROGRAM = "import jax; jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(8)))"
TALKATIVE = {
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "TF_CPP_VMODULE": "assemble_compilation_provider=5",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
TAKEN = re.compile(r"Using (ptxas\(.*?\))")


def record_versions(settings: Settings) -> None:
    """Versions first, for jax may not start."""
    found = installed()
    append_record(settings.out, stage="versions", kind="versions_before_jax", **found)
    for ptxas, taken in ptxas_taken(settings).items():
        append_record(settings.out, stage="versions", kind="ptxas", ptxas=ptxas, taken=taken)

    import jax

    device = jax.devices()[0]
    name = f"{device.device_kind} {device.platform}"
    append_record(settings.out, stage="versions", kind="versions", device=name, **found)
    record_ceilings(settings)


def installed() -> dict[str, Any]:
    """Packages, driver, clocks, assembler and profilers."""
    packages = {name: _version(name) for name in PACKAGES}
    gpu = _output("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader")
    ptxas_version = _output("ptxas", "--version") or ""
    return {
        "python": sys.version.split()[0],
        "packages": packages,
        "nvidia_smi": gpu,
        "ptxas": f"{shutil.which('ptxas')} {ptxas_version.splitlines()[-1:]}",
        "nsys": shutil.which("nsys"),
        "ncu": shutil.which("ncu"),
        "cores": os.cpu_count(),
    }


def ptxas_taken(settings: Settings) -> dict[str, str]:
    """Which ptxas XLA says that it uses, as things are and with the packed one put before it."""
    environments: dict[str, dict[str, str]] = {"installed": {}}
    if settings.has_packed_ptxas:
        environments["packed"] = packed_ptxas(settings)
    found = {}
    for name, environment in environments.items():
        done = subprocess.run(
            [sys.executable, "-c", SMALL_PROGRAM],
            capture_output=True,
            text=True,
            env=os.environ | TALKATIVE | environment,
        )
        match = TAKEN.search(done.stderr)
        if match:
            # A folder of this machine is nothing that a reader could look at.
            found[name] = match[1].replace(str(settings.scratch), "SCRATCH")
        else:
            last_words = " ".join(done.stderr[-150:].split())
            found[name] = f"not said (exit code {done.returncode}): {last_words}"
    return found


def record_ceilings(settings: Settings) -> None:
    """Rates that no kernel can surpass, and what a call costs that does nothing."""
    import jax
    import jax.numpy as jnp

    from benchmarks.gpu.timing import median_ms

    dry = settings.dry

    def record(what: str, value: str) -> None:
        append_record(settings.out, stage="versions", kind="ceiling", what=what, value=value)

    size = 256 if dry else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16)
    ms, _ = median_ms(jax.jit(jnp.matmul), [(x, y), (y, x)], dry)
    record(f"bf16 matmul {size}", f"{2 * size**3 / ms / 1e9:.0f} TFLOP/s")

    numbers = 2**20 if dry else 2**30
    large = jnp.ones((numbers,), jnp.float32)
    ms, _ = median_ms(jax.jit(lambda x: x * 1.5), [(large,)], dry)
    record("read and write", f"{2 * large.nbytes / ms / 1e9:.2f} TB/s")

    ms, _ = median_ms(jax.jit(lambda x: x + 1), [(jnp.ones(()),)], dry)
    record("empty call", f"{ms * 1e3:.0f} us")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip()
