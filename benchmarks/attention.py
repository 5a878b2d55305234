"""attention compiled for TPUs that are not there, beside jax's splash and flash kernels with their
best block sizes.

    python benchmarks/attention.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,D128 ...]
        [--op=tpu,splash] [--json=benchmarks/results/attention_tpu.json]

Causal, bfloat16. For every shape, chip and pass: model time of the whole program (bwd: forward and
backward), HBM traffic, temporaries. Times are the schedule's replay, not measurements;
`gatedjax/aot` says how far to trust them. Each row compiles in a process of its own, in half a
minute to minutes; rows that are in the --json file already, from the same libtpu, are not compiled
again (delete the file after a change of the kernels).

Ops: tpu is ours, without a gate; tpu_gate has an element-wise gate as the kernel's epilogue,
tpu_then_gate the same gate multiplied by XLA; splash and flash are those of
jax.experimental.pallas.ops.tpu, with heads before tokens as they take them. splash's backward pass
is its fused one. By --op alone: tpu_full is ours without causality, and tpu_blocks25 (any
percentage) the same under a block mask with so many blocks on, drawn one by one.
"""

import argparse
import importlib
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
import jax.numpy as jnp
import numpy as np
from report import each_row, parser, print_rows, run_row

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case, make_case
from gatedjax.aot.targets import target
from kernels_pallas.attention.inputs import MASK_BLOCK
from kernels_pallas.attention.tpu import block_mask
from kernels_pallas.ops import attention

SHAPES = ("B4,T4096,H16,D128", "B1,T32768,H16,Hk2,D256")  # a dense model's; Qwen3-Next's
TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
OPS = ("tpu", "tpu_gate", "tpu_then_gate", "splash", "flash")
KEYS = ("op", "target", "shape", "pass")
HEADER = ("shape", "target", "pass", "op", "us", "MXU busy", "HBM MB", "temp MiB")

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
    if op == "tpu":
        return ours(shape, gate="none")
    if op == "tpu_full":
        return ours(shape, gate="none", causal="no")
    if op.startswith("tpu_blocks"):
        return with_block_mask(shape, percent=int(op.removeprefix("tpu_blocks")))
    if op == "tpu_gate":
        return ours(shape, gate="element")
    if op == "tpu_then_gate":
        return gated_by_xla(shape)
    sizes = {part.rstrip("0123456789"): int(part.lstrip("BTHDk")) for part in shape.split(",")}
    B, T, H, D = (sizes[axis] for axis in "BTHD")
    Hk = sizes.get("Hk", H)
    make = splash if op == "splash" else flash
    queries = jax.ShapeDtypeStruct((B, H, T, D), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((B, Hk, T, D), jnp.bfloat16)
    return Case(make(chip, T, H, Hk, D), (queries, keys, keys), {})


def ours(shape: str, gate: str, **options: str) -> Case:
    options = {"gate": gate, "implementation": "tpu", **options}
    return make_case("attention", shape, "bfloat16", options)


def with_block_mask(shape: str, percent: int) -> Case:
    """Not causal; no larger tile is off as a whole, which is the worst case."""
    # The replay knows no numbers, and would count the version for those that are not finite too.
    block_mask._has_large = lambda *arrays: jnp.zeros(1, jnp.int32)
    B, T, H, D = (int(part.lstrip("BTHD")) for part in shape.split(","))
    blocks = -(-T // MASK_BLOCK)
    is_on = np.random.default_rng(0).random((B, H, blocks, blocks)) < percent / 100

    def forward(q, k, v):
        heads = (x.reshape(B, T, H, D) for x in (q, k, v))
        y = attention(*heads, causal=False, block_mask=jnp.asarray(is_on), implementation="tpu")
        return y.reshape(B, T, H * D)

    return Case(forward, ours(shape, gate="none").args, {})


def gated_by_xla(shape: str) -> Case:
    """Our kernel without a gate, and the gate outside of it."""
    bare = ours(shape, gate="none")

    def gated(q, k, v, gate_logits):
        gate = jax.nn.sigmoid(gate_logits.astype(jnp.float32)).astype(jnp.bfloat16)
        return bare.forward(q, k, v) * gate

    queries = bare.args[0]
    return Case(gated, (*bare.args, queries), {})


def splash(chip: str, T: int, H: int, Hk: int, D: int) -> Callable:
    kernel = importlib.import_module(f"{PALLAS_OPS}.splash_attention.splash_attention_kernel")
    masks = importlib.import_module(f"{PALLAS_OPS}.splash_attention.splash_attention_mask")
    (q, k, k_compute), (q_back, k_back, k_compute_back) = SPLASH[chip]
    blocks = kernel.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k_compute,
        block_q_dkv=q_back,
        block_kv_dkv=k_back,
        block_kv_dkv_compute=k_compute_back,
        use_fused_bwd_kernel=True,
    )
    is_grouped = Hk < H
    heads_of_a_call = H // Hk if is_grouped else H
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * heads_of_a_call)
    make = kernel.make_splash_mqa if is_grouped else kernel.make_splash_mha
    with jax.default_device(jax.devices("cpu")[0]):
        attend = make(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    def all_heads(q, k, v):
        return jax.vmap(attend)(q * D**-0.5, k, v)

    def queries_of_a_key_head(q, k, v):
        """Over rows and key heads: a call has one key head and its queries."""
        grouped_q = (q * D**-0.5).reshape(q.shape[0], Hk, -1, T, D)
        return jax.vmap(jax.vmap(attend))(grouped_q, k, v).reshape(q.shape)

    return queries_of_a_key_head if is_grouped else all_heads


def flash(chip: str, T: int, H: int, Hk: int, D: int) -> Callable:
    if Hk < H:
        raise ValueError("flash: takes as many heads of keys as of queries")
    module = importlib.import_module(f"{PALLAS_OPS}.flash_attention")
    (q, k_major, k), (q_dq, k_major_dq, k_dq), dkv = FLASH[chip]
    blocks = module.BlockSizes(
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

    def attend(q, k, v):
        return module.flash_attention(
            q,
            k,
            v,
            causal=True,
            sm_scale=D**-0.5,
            block_sizes=blocks,
        )

    return attend


def figures(op: str, chip: str, shape: str, pass_name: str) -> dict:
    """One row, in this process."""
    case = case_of(op, shape, chip)
    if pass_name == "fwd":
        _, report = compile_for(chip, case.forward, *case.args)
    else:
        _, report = compile_for(chip, case.backward(), *case.backward_args())
    kernels = {}
    for kernel in report.kernels:
        kernels[kernel.name] = {
            "microseconds": 1e6 * kernel.seconds,
            "matrix_busy": kernel.matrix_busy,
            "spills": kernel.vector_spills,
        }
    return {
        "microseconds": 1e6 * report.program_seconds,
        "hbm_bytes": report.program_hbm_bytes * target(chip).cores,
        "temporary_bytes": report.temp_bytes,
        "kernels": kernels,
        "notes": list(report.notes),
    }


def line(row: tuple[str, ...], found: dict) -> list[str]:
    """Of the table."""
    op, chip, shape, pass_name = row
    head = [shape, chip, pass_name, op]
    if "error" in found:
        return [*head, found["error"][:60], "", "", ""]
    busy = "/".join(f"{kernel['matrix_busy']:.0%}" for kernel in found["kernels"].values())
    return [
        *head,
        f"{found['microseconds']:,.0f}",
        busy,
        f"{found['hbm_bytes'] / 1e6:,.0f}",
        f"{found['temporary_bytes'] / 2**20:,.0f}",
    ]


def flags() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--target", action="append")
    made.add_argument("--shape", action="append")
    made.add_argument("--op", default=",".join(OPS))
    made.add_argument(
        "--pass",
        dest="passes",
        default="fwd,bwd",
        help="bwd is forward and backward in one program",
    )
    made.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = flags()
    if args.row:
        print(json.dumps(figures(*args.row)))
        return
    versions = {"libtpu": metadata.version("libtpu")}
    every_row = itertools.product(
        args.shape or SHAPES,
        args.target or TARGETS,
        args.passes.split(","),
        args.op.split(","),
    )
    wanted = [(op, chip, shape, pass_name) for shape, chip, pass_name, op in every_row]
    rows = each_row(args.json, KEYS, versions, wanted, partial(run_row, __file__))
    print_rows(HEADER, rows, line)


if __name__ == "__main__":
    main()
