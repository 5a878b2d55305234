"""Grouped matmuls of sparse experts, compiled for accelerators that are not there, beside megablox
and lax.ragged_dot.

    python benchmarks/moe.py [--target=tpu:v5e ...] [--rows=16384,131072]
        [--op=grouped_matmul,megablox,...] [--json=benchmarks/results/moe_tpu.json]

64 experts of d 2048 and ff 1024 in bfloat16; 131,072 rows are 16,384 tokens with 8 experts each.
For every kernel of a forward and backward pass: model time, beside the least there could be (every
operand moved once, or every FLOP at the chip's peak, the longer of the two); the FLOPs that the
matrix units execute, over the 2 M K N that are asked for; and HBM bytes. Group sizes are values of
the run: balanced; multinomial, as of a router that prefers nobody; and Zipf-skewed, where the
largest expert has a fifth of all rows. Times are the schedule's replay, not measurements;
`gatedjax/aot` says how far to trust them.

Ops: grouped_matmul and expert_mlp (the whole MLP of the experts, with the router's weights) are
ours; megablox is gmm and tgmm of jax's own Pallas ops, in the best tiles found for each chip (where
one seems quicker than its compulsory bytes, XLA put an operand into VMEM before); tokamax is its
ragged_dot, where it is installed, in the tiles that it chooses; ragged_dot is jax.lax's, for which
the FLOPs of the program's matrix products are given. For cuda:h200 there is no model of time:
FLOPs, registers and spills only. Rows that are in the --json file already, with the same versions,
are not made again.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata

# The accelerators' compilers are loaded to compile, not to run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from report import each_row, parser, run_row, table

from gatedjax.aot import Report, compile_and_replay
from gatedjax.aot.targets import Tpu, target
from kernels_pallas.ops import expert_mlp, grouped_matmul

D, F, G = 2048, 1024, 64
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
KEYS = ("op", "target", "rows")
OPS = ("grouped_matmul", "megablox", "tokamax", "expert_mlp", "ragged_dot")
HEADER = ("op", "target", "rows", "sizes", "kernel", "us", "least us", "ratio", "FLOPs")
# Rows, inner width and columns of megablox's tiles, the best of those tried on each chip: forward,
# dlhs, drhs.
TILES = {
    "tpu:v5e": ((256, 2048, 1024), (256, 1024, 2048), (256, 1024, 1024)),
    "tpu:v5p": ((256, 2048, 512), (256, 1024, 1024), (256, 1024, 512)),
    "tpu:v6e": ((256, 2048, 1024), (256, 1024, 2048), (256, 1024, 1024)),
}


def group_sizes(rows: int) -> dict[str, np.ndarray]:
    """int32 [G] each, of sum `rows`."""
    rng = np.random.default_rng(0)
    weights = rng.permutation(1 / np.arange(1, G + 1))
    skewed = np.floor(rows * weights / weights.sum()).astype(np.int32)
    skewed[np.argmax(skewed)] += rows - skewed.sum()
    even = np.full(G, 1 / G)
    return {
        "balanced": np.full(G, rows // G, np.int32),
        "multinomial": rng.multinomial(rows, even).astype(np.int32),
        "zipf": skewed,
    }


def forward_and_backward(op: Callable) -> Callable:
    """The cotangent of the output is the last argument, the group sizes the one before."""

    def both(*args):
        *floats, sizes, cotangent = args

        def of_floats(*floats):
            return op(*floats, sizes)

        out, vjp = jax.vjp(of_floats, *floats)
        return out, vjp(cotangent)

    return both


def megablox(chip: str) -> Callable:
    """Its three kernels, each with tiles of its own."""
    backend = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    forward, dlhs, drhs = TILES[chip]
    common = dict(preferred_element_type=jnp.bfloat16)

    def both(lhs, rhs, sizes, cotangent):
        transposed = lhs.swapaxes(0, 1)
        return (
            backend.gmm(lhs, rhs, sizes, tiling=forward, **common),
            backend.gmm(cotangent, rhs, sizes, tiling=dlhs, transpose_rhs=True, **common),
            backend.tgmm(transposed, cotangent, sizes, tiling=drhs, **common),
        )

    return both


def tokamax() -> Callable:
    """Its ragged_dot and gradients; it has to be told that the device is not here."""
    package = importlib.import_module("tokamax")

    def ragged_dot(lhs, rhs, sizes):
        return package.ragged_dot(lhs, rhs, sizes, implementation="mosaic")

    def both(*args):
        with package.config.cross_compile(True):
            return forward_and_backward(ragged_dot)(*args)

    return both


def program(op: str, chip: str, rows: int) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
    """A function of forward and backward pass, and its arguments."""
    implementation = "tpu" if chip.startswith("tpu") else "gpu"
    wide = jax.ShapeDtypeStruct((rows, D), jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct((rows, F), jnp.bfloat16)
    up = jax.ShapeDtypeStruct((G, D, F), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((G, F, D), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)

    def our_mlp(x, gate, up, down, weights, sizes):
        return expert_mlp(x, gate, up, down, sizes, weights, implementation=implementation)

    def our_matmul(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    if op == "expert_mlp":
        weights = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return forward_and_backward(our_mlp), (wide, up, up, down, weights, sizes, wide)
    functions = {
        "grouped_matmul": lambda: forward_and_backward(our_matmul),
        "ragged_dot": lambda: forward_and_backward(jax.lax.ragged_dot),
        "megablox": lambda: megablox(chip),
        "tokamax": tokamax,
    }
    return functions[op](), (wide, up, sizes, narrow)


def matmuls(kernel: str) -> int:
    """How many of 2 M K N FLOPs a kernel is asked for."""
    if "dpre" in kernel:
        return 1
    return 2 if "pre_activations" in kernel or "drows" in kernel else 1


def figures(op: str, chip: str, rows: int) -> dict:
    """All rows of one compilation, in this process."""
    fn, args = program(op, chip, rows)
    where = next(i for i, a in enumerate(args) if a.dtype == jnp.int32)  # the group sizes
    kinds = {name: {where: sizes} for name, sizes in group_sizes(rows).items()}
    device = target(chip)
    compiled, reports = compile_and_replay(chip, fn, *args, concretes=kinds)
    balanced = reports["balanced"]
    one_matmul = 2 * rows * D * F
    in_dots = balanced.compiler_flops or dot_flops(compiled.as_text())
    found = {
        "temporary_bytes": balanced.temp_bytes,
        "program_dot_flops_over_one_matmul": in_dots / one_matmul,
        "declared_flops_over_one_matmul": balanced.declared.flops / one_matmul,
    }
    if isinstance(device, Tpu):
        found["sizes"] = {
            name: of_sizes(report, device, one_matmul) for name, report in reports.items()
        }
    else:
        ours = [kernel for kernel in balanced.kernels if "grouped_matmul" in kernel.name]
        found["kernels"] = [dataclasses.asdict(kernel) for kernel in ours]
    return found


def of_sizes(report: Report, device: Tpu, one_matmul: float) -> dict:
    """The figures of one replay. Of a kernel whose steering values the replay does not know there
    is no time: None.
    """
    kernels = {}
    is_followed = True
    for kernel in report.kernels:
        executed = kernel.matrix_busy * kernel.schedule_seconds * device.peak_flops
        is_followed = is_followed and executed > 0
        unknown = {what: n for what, n in kernel.unknown.items() if what != "vpop.sfrf"}
        kernels[kernel.name] = {
            "microseconds": 1e6 * kernel.seconds if executed else None,
            "executed_over_useful_flops": executed / (one_matmul * matmuls(kernel.name)),
            "hbm_bytes": kernel.hbm_bytes,
            "unknown": sum(unknown.values()),
        }
    return {
        "program_microseconds": 1e6 * report.program_seconds if is_followed else None,
        "kernels": kernels,
    }


SHAPE = re.compile(r"%([\w.\-]+) = \w+\[([\d,]*)\]")
DOT = re.compile(
    r"%([\w.\-]+) = \S+ dot\((?:\S+ )?%([\w.\-]+),.*?lhs_contracting_dims=\{([\d,]+)\}"
)


def dot_flops(text: str) -> int:
    """Of the matrix products in a compiled program's text, for compilers that do not count: kernels
    are not in it.
    """
    shapes = {}
    for name, dims in SHAPE.findall(text):
        shapes[name] = [int(n) for n in dims.split(",") if n]
    total = 0
    for name, lhs, contracting in DOT.findall(text):
        contracted = [shapes[lhs][int(axis)] for axis in contracting.split(",")]
        total += 2 * math.prod(shapes[name]) * math.prod(contracted)
    return total


def least_microseconds(op: str, kernel: str, chip: str, rows: int) -> float:
    """Every operand of the kernel once at the chip's bandwidth, or its FLOPs at the chip's peak:
    the longer.
    """
    wide = 2 * rows * D
    narrow = 2 * rows * F
    matrices = 2 * G * D * F
    moved = wide + narrow + matrices
    if op == "expert_mlp":
        if matmuls(kernel) == 2:  # gate and up, or their gradients, in one kernel
            moved += matrices + narrow
        if "dpre" in kernel:  # reads both pre-activations and a gradient, writes two
            moved += 3 * narrow
        if "_down" in kernel or "ddown" in kernel:  # reads both pre-activations
            moved += narrow
    flops = 2 * rows * D * F * matmuls(kernel)
    device = target(chip)
    return 1e6 * max(moved / device.hbm_bytes_per_second, flops / device.peak_flops)


def lines(op: str, chip: str, rows: int, found: dict) -> list[list[str]]:
    """Of the table."""
    head = [op, chip, f"{rows:,}"]
    if "error" in found:
        return [[*head, "", found["error"][:60], "", "", "", ""]]
    out = []
    for kind, of_size in found.get("sizes", {}).items():
        kernels = of_size["kernels"]
        for name, kernel in kernels.items():
            least = least_microseconds(op, name, chip, rows)
            out.append([*head, kind, name, *kernel_cells(kernel, least)])
        if of_size["program_microseconds"] is not None:
            total = sum(kernel["microseconds"] for kernel in kernels.values())
            out.append([*head, kind, "all kernels", f"{total:,.0f}", "", "", ""])
    if op == "ragged_dot" or not out:
        dots = found["program_dot_flops_over_one_matmul"]
        declared = found["declared_flops_over_one_matmul"]
        text = f"dots outside kernels {dots:.1f}, kernels {declared:.1f} x 2 M K N"
        out.append([*head, "", text, "", "", "", f"{dots + declared:.1f}"])
    return out


def kernel_cells(kernel: dict, least: float) -> list[str]:
    """Time, the least time, their ratio, FLOPs."""
    time = kernel["microseconds"]
    if time is None:
        return ["not followed", "", "", ""]
    flops = kernel["executed_over_useful_flops"]
    return [f"{time:,.0f}", f"{least:,.0f}", f"{time / least:.2f}", f"{flops:.2f}"]


def is_here(op: str, chip: str) -> bool:
    """Whether the op is installed and has a kernel for the chip."""
    if op == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return False
    return chip.startswith("tpu") or op not in ("megablox", "tokamax")


def versions(targets: Iterable[str]) -> dict[str, str]:
    """Of the compilers."""
    names = {"libtpu" if chip.startswith("tpu") else "jax-cuda13-plugin" for chip in targets}
    if importlib.util.find_spec("tokamax"):
        names.add("tokamax")
    return {name: metadata.version(name) for name in sorted(names)}


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--target", action="append")
    made.add_argument("--rows", default="16384,131072")
    made.add_argument("--op", default=",".join(OPS), help="comma-separated")
    made.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = flags()
    if args.row:
        op, chip, rows = args.row
        print(json.dumps(figures(op, chip, int(rows))))
        return
    targets = args.target or TARGETS
    used = versions(targets)
    every_rows = [int(rows) for rows in args.rows.split(",")]
    every_row = itertools.product(every_rows, targets, args.op.split(","))
    wanted = [(op, chip, rows) for rows, chip, op in every_row if is_here(op, chip)]
    make = partial(run_row, __file__)
    shown = []
    for row, found in each_row(args.json, KEYS, used, wanted, make, d=D, ff=F, experts=G):
        new = lines(*row, found)
        shown += new
        print("\n".join("  ".join(line) for line in new), file=sys.stderr, flush=True)
    print(table(HEADER, shown))


if __name__ == "__main__":
    main()
