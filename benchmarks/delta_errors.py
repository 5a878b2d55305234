"""How far the outputs of `delta_scan` and of other kernels are from float64 on keys that are alike:
no decay, beta 1, bfloat16 arrays, as a TPU would multiply.

    python benchmarks/delta_errors.py [--op=tpu,xla,tokamax,deltanet_tpu] [--decay=vector,scalar]
        [--cosine=0,0.5,0.9] [--tokens=256] [--json=FILE]

Runs on a CPU, where a Pallas kernel is interpreted and no matmul rounds. So every matmul of float32
operands that asks for one pass rounds them to bfloat16 first, and one that asks for three keeps 16
bits of them: what a TPU's matrix unit does. `benchmarks/delta_scan.py` prints these errors beside
its times.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.interpreters import mlir  # no public way to what it holds
from jax.experimental.pallas import tpu as pltpu
from report import installed_versions, parser, run_row, table, write_json

from kernels_pallas.delta_scan.tpu import op as tpu_op
from kernels_pallas.ops import delta_scan

PEERS = {"tokamax": "tokamax", "deltanet_tpu": "deltanet-tpu"}
HEADS = 2
CHANNELS = 128  # of keys and of values: all that deltanet-tpu takes


# --- matmuls as a TPU does them


def _passes(precision) -> int:
    """Of bfloat16, that a TPU's matrix unit takes for float32 operands."""
    if isinstance(precision, tuple):
        precision = precision[0]
    return {lax.Precision.HIGHEST: 6, lax.Precision.HIGH: 3}.get(precision, 1)


def _rounded(lhs: Array, rhs: Array, **params) -> Array:
    """A product of float32 operands that are rounded as for one pass, or for three."""

    def bfloat16(x: Array) -> Array:
        # XLA would drop a conversion there and back.
        return lax.reduce_precision(x, 8, 7)

    passes = _passes(params["precision"])
    params["precision"] = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)

    def product(a: Array, b: Array) -> Array:
        return lax.dot_general_p.bind(a, b, **params)

    left = bfloat16(lhs)
    right = bfloat16(rhs)
    result = product(left, right)
    if passes == 3:
        result += product(bfloat16(lhs - left), right) + product(left, bfloat16(rhs - right))
    return result


def multiply_as_a_tpu() -> None:
    """For the rest of the process, what is compiled for the CPU."""
    original = mlir._platform_specific_lowerings["cpu"][lax.dot_general_p].rule
    as_rounded = mlir.lower_fun(_rounded, multiple_results=False)

    def rule(ctx, lhs, rhs, **params):
        dtypes = {aval.dtype for aval in ctx.avals_in}
        is_exact = dtypes != {jnp.dtype("float32")} or _passes(params["precision"]) == 6
        return (original if is_exact else as_rounded)(ctx, lhs, rhs, **params)

    mlir.register_lowering(lax.dot_general_p, rule, platform="cpu")


# --- what is compared


def inputs_of(cosine: float, num_tokens: int) -> dict[str, np.ndarray]:
    """Rounded to bfloat16, [B, T, H, D], with keys of length one and this mean cosine."""
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    shape = (1, num_tokens, HEADS, CHANNELS)
    common = unit(rng.normal(size=CHANNELS))
    own = unit(rng.normal(size=shape))
    arrays = {
        "q": rng.normal(size=shape),
        "k": unit(np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own),
        "v": rng.normal(size=shape),
    }
    return {name: np.asarray(x, jnp.bfloat16) for name, x in arrays.items()}


def by_recurrence(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The delta rule with beta 1 and no decay, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    state = np.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]))
    outputs = []
    for t in range(q.shape[1]):
        found = np.einsum("bhk,bhkv->bhv", k[:, t], state)
        state += k[:, t, :, :, None] * (v[:, t] - found)[:, :, None]
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], state))
    return np.stack(outputs, 1) / np.sqrt(CHANNELS)


def run(op: str, decay: str, q: Array, k: Array, v: Array) -> Array:
    """o [B, T, H, V], with decays of 1: for each channel ("vector") or head ("scalar")."""
    beta = jnp.ones(q.shape[:3])
    log_decay = jnp.zeros(q.shape if decay == "vector" else q.shape[:3])
    if op == "tokamax":
        import tokamax
        from tokamax._src.ops.kda import api

        # It refuses a CPU, and wants to know how much memory its TPU has.
        tokamax.config.cross_compile(True).__enter__()
        pltpu.get_tpu_info = lambda: pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V6E, 1)
        heads_first = (jnp.moveaxis(x, 2, 0) for x in (q, k, v, log_decay, beta))
        o, *_ = api.kimi_delta_attention(*heads_first, implementation="mosaic")
        return jnp.moveaxis(o, 0, 2)
    if op == "deltanet_tpu":
        import deltanet_tpu

        chunked = deltanet_tpu.chunk_kda if decay == "vector" else deltanet_tpu.chunk_gdn
        o = chunked(q, k, v, log_decay, beta)
        assert isinstance(o, Array)
        return o
    return delta_scan(
        q,
        k,
        v,
        beta,
        log_decay,
        implementation=op,
        interpret=op == "tpu",
    )


def round_as_on_a_tpu() -> None:
    """Our kernels ask which matmuls round, and interpreted ones do not."""
    make_plan = tpu_op._plan
    tpu_op._plan = lambda *args: make_plan(*args)._replace(rounds=True)


def error(op: str, decay: str, cosine: float, num_tokens: int) -> float:
    """Root mean square of o's error over that of o."""
    # tokamax asks for it; deltanet-tpu interprets its kernels on a CPU.
    os.environ["PALLAS_INTERPRET"] = "1"
    multiply_as_a_tpu()
    round_as_on_a_tpu()
    arrays = inputs_of(cosine, num_tokens)
    expected = by_recurrence(**arrays)
    found = np.asarray(run(op, decay, *(jnp.asarray(x) for x in arrays.values())), np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def row_of(op: str, decay: str, cosine: str, num_tokens: str) -> dict:
    """`error`, in a process of its own: a matmul that rounds is for the whole process."""
    return run_row(__file__, op, decay, cosine, num_tokens)


def is_offered(op: str, decay: str, versions: Mapping[str, str]) -> bool:
    """Whether what we compare with is installed, and has this kind of decay."""
    if op == "tokamax" and decay != "vector":
        return False
    return op not in PEERS or PEERS[op] in versions


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--op", default="tpu,xla,tokamax,deltanet_tpu", help="comma-separated")
    made.add_argument("--decay", default="vector,scalar", help="of vector and scalar")
    made.add_argument("--cosine", default="0,0.5,0.9", help="mean cosines of keys")
    made.add_argument("--tokens", default="256")
    made.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.row:
        op, decay, cosine, num_tokens = args.row
        print(json.dumps({"error_of_o": error(op, decay, float(cosine), int(num_tokens))}))
        return
    cosines = args.cosine.split(",")
    versions = installed_versions(PEERS.values())
    rows = []
    lines = []
    for decay, op in itertools.product(args.decay.split(","), args.op.split(",")):
        if not is_offered(op, decay, versions):
            continue
        line = [op, decay]
        for cosine in cosines:
            found = row_of(op, decay, cosine, args.tokens)
            key = {"op": op, "decay": decay, "cosine": cosine, "tokens": args.tokens}
            rows.append(key | found)
            line.append(f"{found['error_of_o']:.1e}" if "error_of_o" in found else found["error"])
        print("  ".join(line), file=sys.stderr, flush=True)
        lines.append(line)
        if args.json:
            write_json(args.json, {"rows": rows}, versions)
    print(table(["error of o", "decay", *cosines], lines))


if __name__ == "__main__":
    main()
