"""attention compiled for TPUs that are not there, beside jax's splash and flash kernels with their
best block sizes.

    python benchmarks/attention.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,D128 ...] [--op=tpu,splash]
                                   [--json=benchmarks/results/attention_tpu.json]

Causal, bfloat16. For every shape, chip and pass: model time of the whole program (bwd: forward and
backward), HBM traffic, temporaries. Times are the schedule's replay, not measurements;
`gatedjax/aot` says how far to trust them. Each row compiles in a process of its own, in half a
minute to minutes; rows that are in the --json file already, from the same libtpu, are not compiled
again (delete the file after a change of the kernels).

Ops: tpu is ours, without a gate; tpu_gate has an element-wise gate as the kernel's epilogue,
tpu_then_gate the same gate multiplied by XLA; splash and flash are those of
jax.experimental.pallas.ops.tpu, with heads before tokens as they take them. splash's backward pass
is its fused one.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
from report import known_rows, table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target

SHAPES = ("B4,T4096,H16,D128", "B1,T32768,H16,Hk2,D256")  # a dense model's; Qwen3-Next's
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
OPS = ("tpu", "tpu_gate", "tpu_then_gate", "splash", "flash")

# The quickest found by model time at the first shape: queries, keys, keys at a time; forward, then
# backward.
SPLASH = {
    "tpu:v5e": ((1024, 1024, 512), (1024, 1024, 1024)),
    "tpu:v5p": ((1024, 1024, 256), (1024, 1024, 1024)),
    "tpu:v6e": ((2048, 2048, 1024), (1024, 1024, 1024)),
}
FLASH = {
    "tpu:v5e": ((1024, 1024, 1024), (1024, 1024, 512), 1024),
    "tpu:v5p": ((1024, 1024, 1024), (1024, 1024, 512), 1024),
    "tpu:v6e": ((2048, 2048, 1024), (2048, 2048, 256), 1024),
}
PALLAS_OPS = "jax.experimental.pallas.ops.tpu"


def case_of(op: str, shape: str, chip: str) -> Case:
    """Ours: arrays [B, T, H * D], as projections make them. Peers: [B, H, T, D]."""
    sizes = {part.rstrip("0123456789"): int(part.lstrip("BTHDk")) for part in shape.split(",")}
    B, T, H, D = (sizes[a] for a in "BTHD")
    if op in ("tpu", "tpu_gate"):
        gate = "element" if op == "tpu_gate" else "none"
        return make_case("attention", shape, "bfloat16", {"gate": gate, "implementation": "tpu"})
    if op == "tpu_then_gate":
        bare = make_case("attention", shape, "bfloat16", {"implementation": "tpu"})
        gated = lambda q, k, v, g: (
            bare.forward(q, k, v) * jax.nn.sigmoid(g.astype(jnp.float32)).astype(jnp.bfloat16)
        )
        return Case(gated, (*bare.args, bare.args[0]), {})
    array = lambda heads: jax.ShapeDtypeStruct((B, heads, T, D), jnp.bfloat16)
    keys = sizes.get("Hk", H)
    return Case(
        {"splash": splash, "flash": flash}[op](chip, T, H, keys, D),
        (array(H), array(keys), array(keys)),
        {},
    )


def splash(chip: str, T: int, H: int, Hk: int, D: int):
    kernel = importlib.import_module(f"{PALLAS_OPS}.splash_attention.splash_attention_kernel")
    masks = importlib.import_module(f"{PALLAS_OPS}.splash_attention.splash_attention_mask")
    (q, k, kc), (q_back, k_back, kc_back) = SPLASH[chip]
    blocks = kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=kc,
        block_q_dkv=q_back,
        block_kv_dkv=k_back,
        block_kv_dkv_compute=kc_back,
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * (H // Hk if Hk < H else H))
    make = kernel.make_splash_mqa if Hk < H else kernel.make_splash_mha
    with jax.default_device(jax.devices("cpu")[0]):
        attend = make(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    if Hk == H:
        return lambda q, k, v: jax.vmap(attend)(q * D**-0.5, k, v)
    grouped = jax.vmap(jax.vmap(attend))

    def queries_of_a_key_head(q, k, v):
        return grouped((q * D**-0.5).reshape(q.shape[0], Hk, -1, T, D), k, v).reshape(q.shape)

    return queries_of_a_key_head


def flash(chip: str, T: int, H: int, Hk: int, D: int):
    if Hk < H:
        raise ValueError("flash: takes as many heads of keys as of queries")
    room = importlib.import_module(f"{PALLAS_OPS}.flash_attention")
    (q, k_major, k), (q_dq, k_major_dq, k_dq), dkv = FLASH[chip]
    blocks = room.BlockSizes(
        block_q=q,
        block_k_major=k_major,
        block_k=k,
        block_b=1,
        block_q_major_dkv=dkv,
        block_k_major_dkv=dkv,
        block_k_dkv=dkv,
        block_q_dkv=dkv,
        block_k_major_dq=k_major_dq,
        block_k_dq=k_dq,
        block_q_dq=q_dq,
    )
    return lambda q, k, v: room.flash_attention(
        q, k, v, causal=True, sm_scale=D**-0.5, block_sizes=blocks
    )


def figures(op: str, chip: str, shape: str, way: str) -> dict:
    """One row, in this process."""
    case = case_of(op, shape, chip)
    fn, args = (
        (case.forward, case.args) if way == "fwd" else (case.backward(), case.backward_args())
    )
    _, report = compile_for(chip, fn, *args)
    return {
        "microseconds": 1e6 * report.program_seconds,
        "hbm_bytes": report.program_hbm_bytes * target(chip).cores,
        "temporary_bytes": report.temp_bytes,
        "kernels": {
            k.name: {
                "microseconds": 1e6 * k.seconds,
                "matrix_busy": k.matrix_busy,
                "spills": k.vector_spills,
            }
            for k in report.kernels
        },
        "notes": list(report.notes),
    }


def in_a_process(*row: str) -> dict:
    """libtpu reads its flags once and keeps its memory: one compilation a process. {"error": ...}
    if it fails.
    """
    command = [sys.executable, __file__, "--row", *row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


KEYS = ("op", "target", "shape", "pass")


def line(row: tuple[str, ...], f: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, way = row
    if "error" in f:
        return [shape, chip, way, op, f["error"][:60], "", "", ""]
    busy = "/".join(f"{k['matrix_busy']:.0%}" for k in f["kernels"].values())
    time, moved, temporaries = f["microseconds"], f["hbm_bytes"] / 1e6, f["temporary_bytes"] / 2**20
    return [shape, chip, way, op, f"{time:,.0f}", busy, f"{moved:,.0f}", f"{temporaries:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--op", default=",".join(OPS))
    parser.add_argument(
        "--pass", dest="ways", default="fwd,bwd", help="bwd is forward and backward in one program"
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    known = known_rows(args.json, KEYS, versions)
    lines, rows = [], dict(known)
    for shape in args.shape or SHAPES:
        for chip in args.target or TARGETS:
            for way in args.ways.split(","):
                for op in args.op.split(","):
                    row = op, chip, shape, way
                    found = known.get(row) or in_a_process(*row)
                    rows[row] = found
                    lines.append(line(row, found))
                    print("  ".join(lines[-1]), file=sys.stderr, flush=True)
                    if args.json:
                        written = [dict(zip(KEYS, r)) | f for r, f in rows.items()]
                        write_json(args.json, {"rows": written}, versions)
    print(table(["shape", "target", "pass", "op", "us", "MXU busy", "HBM MB", "temp MiB"], lines))


if __name__ == "__main__":
    main()
