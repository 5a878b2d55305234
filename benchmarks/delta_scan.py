"""delta_scan compiled for TPUs that are not there, beside plain XLA and, where installed, tokamax's
Kimi Delta Attention.

    python benchmarks/delta_scan.py [--target=tpu:v6e ...] [--shape=B1,T8192,H32,K128,V128 ...]
        [--op=tpu,xla,tokamax] [--decay=vector,scalar] [--pass=fwd,bwd] [--json=FILE]

For every shape, decay, chip and pass: model time of the kernels (plain XLA: of the program), and
the time that the compulsory bytes take, every input and output of the program moved once. Times are
the schedule's replay, not measurements; `gatedjax/aot` says how far to trust them. The kernels'
programs also hold a path for numbers that are not finite, which costs nothing where it is not
taken and is no part of the times. Each row compiles in a process of its own, in a minute or more.

tokamax demands decays above -5 a token and rounds its inverse to bfloat16.
"""

import argparse
import itertools
import json
import os
import sys
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax.numpy as jnp
from linear_scan import array
from report import installed_versions, parser, run_row, table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target

SHAPES = ("B1,T8192,H32,K128,V128",)
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
PEERS = {"tokamax": "tokamax"}
KEYS = ("op", "target", "shape", "decay", "pass")
HEADER = ("shape", "decay", "target", "pass", "op", "us", "compulsory us", "ratio")


def case_of(op: str, shape: str, decay: str) -> Case:
    """Ours: arrays [B, T, H * D], as projections make them. Peers: the layout that each takes."""
    if op in ("tpu", "xla"):
        return make_case("delta_scan", shape, "bfloat16", {"decay": decay, "implementation": op})
    if decay != "vector":
        raise ValueError(f"decay: got {decay!r}, expected vector for {op}")
    B, T, H, K, V = (int(part[1:]) for part in shape.split(","))
    return tokamax_case(B, T, H, K, V)


def tokamax_case(B: int, T: int, H: int, K: int, V: int) -> Case:
    import tokamax
    from tokamax._src.ops.kda import api

    tokamax.config.cross_compile(True).__enter__()  # for the rest of the process

    def kda(q, k, v, log_decay, beta):
        o, *_ = api.kimi_delta_attention(
            q,
            k,
            v,
            log_decay,
            beta,
            lower_bound=-5.0,
            implementation="mosaic",
        )
        return o

    queries = array(H, B, T, K)
    values = array(H, B, T, V)
    log_decays = array(H, B, T, K, dtype=jnp.float32)
    betas = array(H, B, T, dtype=jnp.float32)
    return Case(kda, (queries, queries, values, log_decays, betas), {})


def figures(op: str, chip: str, shape: str, decay: str, pass_name: str) -> dict:
    """One row, in this process."""
    case = case_of(op, shape, decay)
    if pass_name == "fwd":
        _, report = compile_for(chip, case.forward, *case.args)
    else:
        _, report = compile_for(chip, case.backward(), *case.backward_args())
    kernels = {kernel.name: 1e6 * kernel.seconds for kernel in report.kernels}
    # The whole program would count both sides of the condition that looks for NaN.
    is_program = op == "xla"
    compulsory_bytes = report.argument_bytes + report.output_bytes
    return {
        "microseconds": 1e6 * report.program_seconds if is_program else sum(kernels.values()),
        "compulsory_bytes": compulsory_bytes,
        "compulsory_microseconds": 1e6 * compulsory_bytes / target(chip).hbm_bytes_per_second,
        "temporary_bytes": report.temp_bytes,
        "kernels": kernels,
        "notes": list(report.notes),
    }


def line(row: tuple[str, ...], found: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, decay, pass_name = row
    head = [shape, decay, chip, pass_name, op]
    if "error" in found:
        return [*head, found["error"][:60], "", ""]
    time = found["microseconds"]
    least_time = found["compulsory_microseconds"]
    return [*head, f"{time:,.0f}", f"{least_time:,.0f}", f"{time / least_time:.2f}"]


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--target", action="append")
    made.add_argument("--shape", action="append")
    made.add_argument(
        "--op",
        default="tpu,xla,tokamax",
        help="comma-separated; peers that are absent are skipped",
    )
    made.add_argument("--decay", default="vector,scalar", help="of vector, scalar and none")
    made.add_argument(
        "--pass",
        dest="passes",
        default="fwd,bwd",
        help="bwd is forward and backward in one program",
    )
    made.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    asked_for = args.op.split(",")
    peers = [PEERS[op] for op in asked_for if op in PEERS]
    versions = {"libtpu": metadata.version("libtpu")} | installed_versions(peers)
    ops = [op for op in asked_for if op not in PEERS or PEERS[op] in versions]
    lines = []
    rows = []
    every_row = itertools.product(
        args.shape or SHAPES,
        args.decay.split(","),
        args.target or TARGETS,
        args.passes.split(","),
        ops,
    )
    for shape, decay, chip, pass_name, op in every_row:
        if op in PEERS and decay != "vector":
            continue
        row = (op, chip, shape, decay, pass_name)
        found = run_row(__file__, *row)
        rows.append(dict(zip(KEYS, row)) | found)
        lines.append(line(row, found))
        print("  ".join(lines[-1]), file=sys.stderr, flush=True)
        if args.json:  # after every row: a long run may be cut short
            write_json(args.json, {"rows": rows}, versions)
    print(table(HEADER, lines))


if __name__ == "__main__":
    main()
