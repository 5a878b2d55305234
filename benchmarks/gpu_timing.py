"""What the GPU benchmarks share: inputs of a shape, the median time of a call on the device, and a
peer that may be missing.
"""

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CALLS = 5  # in a sample, so that one launch's latency is no part of the figure
PASSES = ("fwd", "both")
VERSIONS_OF = (
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "jax-triton",
    "triton",
    "torch",
    "fla-core",
    "jax-linear-attention",
)

# Times `op(*arrays)` in torch, the way `median_seconds` does in jax; a program of its own puts this
# behind the definitions of op, arrays and dy.
TORCH_TIMING = """
import statistics
def forward():
    with torch.no_grad():
        op(*arrays)
def both():
    leaves = [a.detach().requires_grad_() for a in arrays]
    op(*leaves).backward(dy)
for fn in (forward, both):
    for _ in range(3):
        fn()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5e3)
    print("seconds", statistics.median(times))
"""


def sizes(shape: str) -> dict[str, int]:
    """ "B4,T4096,Hk2" -> {"B": 4, "T": 4096, "Hk": 2}."""
    return {name: int(size) for name, size in re.findall(r"([A-Z][a-z]?)(\d+)", shape)}


def inputs(shape: str, decay: str, dtype=jnp.bfloat16) -> tuple[Array, Array, Array, Array | None]:
    """q, k, v [B, T, H, D] and log decays of GLA's size, float32: None, [B, T, H] or [B, T, H,
    K].
    """
    B, T, H, K, V = (sizes(shape)[axis] for axis in "BTHKV")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    log_decay = None
    if decay == "vector":
        log_decay = jax.nn.log_sigmoid(normal(B, T, H, K).astype(jnp.float32)) / 16
    elif decay == "scalar":
        log_decay = jax.nn.log_sigmoid(normal(B, T, H).astype(jnp.float32)) / 16
    return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), log_decay


def median_seconds(fn: Callable, *args, samples: int = 20, calls: int = CALLS) -> float:
    """Of one call, after two to warm up."""
    for _ in range(2):
        jax.block_until_ready(fn(*args))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            result = fn(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def seconds_of_passes(
    fn: Callable,
    arrays: tuple[Array, ...],
    cotangent: Array,
    samples: int,
) -> dict[str, float]:
    """Median seconds of the forward pass alone, and of forward and backward in one program."""

    def both(cotangent, *arrays):
        out, vjp = jax.vjp(fn, *arrays)
        return out, vjp(cotangent)

    return {
        "fwd": median_seconds(jax.jit(fn), *arrays, samples=samples),
        "both": median_seconds(jax.jit(both), cotangent, *arrays, samples=samples),
    }


def seconds_in_torch(program: str, *arguments: object) -> dict[str, float]:
    """Of a torch program in a process of its own: torch and jax would each take the whole memory.

    Raises:
      PackageNotFoundError: torch or fla is not installed.
      RuntimeError: the program failed; the last line that it said.
    """
    for package in ("torch", "fla-core"):
        metadata.version(package)
    command = [sys.executable, "-c", program + TORCH_TIMING, *(str(x) for x in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds")]
    return dict(zip(PASSES, [float(line.split()[1]) for line in lines]))


def seconds_or_reason(measure: Callable[[], dict[str, float]]) -> dict[str, object]:
    """Seconds of each pass, or why there are none."""
    try:
        return dict(measure())
    except metadata.PackageNotFoundError as missing:
        return {"left out": f"{missing.name} is not installed"}
    except Exception as error:  # a peer's complaints have no type of their own
        lines = str(error).splitlines() or [""]
        return {"left out": f"{type(error).__name__}: {lines[0][:150]}"}


def milliseconds(row: dict, name: str) -> str:
    """A cell of the table."""
    if name in row:
        return f"{row[name] * 1e3:.3f}"
    return row.get("left out", "-")[:40]


def device() -> str:
    """As jax names it."""
    return jax.devices()[0].device_kind
