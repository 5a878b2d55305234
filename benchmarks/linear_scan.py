"""linear_scan compiled for TPUs that are not there, beside plain XLA and, where installed, the
nearest public ops.

    python benchmarks/linear_scan.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,K128,V128 ...] [--op=tpu,xla]
                                     [--decay=vector] [--json=benchmarks/results/linear_scan_tpu.json]

For every shape, chip and pass: model time of the whole program, HBM traffic against the compulsory
bytes (every input and output of the program once), temporaries. Times are the schedule's replay,
not measurements; `gatedjax/aot` says how far to trust them. Each row compiles in a process of its
own, in 10 seconds to minutes.

Ops: tpu and xla are ours; jla is jax-linear-attention's chunked GLA, one bfloat16 pass as ours; kda
is tokamax's Kimi Delta Attention, which does more (the delta rule) and demands decays above -5:
there is no public kernel of GLA itself.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
from report import table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target

SHAPES = (
    "B4,T4096,H8,K128,V256",
    "B4,T4096,H16,K128,V128",
    "B8,T2048,H4,K256,V512",  # GLA 1.3B
    "B1,T32768,H16,K128,V128",
)
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
PEERS = {"jla": "jax-linear-attention", "kda": "tokamax"}


def case_of(op: str, shape: str, decay: str) -> Case:
    """Ours: arrays [B, T, H * D], as projections make them. Peers: the layout that each takes."""
    if op in ("tpu", "xla"):
        return make_case("linear_scan", shape, "bfloat16", {"decay": decay, "implementation": op})
    if decay != "vector":
        raise ValueError(f"op: {op!r} came with decay {decay!r}, expected vector")
    B, T, H, K, V = (int(part[1:]) for part in shape.split(","))
    array = lambda *axes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(axes, dtype)
    if op == "jla":
        from jla.ops import chunked

        def gla(*flat):
            heads = [x.reshape(B, T, H, -1) for x in flat]
            return chunked.gla(*heads, precision=jax.lax.Precision.DEFAULT)[0].reshape(B, T, -1)

        decays = array(B, T, H * K, dtype=jnp.float32)
        return Case(gla, (array(B, T, H * K), array(B, T, H * K), array(B, T, H * V), decays), {})
    import tokamax
    from tokamax._src.ops.kda import api

    tokamax.config.cross_compile(True).__enter__()

    def kda(q, k, v, g, beta):
        return api.kimi_delta_attention(
            q, k, v, g, beta, lower_bound=-5.0, implementation="mosaic"
        )[0]

    keys = array(H, B, T, K)
    args = (
        keys,
        keys,
        array(H, B, T, V),
        array(H, B, T, K, dtype=jnp.float32),
        array(H, B, T, dtype=jnp.float32),
    )
    return Case(kda, args, {})


def figures(op: str, chip: str, shape: str, decay: str, way: str) -> dict:
    """One row, in this process."""
    case = case_of(op, shape, decay)
    fn, args = (
        (case.forward, case.args) if way == "fwd" else (case.backward(), case.backward_args())
    )
    _, report = compile_for(chip, fn, *args)
    return {
        "microseconds": 1e6 * report.program_seconds,
        "hbm_bytes": report.program_hbm_bytes * target(chip).cores,
        "compulsory_bytes": report.argument_bytes + report.output_bytes,
        "compulsory_microseconds": 1e6
        * (report.argument_bytes + report.output_bytes)
        / target(chip).hbm_bytes_per_second,
        "temporary_bytes": report.temp_bytes,
        "kernels": {k.name: 1e6 * k.seconds for k in report.kernels},
        "notes": list(report.notes),
    }


def in_a_process(*row: str) -> dict:
    """libtpu reads its flags once and keeps its memory: one compilation a process. {"error": ...}
    if it fails.
    """
    command = [sys.executable, __file__, "--row", *row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (
            [l for l in done.stderr.splitlines() if "Error: " in l]
            or done.stderr.splitlines()
            or ["no message"]
        )
        return {"error": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(row: tuple[str, ...], f: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, _, way = row
    if "error" in f:
        return [shape, chip, way, op, f["error"][:60], "", "", "", "", ""]
    time, floor = f["microseconds"], f["compulsory_microseconds"]
    moved, once = f["hbm_bytes"], f["compulsory_bytes"]
    return [
        shape,
        chip,
        way,
        op,
        f"{time:,.0f}",
        f"{floor:,.0f}",
        f"{time / floor:.2f}",
        f"{moved / 1e6:,.0f}",
        f"{moved / once:.2f}",
        f"{f['temporary_bytes'] / 2**20:,.0f}",
    ]


def installed(op: str) -> bool:
    try:
        return op not in PEERS or bool(metadata.version(PEERS[op]))
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append")
    parser.add_argument("--shape", action="append")
    parser.add_argument(
        "--op", default="tpu,xla,jla,kda", help="comma-separated; peers that are absent are skipped"
    )
    parser.add_argument("--decay", default="vector", help="vector, scalar, constant or none")
    parser.add_argument(
        "--pass", dest="ways", default="fwd,bwd", help="bwd is forward and backward in one program"
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    ops = [op for op in args.op.split(",") if installed(op)]
    header = [
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
    ]
    lines, rows = [], []
    versions = {
        name: metadata.version(name) for name in ("libtpu", *(PEERS[o] for o in ops if o in PEERS))
    }
    for shape in args.shape or SHAPES:
        for chip in args.target or TARGETS:
            for way in args.ways.split(","):
                for op in ops:
                    row = op, chip, shape, args.decay, way
                    found = in_a_process(*row)
                    rows.append(dict(zip(("op", "target", "shape", "decay", "pass"), row)) | found)
                    lines.append(line(row, found))
                    print("  ".join(lines[-1]), file=sys.stderr, flush=True)
                    if args.json:  # after every row: a run of hours may be cut short
                        write_json(args.json, {"rows": rows}, versions)
    print(table(header, lines))


if __name__ == "__main__":
    main()
