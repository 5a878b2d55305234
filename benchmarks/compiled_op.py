"""What the tables of small ops compiled for absent TPUs share: the figures of a program, the flags,
the rows.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata

import jax
from report import each_row, parser, print_rows, run_row

from gatedjax.aot import compile_for
from gatedjax.aot.targets import target

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x")
PASSES = ("fwd", "fwd+bwd")
# What names a row.
KEYS = ("op", "target", "shape", "pass")
HEADER = ("shape", "target", "pass", "op", "us", "compulsory us", "ratio", "HBM MB")

# (implementation, shape) -> function of arrays and abstract arguments; those that it is
# differentiated in come first. The result is one array, like the first argument.
type Program = Callable[[str, str], tuple[Callable, Sequence[jax.ShapeDtypeStruct], int]]


def main(doc: str, script: str, shapes: Sequence[str], program: Program) -> None:
    """A row, in this process, if the flags name one; else all rows, each in one of its own.

    Args:
      doc: of the script.
      script: its path.
      shapes: of the rows, unless flags name others.
      program: what is compiled, and in how many of its arguments it is differentiated.
    """
    args = _flags(doc, shapes)
    if args.row:
        print(json.dumps(_figures(program, *args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    wanted = itertools.product(
        args.op.split(","),
        args.target or TARGETS,
        args.shape or shapes,
        PASSES,
    )
    rows = each_row(args.json, KEYS, versions, wanted, partial(run_row, script))
    print_rows(HEADER, rows, _line)


def _flags(doc: str, shapes: Sequence[str]) -> argparse.Namespace:
    made = parser(doc)
    made.add_argument("--op", default="tpu,xla", help="comma-separated")
    made.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    made.add_argument("--shape", action="append", help=f"default: {', '.join(shapes)}")
    made.add_argument("--row", nargs=len(KEYS), help=argparse.SUPPRESS)
    return made.parse_args()


def _figures(program: Program, op: str, chip: str, shape: str, pass_name: str) -> dict:
    """Of one row."""
    fn, arguments, num_differentiated = program(op, shape)

    def both(dy: jax.Array, *arrays: jax.Array):
        rest = arrays[num_differentiated:]
        y, pull_back = jax.vjp(lambda *x: fn(*x, *rest), *arrays[:num_differentiated])
        return y, pull_back(dy)

    if pass_name == "fwd":
        _, report = compile_for(chip, fn, *arguments)
    else:
        _, report = compile_for(chip, both, arguments[0], *arguments)
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


def _line(row: tuple[str, ...], found: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, pass_name = row
    if "error" in found:
        return [shape, chip, pass_name, op, "", "", found["error"][:60], ""]
    time, least = found["microseconds"], found["compulsory_microseconds"]
    moved = f"{found['hbm_bytes'] / 1e6:.0f}"
    return [shape, chip, pass_name, op, f"{time:.0f}", f"{least:.0f}", f"{time / least:.2f}", moved]
