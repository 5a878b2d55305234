"""delta_scan compiled for TPUs that are not there, beside plain XLA and, where installed, tokamax's
and deltanet-tpu's kernels; and how far each is from float64 on keys that are alike.

    python benchmarks/delta_scan.py [--target=tpu:v6e ...] [--shape=B1,T8192,H32,K128,V128 ...]
        [--op=tpu,xla,tokamax,deltanet_tpu] [--decay=vector,scalar] [--pass=fwd,bwd]
        [--cosine=0.5,0.9] [--tokens=128] [--json=FILE]

For every shape, decay, chip and pass: model time of the kernels (plain XLA: of the program), and
the time that the compulsory bytes take, every input and output of the program moved once. Times are
the schedule's replay, not measurements; `gatedjax/aot` says how far to trust them. The kernels'
programs also hold a path for numbers that are not finite, which costs nothing where it is not
taken and is no part of the times. Each row compiles in a process of its own, in a minute or more;
rows that the JSON file has from these versions of what is installed are not made again.

Errors are those of `delta_errors.py`, by emulation on a CPU: of o, for keys of these mean cosines,
no decay and beta 1. tokamax demands decays above -5 a token and rounds its inverse to bfloat16.
deltanet-tpu 0.3.0 asks for jax below 0.12.
"""

import argparse
import itertools
import json
import os
from functools import cache, partial
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import delta_errors
import jax
import jax.numpy as jnp
from delta_errors import PEERS, is_offered
from linear_scan import array
from report import each_row, installed_versions, parser, print_rows, run_row

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target

SHAPES = ("B1,T8192,H32,K128,V128",)
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x")
KEYS = ("op", "target", "shape", "decay", "pass")
HEADER = ("shape", "decay", "target", "pass", "op", "us", "compulsory us", "ratio")


def case_of(op: str, shape: str, decay: str) -> Case:
    """Ours: arrays [B, T, H * D], as projections make them. Peers: the layout that each takes."""
    if op in ("tpu", "xla"):
        return make_case("delta_scan", shape, "bfloat16", {"decay": decay, "implementation": op})
    B, T, H, K, V = (int(part[1:]) for part in shape.split(","))
    if op == "deltanet_tpu":
        return deltanet_tpu_case(B, T, H, K, V, decay)
    if decay != "vector":
        raise ValueError(f"decay: got {decay!r}, expected vector for {op}")
    return tokamax_case(B, T, H, K, V)


def deltanet_tpu_case(B: int, T: int, H: int, K: int, V: int, decay: str) -> Case:
    import deltanet_tpu

    # It would interpret its kernels here.
    jax.default_backend = lambda: "tpu"
    chunked = {"vector": deltanet_tpu.chunk_kda, "scalar": deltanet_tpu.chunk_gdn}[decay]

    def delta(q, k, v, log_decay, beta):
        return chunked(q, k, v, log_decay, beta)

    queries = array(B, T, H, K)
    values = array(B, T, H, V)
    shape_of_decays = (B, T, H, K) if decay == "vector" else (B, T, H)
    log_decays = array(*shape_of_decays, dtype=jnp.float32)
    betas = array(B, T, H, dtype=jnp.float32)
    return Case(delta, (queries, queries, values, log_decays, betas), {})


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


def errors_of(op: str, decay: str, cosines: list[str], num_tokens: str) -> dict:
    """By cosine, the error of o, or why there is none."""
    errors = {}
    if decay == "none":
        return errors
    for cosine in cosines:
        found = delta_errors.row_of(op, decay, cosine, num_tokens)
        errors[cosine] = found.get("error_of_o", found.get("error"))
    return errors


def line(row: tuple[str, ...], found: dict, cosines: list[str]) -> list[str]:
    """Of the table."""
    op, chip, shape, decay, pass_name = row
    head = [shape, decay, chip, pass_name, op]
    errors = []
    for cosine in cosines:
        error = found["errors_of_o"].get(cosine, "")
        errors.append(f"{error:.1e}" if isinstance(error, float) else error[:20])
    if "error" in found:
        return [*head, found["error"][:60], "", "", *errors]
    time = found["microseconds"]
    least_time = found["compulsory_microseconds"]
    ratio = time / least_time
    return [*head, f"{time:,.0f}", f"{least_time:,.0f}", f"{ratio:.2f}", *errors]


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--target", action="append")
    made.add_argument("--shape", action="append")
    made.add_argument(
        "--op",
        default="tpu,xla,tokamax,deltanet_tpu",
        help="comma-separated; peers that are absent are skipped",
    )
    made.add_argument("--decay", default="vector,scalar", help="of vector, scalar and none")
    made.add_argument(
        "--pass",
        dest="passes",
        default="fwd,bwd",
        help="bwd is forward and backward in one program",
    )
    made.add_argument("--cosine", default="0.5,0.9", help="mean cosines of keys, for the errors")
    made.add_argument("--tokens", default="128", help="for the errors")
    made.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")} | installed_versions(PEERS.values())
    cosines = args.cosine.split(",")
    every_row = itertools.product(
        args.shape or SHAPES,
        args.decay.split(","),
        args.target or TARGETS,
        args.passes.split(","),
        args.op.split(","),
    )
    wanted = [
        (op, chip, shape, decay, pass_name)
        for shape, decay, chip, pass_name, op in every_row
        if is_offered(op, decay, versions)
    ]
    errors = cache(partial(errors_of, cosines=cosines, num_tokens=args.tokens))

    def make(op: str, chip: str, shape: str, decay: str, pass_name: str) -> dict:
        found = run_row(__file__, op, chip, shape, decay, pass_name)
        return found | {"errors_of_o": errors(op, decay)}

    header = [*HEADER, *(f"error at {cosine}" for cosine in cosines)]
    rows = each_row(args.json, KEYS, versions, wanted, make)
    print_rows(header, rows, partial(line, cosines=cosines))


if __name__ == "__main__":
    main()
