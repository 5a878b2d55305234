"""Grouped matmuls of sparse experts, compiled for accelerators that are not there, beside megablox
and lax.ragged_dot.

    python benchmarks/moe.py [--target=tpu:v5e ...] [--rows=16384,131072] [--op=grouped_matmul,megablox,...]
                             [--json=benchmarks/results/moe_tpu.json]

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
import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # the accelerators' compilers are loaded to compile, not to run

import jax
import jax.numpy as jnp
import numpy as np
from report import known_rows, table, write_json

from gatedjax.aot import compile_and_replay
from gatedjax.aot.targets import Tpu, target
from kernels_pallas.ops import expert_mlp, grouped_matmul

D, F, G = 2048, 1024, 64
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
KEYS = ("op", "target", "rows")
OPS = ("grouped_matmul", "megablox", "tokamax", "expert_mlp", "ragged_dot")
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
    zipf = rng.permutation(1 / np.arange(1, G + 1))
    skewed = np.floor(rows * zipf / zipf.sum()).astype(np.int32)
    skewed[np.argmax(skewed)] += rows - skewed.sum()
    return {
        "balanced": np.full(G, rows // G, np.int32),
        "multinomial": rng.multinomial(rows, np.full(G, 1 / G)).astype(np.int32),
        "zipf": skewed,
    }


def forward_and_backward(f):
    """The cotangent of the output is the last argument, the group sizes the one before."""

    def both(*args):
        *floats, sizes, cotangent = args
        out, pull = jax.vjp(lambda *floats: f(*floats, sizes), *floats)
        return out, pull(cotangent)

    return both


def megablox(chip: str):
    """Its three kernels, each with tiles of its own."""
    backend = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    forward, dlhs, drhs = TILES[chip]
    common = dict(preferred_element_type=jnp.bfloat16)

    def both(lhs, rhs, sizes, cotangent):
        return (
            backend.gmm(lhs, rhs, sizes, tiling=forward, **common),
            backend.gmm(cotangent, rhs, sizes, tiling=dlhs, transpose_rhs=True, **common),
            backend.tgmm(lhs.swapaxes(0, 1), cotangent, sizes, tiling=drhs, **common),
        )

    return both


def tokamax():
    """Its ragged_dot and gradients; it has to be told that the device is not here."""
    package = importlib.import_module("tokamax")
    f = forward_and_backward(lambda *a: package.ragged_dot(*a, implementation="mosaic"))

    def both(*args):
        with package.config.cross_compile(True):
            return f(*args)

    return both


def program(op: str, chip: str, rows: int):
    """(function, its arguments, FLOPs of one matmul of the op)."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    kernel = "tpu" if chip.startswith("tpu") else "gpu"
    if op == "expert_mlp":
        weights = jax.ShapeDtypeStruct((rows,), jnp.float32)
        args = (
            array(rows, D),
            array(G, D, F),
            array(G, D, F),
            array(G, F, D),
            weights,
            sizes,
            array(rows, D),
        )
        call = lambda *a: expert_mlp(*a[:4], a[5], a[4], implementation=kernel)
        return forward_and_backward(call), args
    args = array(rows, D), array(G, D, F), sizes, array(rows, F)
    if op in ("megablox", "tokamax"):
        return megablox(chip) if op == "megablox" else tokamax(), args
    f = (
        jax.lax.ragged_dot
        if op == "ragged_dot"
        else lambda *a: grouped_matmul(*a, implementation=kernel)
    )
    return forward_and_backward(f), args


def matmuls(kernel: str) -> int:
    """How many of 2 M K N FLOPs a kernel is asked for."""
    return (
        2
        if any(name in kernel for name in ("pre_activations", "drows")) and "dpre" not in kernel
        else 1
    )


def figures(op: str, chip: str, rows: int) -> dict:
    """All rows of one compilation, in this process."""
    fn, args = program(op, chip, rows)
    where = next(i for i, a in enumerate(args) if a.dtype == jnp.int32)
    kinds = {name: {where: sizes} for name, sizes in group_sizes(rows).items()}
    device = target(chip)
    compiled, reports = compile_and_replay(chip, fn, *args, concretes=kinds)
    one, flops = reports["balanced"], 2 * rows * D * F
    found = {
        "temporary_bytes": one.temp_bytes,
        "program_dot_flops_over_one_matmul": (one.compiler_flops or dot_flops(compiled.as_text()))
        / flops,
        "declared_flops_over_one_matmul": one.declared.flops / flops,
    }
    if not isinstance(device, Tpu):
        return found | {
            "kernels": [dataclasses.asdict(k) for k in one.kernels if "grouped_matmul" in k.name]
        }
    found["sizes"] = {name: of_sizes(report, device, flops) for name, report in reports.items()}
    return found


def of_sizes(report, device: Tpu, flops: float) -> dict:
    """The figures of one replay. Of a kernel whose steering values the replay does not know there
    is no time: None.
    """
    executed = {
        k.name: k.matrix_busy * k.schedule_seconds * device.peak_flops for k in report.kernels
    }
    kernels = {
        k.name: {
            "microseconds": 1e6 * k.seconds if executed[k.name] else None,
            "executed_over_useful_flops": executed[k.name] / (flops * matmuls(k.name)),
            "hbm_bytes": k.hbm_bytes,
            "unknown": sum(n for what, n in k.unknown.items() if what != "vpop.sfrf"),
        }
        for k in report.kernels
    }
    return {
        "program_microseconds": 1e6 * report.program_seconds if all(executed.values()) else None,
        "kernels": kernels,
    }


def dot_flops(text: str) -> int:
    """Of the matrix products in a compiled program's text, for compilers that do not count: kernels
    are not in it.
    """
    shapes = {name: [int(n) for n in dims.split(",") if n] for name, dims in SHAPE.findall(text)}
    total = 0
    for name, lhs, contracted in DOT.findall(text):
        total += (
            2
            * math.prod(shapes[name])
            * math.prod(shapes[lhs][int(i)] for i in contracted.split(","))
        )
    return total


SHAPE = re.compile(r"%([\w.\-]+) = \w+\[([\d,]*)\]")
DOT = re.compile(
    r"%([\w.\-]+) = \S+ dot\((?:\S+ )?%([\w.\-]+),.*?lhs_contracting_dims=\{([\d,]+)\}"
)


def least_microseconds(op: str, kernel: str, chip: str, rows: int) -> float:
    """Every operand of the kernel once at the chip's bandwidth, or its FLOPs at the chip's peak:
    the longer.
    """
    wide, narrow, matrices = 2 * rows * D, 2 * rows * F, 2 * G * D * F
    moved = wide + narrow + matrices
    if op == "expert_mlp":
        moved += {2: matrices + narrow, 1: 0}[matmuls(kernel)]
        moved += narrow * sum(name in kernel for name in ("dpre", "_down", "ddown"))
        moved += 2 * narrow * ("dpre" in kernel)
    flops = 2 * rows * D * F * matmuls(kernel)
    return 1e6 * max(moved / target(chip).hbm_bytes_per_second, flops / target(chip).peak_flops)


def in_a_process(*row: str) -> dict:
    """One compilation a process: the compilers read their flags once. {"error": ...} if it
    fails.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--row", *row], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def lines(op: str, chip: str, rows: int, found: dict) -> list[list[str]]:
    """Of the table."""
    head = [op, chip, f"{rows:,}"]
    if "error" in found:
        return [[*head, "", found["error"][:60], "", "", "", ""]]
    out = []
    for kind, of_size in found.get("sizes", {}).items():
        for name, k in of_size["kernels"].items():
            if k["microseconds"] is None:
                out.append([*head, kind, name, "not followed", "", "", ""])
                continue
            floor = least_microseconds(op, name, chip, rows)
            out.append(
                [
                    *head,
                    kind,
                    name,
                    f"{k['microseconds']:,.0f}",
                    f"{floor:,.0f}",
                    f"{k['microseconds'] / floor:.2f}",
                    f"{k['executed_over_useful_flops']:.2f}",
                ]
            )
        if of_size["program_microseconds"] is not None:
            total = sum(k["microseconds"] for k in of_size["kernels"].values())
            out.append([*head, kind, "all kernels", f"{total:,.0f}", "", "", ""])
    if op == "ragged_dot" or not out:
        dots, declared = (
            found[f"{of}_flops_over_one_matmul"] for of in ("program_dot", "declared")
        )
        text = f"dots outside kernels {dots:.1f}, kernels {declared:.1f} x 2 M K N"
        out.append([*head, "", text, "", "", "", f"{dots + declared:.1f}"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append")
    parser.add_argument("--rows", default="16384,131072")
    parser.add_argument("--op", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        op, chip, rows = args.row
        print(json.dumps(figures(op, chip, int(rows))))
        return
    used = versions(args.target or TARGETS)
    known = known_rows(args.json, KEYS, used)
    shown, record = [], dict(known)
    for rows in map(int, args.rows.split(",")):
        for chip in args.target or TARGETS:
            for op in args.op.split(","):
                here = op != "tokamax" or importlib.util.find_spec(op)
                if not here or (op in ("megablox", "tokamax") and not chip.startswith("tpu")):
                    continue
                found = known.get((op, chip, rows)) or in_a_process(op, chip, str(rows))
                record[op, chip, rows] = found
                new = lines(op, chip, rows, found)
                shown += new
                print("\n".join("  ".join(line) for line in new), file=sys.stderr, flush=True)
                if args.json:  # after every row: a run takes long
                    written = [dict(zip(KEYS, key)) | row for key, row in record.items()]
                    write_json(args.json, {"d": D, "ff": F, "experts": G, "rows": written}, used)
    header = ["op", "target", "rows", "sizes", "kernel", "us", "least us", "ratio", "FLOPs"]
    print(table(header, shown))


def versions(targets) -> dict[str, str]:
    """Of the compilers."""
    names = {"libtpu" if chip.startswith("tpu") else "jax-cuda13-plugin" for chip in targets}
    names |= {"tokamax"} if importlib.util.find_spec("tokamax") else set()
    return {name: metadata.version(name) for name in sorted(names)}


if __name__ == "__main__":
    main()
