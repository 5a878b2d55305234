"""Time and memory of `linear_scan` and `attention` on this CPU as the sequence grows: forward and
backward together.

    python benchmarks/ops_cpu.py [--json=FILE]

B = 1, H = 4, K = V = 64, float32. Times are the minimum of several runs. "temporary" is what the
compiled program sets aside besides inputs and outputs; "RSS" by how much the process grows beyond
its inputs while it runs (Linux only). An exponent p says that from the second last length to the
last the figure grew like T^p: both ops should have 1 for memory, `linear_scan` 1 and `attention` 2
for time. Beside them stands softmax attention written plainly, with its [T, T] matrices; where
those would not fit into --max_gib, it is compiled but not run.
"""

import ctypes
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from jaxtyping import Float
from report import cores, cpu_model, table, write_json

from gatedjax.runtime import cli
from kernels_pallas.ops import attention, linear_scan

_LENGTHS = flags.DEFINE_multi_integer(
    "length",
    [1024, 4096, 16384],
    "Sequence lengths T; at least two.",
)
_REPEATS = flags.DEFINE_integer(
    "repeats",
    5,
    "Runs of each, of which the fastest counts.",
    lower_bound=1,
)
_MAX_GIB = flags.DEFINE_float(
    "max_gib",
    6.0,
    "What would need more temporary memory than this is not run.",
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

B, H, D = 1, 4, 64
KEYS = ("milliseconds", "temporary_bytes", "rss_growth_bytes")
SCALES = (1.0, 2.0**20, 2.0**20)  # of the table


def plain_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    gate_logits: Float[Array, "B T H D"],
) -> Float[Array, "B T H D"]:
    """Causal gated softmax attention with whole [T, T] matrices."""
    T = q.shape[1]
    logits = jnp.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    is_visible = jnp.arange(T)[:, None] >= jnp.arange(T)
    weights = jax.nn.softmax(jnp.where(is_visible, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhv->bihv", weights, v) * jax.nn.sigmoid(gate_logits)


def scan(q, k, v, log_decay) -> Float[Array, "B T H D"]:
    return linear_scan(q, k, v, log_decay, implementation="xla")


def gated_attention(q, k, v, gate_logits) -> Float[Array, "B T H D"]:
    return attention(q, k, v, gate_logits=gate_logits, implementation="xla")


def vector_decay(x: np.ndarray) -> np.ndarray:
    return -abs(x) / 16


def scalar_decay(x: np.ndarray) -> np.ndarray:
    return -abs(x[..., 0]) / 16


def unchanged(x: np.ndarray) -> np.ndarray:
    return x


# name -> the op on (q, k, v, x), and how x is made from standard normal numbers [B, T, H, D]: log
# decays, or a gate's logits.
OPS: dict[str, tuple[Callable, Callable]] = {
    "linear_scan, vector decay": (scan, vector_decay),
    "linear_scan, scalar decay": (scan, scalar_decay),
    "attention": (gated_attention, unchanged),
    "plain attention": (plain_attention, unchanged),
}


def main(_) -> None:
    """Every op at every length, each in a process of its own; table; growth."""
    max_bytes = _MAX_GIB.value * 2**30
    figures: dict[str, dict[int, dict]] = {}
    for name in OPS:
        figures[name] = {}
        for length in _LENGTHS.value:
            point = in_child(measure, name, length, _REPEATS.value, max_bytes)
            figures[name][length] = point
    machine = f"{cpu_model()}, {cores()} cores, jax {jax.__version__}"
    print(f"{machine}; B {B}, H {H}, K = V = {D}, float32")
    print(show(figures))
    if _JSON.value:
        growth = {}
        for name, points in figures.items():
            growth[name] = {key: exponent(points, key) for key in KEYS}
        record = {
            "shape": {"B": B, "H": H, "K": D, "V": D, "dtype": "float32"},
            "points": figures,
            "exponents": growth,
        }
        write_json(_JSON.value, record, {})


def measure(name: str, length: int, repeats: int, max_bytes: float) -> dict[str, float | None]:
    """One op at one length: KEYS, None for what was not measured."""
    op, make = OPS[name]
    rng = np.random.default_rng(0)
    q, k, v, x, do = (rng.standard_normal((B, length, H, D), np.float32) for _ in range(5))
    arguments = jax.device_put((q, k, v, make(x), do))

    def forward_and_backward(*arguments):
        *inputs, do = arguments
        o, vjp = jax.vjp(op, *inputs)
        return o, vjp(do)

    compiled = jax.jit(forward_and_backward).lower(*arguments).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    result = {"milliseconds": None, "temporary_bytes": temporary, "rss_growth_bytes": None}
    if temporary > max_bytes:
        return result
    before = start_of_peak()
    jax.block_until_ready(compiled(*arguments))
    if before is not None:
        result["rss_growth_bytes"] = _memory("VmHWM") - before
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    result["milliseconds"] = 1e3 * min(times)
    return result


def start_of_peak() -> int | None:
    """Sets the process's peak back to what it holds now, and returns that in bytes; None where
    Linux is not.
    """
    try:
        # What compilation freed goes back, or else the run would hide in it.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except (OSError, AttributeError):
        return None


def _memory(field: str) -> int:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            kib = int(line.split()[1])
            return kib * 1024
    raise OSError(f"no {field} in /proc/self/status")


def in_child(function: Callable, *arguments):
    """The result of a call in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def exponent(points: dict[int, dict], key: str) -> float | None:
    """p with figure ~ T^p between the two largest lengths at which there is one; None without
    two.
    """
    known = sorted((length, point[key]) for length, point in points.items() if point[key])
    if len(known) < 2:
        return None
    (short, low), (long, high) = known[-2:]
    return math.log(high / low) / math.log(long / short)


def show(figures: dict[str, dict[int, dict]]) -> str:
    """One row for each op and length, and one with the exponents."""
    rows = []
    for name, points in figures.items():
        for length, point in points.items():
            cells = [number(point[key], scale, ",.1f") for key, scale in zip(KEYS, SCALES)]
            rows.append([name, f"{length:,}", *cells])
        growth = [number(exponent(points, key), 1.0, ".2f") for key in KEYS]
        rows.append(["", "exponent", *growth])
    return table(["forward + backward", "T", "ms", "temporary MiB", "RSS MiB"], rows)


def number(x: float | None, scale: float, form: str) -> str:
    """A cell of the table, in units of `scale`."""
    return "-" if x is None else format(x / scale, form)


if __name__ == "__main__":
    cli.run(main)
