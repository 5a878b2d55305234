"""Gated softmax attention on this GPU as the sequence grows, beside the nearest public kernels and
a separate gate.

    python benchmarks/attention_gpu.py [--length=2048 ...] [--heads=H16,Hk16,D128 ...] [--json=FILE]

B x T = 32k tokens, causal, bfloat16, an element-wise gate; medians. "fwd" is the forward pass
alone, "both" forward and backward in one program. floor: the time that the matrix products of the
visible half take at the peak of --target; the backward pass counts five products a tile. "gpu, no
gate" is ours without one: what the gate costs. Peers: cudnn is
jax.nn.dot_product_attention(implementation="cudnn"), its output multiplied by sigmoid(gate); fla is
flash-linear-attention's parallel_attn (Triton, torch), gated likewise. A peer that is not
installed, or refuses, is left out with its reason. --dry_run: one tiny shape, interpreted on the
CPU.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gpu_timing import (
    PASSES,
    VERSIONS_OF,
    device,
    milliseconds,
    seconds_in_torch,
    seconds_of_passes,
    seconds_or_reason,
    sizes,
)
from report import installed_versions, table, write_json

from gatedjax.aot.targets import target
from kernels_pallas.ops import attention

_LENGTHS = flags.DEFINE_multi_integer("length", [2048, 8192, 32768], "Sequence lengths T.")
_HEADS = flags.DEFINE_multi_string(
    "heads",
    ["H16,Hk16,D128", "H16,Hk2,D256"],
    "Heads and their size.",
)
_TARGET = flags.DEFINE_string("target", "cuda:h200", "The chip whose peak gives the floor.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "One tiny shape, interpreted on the CPU.")

TOKENS = 32768
AXES = ("B", "T", "H", "Hk", "D")

# What `gpu_timing.TORCH_TIMING` times.
TORCH_PROGRAM = """
import sys
import torch
from fla.ops.attn.parallel import parallel_attn
B, T, H, Hk, D = map(int, sys.argv[1:])
def make(heads):
    return torch.randn(B, T, heads, D, device="cuda", dtype=torch.bfloat16)
arrays = [make(H), make(Hk), make(Hk), make(H)]
dy = make(H)
def op(q, k, v, gate):
    return parallel_attn(q, k, v) * torch.sigmoid(gate)
"""


def ours(q, k, v, gate_logits=None):
    return attention(
        q,
        k,
        v,
        gate_logits=gate_logits,
        implementation="gpu",
        interpret=_DRY_RUN.value,
    )


def cudnn(q, k, v, gate_logits):
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return o * jax.nn.sigmoid(gate_logits)


def measure_jax(fn: Callable, gated: bool, shape: str) -> dict[str, float]:
    """Seconds of each pass of fn(q, k, v[, gate_logits])."""
    B, T, H, Hk, D = (sizes(shape)[axis] for axis in AXES)
    rng = np.random.default_rng(0)

    def normal(heads: int) -> jax.Array:
        values = rng.standard_normal((B, T, heads, D), np.float32)
        return jnp.asarray(values, jnp.bfloat16)

    q, k, v, gate_logits = normal(H), normal(Hk), normal(Hk), normal(H)
    arrays = (q, k, v, gate_logits) if gated else (q, k, v)
    samples = 2 if _DRY_RUN.value else 20
    return seconds_of_passes(fn, arrays, normal(H), samples)


def measure_fla(shape: str) -> dict[str, float]:
    return seconds_in_torch(TORCH_PROGRAM, *(sizes(shape)[axis] for axis in AXES))


OPS: dict[str, Callable[[str], dict[str, float]]] = {
    "gpu": partial(measure_jax, ours, True),
    "gpu, no gate": partial(measure_jax, ours, False),
    "cudnn": partial(measure_jax, cudnn, True),
    "fla": measure_fla,
}


def floor_seconds(shape: str) -> dict[str, float]:
    """Two products forward, five more backward, of the half that a causal row sees."""
    B, T, H, _, D = (sizes(shape)[axis] for axis in AXES)
    flops_of_a_product = B * H * T * (T + 1) * D
    one_product = flops_of_a_product / target(_TARGET.value).peak_flops
    return {"fwd": 2 * one_product, "both": 7 * one_product}


def shapes() -> list[str]:
    if _DRY_RUN.value:
        return ["B1,T32,H2,Hk1,D16"]
    found = []
    for heads in _HEADS.value:
        for T in _LENGTHS.value:
            B = max(1, TOKENS // T)
            found.append(f"B{B},T{T},{heads}")
    return found


def main(_) -> None:
    rows = []
    for shape in shapes():
        for op, measure in OPS.items():
            found = seconds_or_reason(partial(measure, shape))
            rows.append({"shape": shape, "op": op, **found, "floor": floor_seconds(shape)})
            print(rows[-1], flush=True)
    cells = []
    for row in rows:
        times = [milliseconds(row, name) for name in PASSES]
        floor = milliseconds(row["floor"], "both")
        cells.append([row["op"], row["shape"], *times, floor])
    print(table(["op", "shape", "fwd ms", "both ms", "floor ms"], cells))
    if _JSON.value:
        figures = {
            "device": device(),
            "dtype": "bfloat16",
            "unit": "seconds",
            "rows": rows,
        }
        write_json(_JSON.value, figures, installed_versions(VERSIONS_OF))


if __name__ == "__main__":
    app.run(main)
