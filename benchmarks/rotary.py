"""rotary compiled for TPUs that are not there: our kernels beside the same by plain XLA.

    python benchmarks/rotary.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,D128 ...]
        [--op=tpu,xla] [--json=benchmarks/results/rotary_tpu.json]

Norm of every head and rotation of all its channels, from columns [B, T, H D], as matrix products
make them, to columns, as attention reads them. For every shape, chip and pass: model time of the
whole program, cosines included, against the time of the compulsory bytes (every input and output
once). Times are the schedule's replay, not measurements; `gatedjax/aot` says how far to trust them.
Each row compiles in a process of its own, in half a minute; rows that the JSON file has from these
versions of what is installed are not made again (delete the file after a change of the kernels).
"""

import argparse
import itertools
import json
import os
from functools import partial
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from report import each_row, parser, print_rows, run_row

from gatedjax.aot import compile_for
from gatedjax.aot.targets import target
from kernels_pallas.ops import rotary

SHAPES = ("B4,T4096,H16,D128", "B4,T4096,H8,D128", "B4,T4096,H8,D256")
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x")
KEYS = ("op", "target", "shape", "pass")
HEADER = ("shape", "target", "pass", "op", "us", "compulsory us", "ratio", "HBM MB")


def figures(op: str, chip: str, shape: str, pass_name: str) -> dict:
    """One row, in this process."""
    B, T, H, D = (int(part[1:]) for part in shape.split(","))
    frequencies = np.float32(10_000.0 ** (-np.arange(D // 2) / (D // 2)))

    def rotated(columns: Array, scale: Array, positions: Array) -> Array:
        heads = columns.reshape(B, T, H, D)
        y = rotary(heads, positions, frequencies, scale, implementation=op)
        return y.reshape(columns.shape)

    def both(columns: Array, scale: Array, positions: Array, dy: Array) -> tuple:
        y, pull_back = jax.vjp(partial(rotated, positions=positions), columns, scale)
        return y, pull_back(dy)

    columns = jax.ShapeDtypeStruct((B, T, H * D), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((D,), jnp.float32)
    positions = jax.ShapeDtypeStruct((B, T), jnp.int32)
    if pass_name == "fwd":
        _, report = compile_for(chip, rotated, columns, scale, positions)
    else:
        _, report = compile_for(chip, both, columns, scale, positions, columns)
    device = target(chip)
    compulsory_bytes = report.argument_bytes + report.output_bytes
    return {
        "microseconds": 1e6 * report.program_seconds,
        "hbm_bytes": report.program_hbm_bytes * device.cores,
        "compulsory_bytes": compulsory_bytes,
        "compulsory_microseconds": 1e6 * compulsory_bytes / device.hbm_bytes_per_second,
        "kernels": {kernel.name: 1e6 * kernel.seconds for kernel in report.kernels},
        "notes": list(report.notes),
    }


def line(row: tuple[str, ...], found: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, pass_name = row
    if "error" in found:
        return [shape, chip, pass_name, op, "", "", found["error"][:60], ""]
    time, least = found["microseconds"], found["compulsory_microseconds"]
    moved = f"{found['hbm_bytes'] / 1e6:.0f}"
    return [shape, chip, pass_name, op, f"{time:.0f}", f"{least:.0f}", f"{time / least:.2f}", moved]


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    passes = ("fwd", "fwd+bwd")
    wanted = itertools.product(
        args.op.split(","),
        args.target or TARGETS,
        args.shape or SHAPES,
        passes,
    )
    rows = each_row(args.json, KEYS, versions, wanted, partial(run_row, __file__))
    print_rows(HEADER, rows, line)


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--op", default="tpu,xla", help="comma-separated")
    made.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    made.add_argument("--shape", action="append", help=f"default: {', '.join(SHAPES)}")
    made.add_argument("--row", nargs=len(KEYS), help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
