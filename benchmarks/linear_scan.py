"""linear_scan compiled for TPUs that are not there, beside plain XLA and, where installed, the
nearest public ops.

    python benchmarks/linear_scan.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,K128,V128 ...]
        [--op=tpu,xla] [--decay=vector] [--json=benchmarks/results/linear_scan_tpu.json]

For every shape, chip and pass: model time of the whole program (of the kernels alone where the
replay says that other parts follow data), HBM traffic against the compulsory bytes (every input and
output of the program once), temporaries. Times are the schedule's replay, not measurements;
`gatedjax/aot` says how far to trust them. Each row compiles in a process of its own, in 10 seconds
to minutes; rows that the JSON file has from these versions of what is installed are not made again
(delete the file after a change of the kernels).

Ops: tpu and xla are ours; jla is jax-linear-attention's chunked GLA, one bfloat16 pass as ours; kda
is tokamax's Kimi Delta Attention, which does more (the delta rule) and demands decays above -5:
there is no public kernel of GLA itself.
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
from report import each_row, installed_versions, parser, print_rows, run_row

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target

SHAPES = (
    "B4,T4096,H8,K128,V256",
    "B4,T4096,H16,K128,V128",
    "B8,T2048,H4,K256,V512",  # GLA 1.3B
    "B1,T32768,H16,K128,V128",
)
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x")
PEERS = {"jla": "jax-linear-attention", "kda": "tokamax"}
KEYS = ("op", "target", "shape", "decay", "pass")
HEADER = (
    "shape",
    "target",
    "pass",
    "op",
    "us",
    "compulsory us",
    "ratio",
    "HBM MB",
    "of compulsory",
    "temp MiB",
)


def case_of(op: str, shape: str, decay: str) -> Case:
    """Ours: arrays [B, T, H * D], as projections make them. Peers: the layout that each takes."""
    if op in ("tpu", "xla"):
        return make_case("linear_scan", shape, "bfloat16", {"decay": decay, "implementation": op})
    if decay != "vector":
        raise ValueError(f"decay: got {decay!r}, expected vector for {op}")
    B, T, H, K, V = (int(part[1:]) for part in shape.split(","))
    return (jla_case if op == "jla" else kda_case)(B, T, H, K, V)


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def jla_case(B: int, T: int, H: int, K: int, V: int) -> Case:
    from jla.ops import chunked

    def gla(*flat):
        heads = [x.reshape(B, T, H, -1) for x in flat]
        o, *_ = chunked.gla(*heads, precision=jax.lax.Precision.DEFAULT)
        return o.reshape(B, T, H * V)

    queries = array(B, T, H * K)
    values = array(B, T, H * V)
    log_decays = array(B, T, H * K, dtype=jnp.float32)
    return Case(gla, (queries, queries, values, log_decays), {})


def kda_case(B: int, T: int, H: int, K: int, V: int) -> Case:
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
    device = target(chip)
    seconds = report.program_seconds
    hbm_bytes = report.program_hbm_bytes * device.cores
    if op == "tpu" and report.notes:
        # With one row of a batch the replay enters the loop that computes spoiled rows again, which
        # has no turn where all is finite.
        seconds = sum(kernel.seconds for kernel in report.kernels)
        hbm_bytes = sum(kernel.hbm_bytes for kernel in report.kernels)
    compulsory_bytes = report.argument_bytes + report.output_bytes
    return {
        "microseconds": 1e6 * seconds,
        "hbm_bytes": hbm_bytes,
        "compulsory_bytes": compulsory_bytes,
        "compulsory_microseconds": 1e6 * compulsory_bytes / device.hbm_bytes_per_second,
        "temporary_bytes": report.temp_bytes,
        "kernels": {kernel.name: 1e6 * kernel.seconds for kernel in report.kernels},
        "notes": list(report.notes),
    }


def line(row: tuple[str, ...], found: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, _, pass_name = row
    head = [shape, chip, pass_name, op]
    if "error" in found:
        return [*head, found["error"][:60], "", "", "", "", ""]
    time = found["microseconds"]
    least_time = found["compulsory_microseconds"]
    moved = found["hbm_bytes"]
    return [
        *head,
        f"{time:,.0f}",
        f"{least_time:,.0f}",
        f"{time / least_time:.2f}",
        f"{moved / 1e6:,.0f}",
        f"{moved / found['compulsory_bytes']:.2f}",
        f"{found['temporary_bytes'] / 2**20:,.0f}",
    ]


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--target", action="append")
    made.add_argument("--shape", action="append")
    made.add_argument(
        "--op",
        default="tpu,xla,jla,kda",
        help="comma-separated; peers that are absent are skipped",
    )
    made.add_argument("--decay", default="vector", help="vector, scalar, constant or none")
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
    every_row = itertools.product(
        args.shape or SHAPES,
        args.target or TARGETS,
        args.passes.split(","),
        ops,
    )
    wanted = [(op, chip, shape, args.decay, way) for shape, chip, way, op in every_row]
    rows = each_row(args.json, KEYS, versions, wanted, partial(run_row, __file__))
    print_rows(HEADER, rows, line)


if __name__ == "__main__":
    main()
