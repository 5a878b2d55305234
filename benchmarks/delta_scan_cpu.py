"""delta_scan's XLA path on this CPU beside linear_scan's at the same shape.

    taskset -c 0 python benchmarks/delta_scan_cpu.py [--shape=B1,T1024,H4,K64,V64 ...]
        [--decay=none,scalar,vector] [--dtype=float32] [--repeats=25] [--json=FILE]

The two run in turns, in one process; a time is the median of the process's own, so that what else
the machine does counts little. "temporary" is what the compiled program sets aside besides inputs
and outputs. Above 32 MiB of it glibc takes the pages from the system anew in every call: where that
matters, it is part of the times.
"""

import itertools
import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from report import parser, table, write_json

from kernels_pallas.ops import delta_scan, linear_scan

SHAPES = ("B1,T1024,H4,K64,V64", "B2,T1024,H8,K128,V128")
HEADER = ("shape", "decay", "pass", "delta_scan ms", "linear_scan ms", "ratio", "temporary MiB")
WARM_UP = 3


def inputs_of(shape: str, decay: str, dtype: str) -> dict[str, Array]:
    """Random ones, keys of length one."""
    B, T, H, K, V = (int(part[1:]) for part in shape.split(","))
    rng = np.random.default_rng(0)
    k = rng.standard_normal((B, T, H, K))
    arrays = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H, V)),
    }
    if decay != "none":
        shape_of_decays = (B, T, H, K) if decay == "vector" else (B, T, H)
        arrays["log_decay"] = -np.abs(rng.standard_normal(shape_of_decays)) / 16
    arrays["beta"] = rng.uniform(size=(B, T, H))
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def ready_to_run(op: Callable, arrays: dict[str, Array], pass_name: str):
    """(the compiled program, its arguments): "fwd", or "bwd" for forward and backward in one."""

    def forward(arrays: dict[str, Array]) -> Array:
        return op(**arrays, implementation="xla")

    def both(arrays: dict[str, Array], do: Array) -> tuple:
        o, vjp = jax.vjp(forward, arrays)
        return o, vjp(do)

    if pass_name == "fwd":
        arguments = (arrays,)
        program = jax.jit(forward)
    else:
        arguments = (arrays, jnp.flip(arrays["v"], 1))
        program = jax.jit(both)
    return program.lower(*arguments).compile(), arguments


def figures(shape: str, decay: str, pass_name: str, dtype: str, repeats: int) -> dict:
    """Of both ops: milliseconds and temporary bytes."""
    arrays = inputs_of(shape, decay, dtype)
    without_beta = {name: x for name, x in arrays.items() if name != "beta"}
    programs = {
        "delta_scan": ready_to_run(delta_scan, arrays, pass_name),
        "linear_scan": ready_to_run(linear_scan, without_beta, pass_name),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(WARM_UP + repeats):
        for name, (program, arguments) in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(*arguments))
            times[name].append(time.process_time() - start)
    found = {}
    for name, (program, _) in programs.items():
        found[name] = {
            "milliseconds": 1e3 * median(times[name][WARM_UP:]),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", action="append")
    made.add_argument("--decay", default="none,scalar,vector", help="comma-separated")
    made.add_argument("--pass", dest="passes", default="fwd,bwd", help="bwd is both in one program")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--repeats", type=int, default=25)
    args = made.parse_args()
    rows = []
    lines = []
    for shape, decay, pass_name in itertools.product(
        args.shape or SHAPES,
        args.decay.split(","),
        args.passes.split(","),
    ):
        found = figures(shape, decay, pass_name, args.dtype, args.repeats)
        delta = found["delta_scan"]
        linear = found["linear_scan"]
        ratio = delta["milliseconds"] / linear["milliseconds"]
        rows.append({"shape": shape, "decay": decay, "pass": pass_name, "ratio": ratio} | found)
        lines.append(
            [
                shape,
                decay,
                pass_name,
                f"{delta['milliseconds']:.2f}",
                f"{linear['milliseconds']:.2f}",
                f"{ratio:.2f}",
                f"{delta['temporary_bytes'] / 2**20:.1f}, {linear['temporary_bytes'] / 2**20:.1f}",
            ]
        )
    print(table(HEADER, lines))
    if args.json:
        write_json(args.json, {"dtype": args.dtype, "rows": rows}, {})


if __name__ == "__main__":
    main()
