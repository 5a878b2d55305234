"""What the compiler says of the GPU kernels, for GPUs that are not here: instructions, registers,
spills, warnings, matrix instructions. The table of docs/performance.md.

    python benchmarks/gpu_report.py [--op=attention ...] [--target=cuda:h100 ...] \\
        [--before=benchmarks/results/gpu_report_before.json] \\
        [--json=benchmarks/results/gpu_report.json]

A program is the forward and backward pass, as in training, or a decoding step. "a tile": what a
warp issues for a tile, the shortest loop with matrix instructions. Static facts, no times. The
ptxas is the one that XLA takes (kernels_pallas/common/ptxas.py). With --before every figure that
has changed since that run is printed as "before → now". Needs jax's CUDA plugin, ptxas and nvdisasm
(make test-cuda-aot builds an environment). Of another op: a line of `CASES`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on a device
# Kernels spill without LLVM's optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=3")

import jax
import jax.numpy as jnp
from report import parser, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.report import GpuKernel
from kernels_pallas.common import two_paths
from kernels_pallas.common.ptxas import ptxas
from kernels_pallas.ops import attention_step

TARGETS = ("cuda:h100", "cuda:a100")


class Line(NamedTuple):
    """A program of an op, forward and backward."""

    shape: str
    dtype: str = "bfloat16"
    # name=value, as of `python -m gatedjax.aot --set`.
    options: tuple[str, ...] = ()


# By op.
CASES: dict[str, list[Line]] = {
    "attention": [
        Line("B4,T4096,H16,D64"),
        Line("B4,T4096,H16,D128"),
        Line("B4,T4096,H16,D128", options=("segments=yes",)),
        Line("B1,T32768,H16,Hk2,D256", options=("gate=element",)),
        Line("B4,T4096,H16,D128", "float32"),
    ],
    "linear_scan": [
        Line("B4,T4096,H16,K64,V64", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", options=("decay=scalar",)),
        # More programs of the scan than an H100 has multiprocessors.
        Line("B8,T4096,H16,K128,V128", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", "float32", options=("decay=vector",)),
    ],
    "delta_scan": [
        Line("B4,T4096,H16,K64,V64", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", options=("decay=scalar",)),
        Line("B4,T4096,H16,K256,V256", options=("decay=vector",)),
        Line("B4,T4096,H16,K128,V128", "float32", options=("decay=vector",)),
    ],
    "grouped_matmul": [
        Line("M65536,K2048,N1024,G64"),
        Line("M65536,K2048,N1024,G64", "float32"),
    ],
    "expert_mlp": [Line("R65536,M2048,F1024,G64")],
}
# How the names of an op's kernels begin, where not with its own.
PREFIXES = {"expert_mlp": "grouped_matmul"}
# Slots of a cache, query and key heads, channels: one decoding step of 4 rows.
STEPS = {"attention": [(8192, 16, 2, 128)]}
KEYS = ("target", "case", "kernel")
FIGURES = {
    "a tile": "tile_instructions",
    "in all": "instructions",
    "registers": "registers",
    "spilled bytes": "spill_bytes",
    "programs an SM": "blocks_per_core",
    "async copies": "async_copies",
    "warnings": "warnings",
    "wgmma, mma": "matrix_instructions",
}


def figures_of(kernel: GpuKernel) -> dict[str, object]:
    """By their names in the JSON file; `list`s, as JSON reads them again."""
    return {
        "tile_instructions": kernel.tile_instructions,
        "instructions": kernel.instructions,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "blocks_per_core": kernel.blocks_per_core,
        "shared_memory_bytes": kernel.shared_memory_bytes,
        "async_copies": kernel.async_copies,
        "warnings": list(kernel.warnings),
        "matrix_instructions": [kernel.wgmma, kernel.mma],
    }


def compiled(
    op: str,
    target: str,
    label: str,
    fn: Callable,
    *args: jax.ShapeDtypeStruct,
) -> list[dict[str, object]]:
    """A row for each of the op's kernels in the program."""
    _, report = compile_for(target, fn, *args)
    rows = []
    for kernel in report.kernels:
        prefix = PREFIXES.get(op, op)
        if isinstance(kernel, GpuKernel) and kernel.name.startswith(prefix):
            # Of several calls each has a number.
            name = kernel.name.partition("__")[0]
            keys = dict(zip(KEYS, (target, label, name)))
            rows.append({"op": op} | keys | figures_of(kernel))
    return sorted(rows, key=lambda row: str(row["kernel"]))


def training_rows(op: str, target: str, line: Line) -> list[dict[str, object]]:
    """Of the forward and backward pass."""
    options = dict(setting.split("=") for setting in line.options)
    case = make_case(op, line.shape, line.dtype, {"implementation": "gpu", **options})
    label = " ".join([line.shape, line.dtype, *line.options])
    return compiled(op, target, label, case.backward(), *case.backward_args())


def step_rows(target: str, S: int, H: int, Hk: int, D: int) -> list[dict[str, object]]:
    """Of one decoding step of attention against a cache of S slots."""

    def step(q, k_cache, v_cache, valid):
        return attention_step(q, k_cache, v_cache, valid=valid, implementation="gpu")

    q = jax.ShapeDtypeStruct((4, H, D), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, S, Hk, D), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((4, S), jnp.bool_)
    label = f"step B4,S{S},H{H},Hk{Hk},D{D} bfloat16"
    return compiled("attention", target, label, step, q, cache, cache, valid)


def text_of(figure: object) -> str:
    if isinstance(figure, list):
        return ", ".join(str(x) for x in figure) or "none"
    return "-" if figure is None else f"{figure:,}"


def cells_of(row: dict, earlier: dict) -> list[str]:
    """Of one kernel; a figure that has changed is "before → now"."""
    cells = []
    for name in FIGURES.values():
        now = text_of(row[name])
        old = text_of(earlier.get(name, row[name]))
        cells.append(now if old == now else f"{old} → {now}")
    return cells


def markdown(rows: list[dict], before: dict[tuple, dict]) -> str:
    """A table for each op and target; kernels of the same figures are one line."""
    tables: dict[str, list[str]] = {}
    last_case = None
    for row in rows:
        keys = tuple(row[name] for name in KEYS)
        title = f"{row['op']}, {row['target']}"
        if title not in tables:
            columns = [title, *FIGURES]
            tables[title] = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            last_case = None
        # Underscores are of names; bfloat16 is meant where nothing is said.
        kernel = row["kernel"].removeprefix(PREFIXES.get(row["op"], row["op"])).replace("_", " ")
        case = row["case"].replace(" bfloat16", "")
        name = kernel.strip() if case == last_case else f"{case}: {kernel.strip()}"
        line = f"| {' | '.join([name, *cells_of(row, before.get(keys, {}))])} |"
        if line not in tables[title][-2:]:
            tables[title].append(line)
        last_case = case
    return "\n\n".join("\n".join(lines) for lines in tables.values())


def add(rows: list[dict], found: list[dict], path: str | None) -> None:
    """Rows are kept as soon as they are known: a program takes a minute on a busy machine."""
    rows += found
    if path:
        assembler = ptxas()
        version = "none" if assembler is None else ".".join(map(str, assembler.version))
        write_json(path, {"rows": rows}, {"ptxas": version})


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--op", action="append", choices=CASES, help="all of them if not given")
    flags.add_argument("--target", action="append", help=f"{', '.join(TARGETS)} if not given")
    flags.add_argument("--before", help="the JSON file of an earlier run")
    args = flags.parse_args()
    # The kernels alone, without the careful path beside them, which is XLA's and compiles for long.
    two_paths.if_bad = lambda is_bad, careful, fast, *arrays: fast
    rows: list[dict[str, object]] = []
    for op in args.op or CASES:
        for target in args.target or TARGETS:
            for line in CASES[op]:
                add(rows, training_rows(op, target, line), args.json)
            for sizes in STEPS.get(op, []):
                add(rows, step_rows(target, *sizes), args.json)
    before = {}
    if args.before:
        for row in json.loads(Path(args.before).read_text())["rows"]:
            before[tuple(row[name] for name in KEYS)] = row
    print(markdown(rows, before))


if __name__ == "__main__":
    main()
