"""two_pass_softmax beside jax.nn.softmax on this CPU, and how far each is from float64.

    taskset -c 0 python benchmarks/two_pass_softmax_cpu.py [--rows=1,64,4096] [--length=1024 ...]
        [--repeats=25] [--json=FILE]

The two run in turns, in one process; a time is the median of the process's own. "maximum" is the
pass that the two-pass form saves, alone.
"""

import os
import time
from collections.abc import Callable, Iterable
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from report import parser, table, write_json

from kernels_pallas.ops import two_pass_softmax

HEADER = ("shape", "softmax ms", "two_pass ms", "ratio", "maximum ms", "error", "two_pass error")
WARM_UP = 3


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rows", default="1,64,4096", help="numbers of rows")
    flags.add_argument("--length", default="4194304,65536,1024", help="of the rows, one for each")
    flags.add_argument("--repeats", type=int, default=25)
    args = flags.parse_args()
    shapes = list(zip(map(int, args.rows.split(",")), map(int, args.length.split(","))))
    records = [measured(rows, length, args.repeats) for rows, length in shapes]
    print(table(HEADER, map(cells, records)))
    if args.json:
        write_json(args.json, {"shapes": records}, {})


def measured(rows: int, length: int, repeats: int) -> dict[str, float | int]:
    """Times and errors of logits of deviation 20."""
    x = 20 * jax.random.normal(jax.random.key(0), (rows, length))
    functions = {
        "softmax": jax.jit(jax.nn.softmax),
        "two_pass": jax.jit(two_pass_softmax),
        "maximum": jax.jit(lambda x: jnp.max(x, axis=-1)),
    }
    times = in_turns(functions, x, repeats)
    record: dict[str, float | int] = {"rows": rows, "length": length}
    for name, milliseconds in times.items():
        record[f"{name}_ms"] = milliseconds
    for name in ("softmax", "two_pass"):
        record[f"{name}_error"] = error(functions[name](x), x)
    return record


def in_turns(
    functions: dict[str, Callable[[Array], Array]],
    x: Array,
    repeats: int,
) -> dict[str, float]:
    """The median of the process's milliseconds, function by function."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(WARM_UP + repeats):
        for name, function in functions.items():
            start = time.process_time()
            jax.block_until_ready(function(x))
            if i >= WARM_UP:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: median(values) for name, values in times.items()}


def error(y: Array, x: Array) -> float:
    """The largest relative error of a weight above 1e-30."""
    x64 = np.asarray(x, np.float64)
    exact = np.exp(x64 - x64.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    is_large = exact > 1e-30
    return float(np.max(np.abs(np.asarray(y)[is_large] / exact[is_large] - 1)))


def cells(record: dict[str, float | int]) -> Iterable[str]:
    ratio = record["two_pass_ms"] / record["softmax_ms"]
    yield f"{record['rows']} x {record['length']}"
    yield f"{record['softmax_ms']:.2f}"
    yield f"{record['two_pass_ms']:.2f}"
    yield f"{ratio:.2f}"
    yield f"{record['maximum_ms']:.2f}"
    yield f"{record['softmax_error']:.1e}"
    yield f"{record['two_pass_error']:.1e}"


if __name__ == "__main__":
    main()
