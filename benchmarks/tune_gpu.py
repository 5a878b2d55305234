"""Chooses block sizes and warps of the GPU kernels, for `kernels_pallas/<op>/gpu/tuning.py`.

    python benchmarks/tune_gpu.py --op=linear_scan [--decay=scalar] [--json=FILE]
    python benchmarks/tune_gpu.py --op=attention --target=cuda:a100 [--shape=B4,T4096,H16,Hk16,D128]

On a GPU: forward and backward together by time, one field after the other from the table's row; a
value stays when it is at least 2 % faster. Prints what was tried, and the row to put into the
table. What does not compile or does not fit counts as infinitely slow.

With --target: for a GPU that is not here. Each value is compiled, and what its kernels need is
printed: registers, spilled bytes, programs a multiprocessor, and the instructions that a warp
issues for a tile. None is chosen by a program: "bad" marks what spills, or has its matrix
instructions serialized. --dry: a tiny shape, two values, interpreted on the CPU.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if any(argument.startswith(("--target", "--dry")) for argument in sys.argv):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on a device
    # Kernels spill without LLVM's optimizations.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from report import parser, write_json

from benchmarks.gpu import cases, variants
from benchmarks.gpu.programs import Program, programs_of
from benchmarks.gpu.timing import time_program
from gatedjax.aot import compile_for
from gatedjax.aot.gpu import devices
from gatedjax.aot.report import GpuKernel
from gatedjax.aot.targets import GPUS
from kernels_pallas.attention.gpu import tuning as attention_tuning
from kernels_pallas.common.gpu import chip
from kernels_pallas.common.padding import power_of_two
from kernels_pallas.grouped_matmul.gpu import tuning as grouped_tuning
from kernels_pallas.linear_scan.gpu import tuning as scan_tuning

# A value has to take less than this fraction of the best time.
GAIN = 0.98
DRY_VALUES = 2

# By op, in the order in which they are tried: what the passes share first.
VALUES = {
    "linear_scan": {
        "chunk": (32, 64, 128),
        "scan_block_v": (16, 32, 64, 128),
        "scan_block_k": (32, 64, 128, 256),
        "scan_warps": (2, 4, 8),
        "scan_stages": (1, 2, 3, 4),
        "programs_per_core": (1, 2, 4),
        "intra_block_k": (16, 32, 64, 128),
        "intra_warps": (4, 8),
        "back_block_k": (16, 32, 64),
        "back_block_v": (32, 64, 128),
        "back_warps": (4, 8),
        "dproducts_warps": (4, 8),
    },
    # Of each kernel.
    "attention": {
        "block_q": (32, 64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "grouped_matmul": {
        "rows": (64, 128, 256),
        "inner": (32, 64, 128),
        "columns": (64, 128, 256),
        "warps": (4, 8),
        "stages": (2, 3, 4, 5),
    },
}
# Parts of a row, one for each kernel that the program has; None where a row has no parts.
KERNELS: dict[str, tuple[str | None, ...]] = {
    "linear_scan": (None,),
    "attention": ("forward", "dq", "dkv", "dv"),
    "grouped_matmul": ("rows", "outer"),
}
HEADLINES = {"linear_scan": "scan", "attention": "attention", "grouped_matmul": "grouped"}
# NamedTuples: a table's row, or one kernel's part of it.
Row = Any


class Value(NamedTuple):
    """A field of a row, and what is tried for it. `kernel` is None where a row has no parts."""

    kernel: str | None
    field: str
    value: int

    def put_into(self, row: Row) -> Row:
        """The row with this value."""
        change = {self.field: self.value}
        if self.kernel is None:
            return row._replace(**change)
        part = getattr(row, self.kernel)
        return row._replace(**{self.kernel: part._replace(**change)})

    def __str__(self) -> str:
        name = self.field if self.kernel is None else f"{self.kernel}.{self.field}"
        return f"{name}={self.value}"


def values(op: str, row: Row, dry: bool) -> Iterator[Value]:
    """In the order in which they are tried."""
    for kernel in KERNELS[op]:
        # dk and dv are one kernel where registers hold both.
        if kernel is not None and getattr(row, kernel) is None:
            continue
        for field, tried in VALUES[op].items():
            for value in tried[: DRY_VALUES if dry else None]:
                yield Value(kernel, field, value)
        if dry:
            return


def shape_of(op: str, text: str, decay: str, dry: bool) -> cases.Shape:
    """The kit's headline, with the sizes of a text such as "B4,T4096"."""
    headline = getattr(cases.headline(dry), HEADLINES[op])
    sizes = {name: int(size) for name, size in re.findall(r"([A-Z][a-z]?)(\d+)", text)}
    if op == "linear_scan":
        headline = headline._replace(decay=decay)
    return headline._replace(**sizes)


def row_of(op: str, shape: cases.Shape) -> Row:
    """The table's row for a shape in bfloat16, on the device that is compiled for."""
    match op, shape:
        case "linear_scan", cases.ScanShape():
            table = scan_tuning.TUNED
            return table[chip(table, scan_tuning.DEFAULT_CHIP)].schedules[shape.decay]
        case "attention", cases.AttentionShape():
            table = attention_tuning.TUNED
            rows = table[chip(table, attention_tuning.DEFAULT_CHIP)]["bfloat16"]
            return rows[max(64, power_of_two(shape.D))]
        case _:
            return grouped_tuning.schedule(2)


def put_into_table(op: str, row: Row) -> None:
    """The row for every shape and chip."""
    if op == "linear_scan":
        variants.set_scan(row._asdict())
    elif op == "attention":
        variants.set_attention(row._asdict())
    else:
        for rows in grouped_tuning.TUNED.values():
            rows[2] = row


def program_of(shape: cases.Shape, dry: bool) -> Program:
    """Forward and backward together."""
    _, both = programs_of(shape, cases.OURS, dry)
    return both


# --- on a device, by time


def milliseconds(op: str, row: Row, program: Program, dry: bool) -> float:
    """Of a call with a row; infinity where it cannot run."""
    put_into_table(op, row)
    try:
        return time_program(program, dry)["ms"]
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        print(f"  {first_line[:150]}")
        return math.inf


def tune_by_time(op: str, shape: cases.Shape, dry: bool) -> tuple[Row, list[dict]]:
    """The best row found, and everything tried."""
    program = program_of(shape, dry)
    best = row_of(op, shape)
    fastest = milliseconds(op, best, program, dry)
    tried = [{"row": str(best), "ms": fastest}]
    print(f"{shape.case} {fastest:.3f} ms with {best}", flush=True)
    for value in values(op, best, dry):
        candidate = value.put_into(best)
        if candidate == best:
            continue
        time = milliseconds(op, candidate, program, dry)
        tried.append({"row": str(candidate), "ms": time if math.isfinite(time) else None})
        print(f"  {value}: {time:.3f} ms", flush=True)
        if time < GAIN * fastest:
            best = candidate
            fastest = time
    return best, tried


# --- for a GPU that is not here, by what compiles


def is_bad(kernel: GpuKernel) -> bool:
    """Whether it spills, or ptxas could not overlap its matrix instructions."""
    return bool(kernel.spill_bytes or kernel.warnings)


def facts(op: str, target: str, row: Row, program: Program) -> list[dict[str, Any]]:
    """Of each kernel of the op, by name; one line with the error where it does not compile."""
    put_into_table(op, row)
    jax.clear_caches()
    function, specs, _ = program.build()
    try:
        _, report = compile_for(target, function, *specs)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        return [{"kernel": "-", "error": str(error).splitlines()[0][:150]}]
    found = []
    for kernel in sorted(report.kernels, key=lambda kernel: kernel.name):
        if isinstance(kernel, GpuKernel) and kernel.name.startswith(op):
            found.append(
                {
                    "kernel": kernel.name.removeprefix(f"{op}_"),
                    "bad": is_bad(kernel),
                    "registers": kernel.registers,
                    "spilled": kernel.spill_bytes,
                    "per_core": kernel.blocks_per_core,
                    "warps": None if kernel.threads is None else kernel.threads // 32,
                    "shared": kernel.shared_memory_bytes,
                    "a_tile": kernel.tile_instructions,
                    "in_all": kernel.instructions,
                    "warnings": list(kernel.warnings),
                }
            )
    return found


def show(label: str, found: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """The kernels that a value has changed."""
    for line in found:
        if line not in before:
            text = " ".join(f"{name} {figure}" for name, figure in line.items())
            print(f"  {label}: {text}", flush=True)


def tune_by_facts(op: str, shape: cases.Shape, target: str, dry: bool) -> list[dict]:
    """Everything tried, from the table's row, one value at a time."""
    program = program_of(shape, dry=False)
    # The table's row for the target is the one that its name has.
    with jax.sharding.use_abstract_mesh(mesh_of(target)):
        row = row_of(op, shape)
    unchanged = facts(op, target, row, program)
    print(f"{target} {shape.case} with {row}")
    show("as it is", unchanged, [])
    tried = [{"value": "as it is", "kernels": unchanged}]
    for value in values(op, row, dry):
        candidate = value.put_into(row)
        if candidate == row:
            continue
        found = facts(op, target, candidate, program)
        show(str(value), found, unchanged)
        tried.append({"value": str(value), "kernels": found})
    return tried


def mesh_of(target: str) -> jax.sharding.AbstractMesh:
    """A mesh of one GPU that is not here."""
    [device] = devices(GPUS[target.removeprefix("cuda:")])
    return jax.sharding.Mesh([device], ("x",)).abstract_mesh


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--op", required=True, choices=VALUES)
    flags.add_argument("--shape", default="", help="sizes other than the kit's: B4,T4096,D64")
    flags.add_argument("--decay", default="vector", choices=("vector", "scalar"))
    flags.add_argument("--target", help="a GPU that is not here: cuda:a100, cuda:h100, cuda:h200")
    flags.add_argument("--dry", action="store_true", help="a tiny shape on the CPU, two values")
    args = flags.parse_args()
    shape = shape_of(args.op, args.shape, args.decay, args.dry)
    if args.target:
        tried = tune_by_facts(args.op, shape, args.target, args.dry)
    else:
        best, tried = tune_by_time(args.op, shape, args.dry)
        print(f"put into kernels_pallas/{args.op}/gpu/tuning.py: {best}")
    if args.json:
        device = args.target or jax.devices()[0].device_kind
        write_json(args.json, {"device": device, "shape": shape.case, "tried": tried}, {})


if __name__ == "__main__":
    main()
