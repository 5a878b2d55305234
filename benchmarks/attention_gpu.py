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

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from gpu_timing import device, median_seconds
from report import table, write_json

from gatedjax.aot.targets import target
from kernels_pallas.ops import attention

_LENGTHS = flags.DEFINE_multi_integer("length", [2048, 8192, 32768], "Sequence lengths T.")
_HEADS = flags.DEFINE_multi_string(
    "heads", ["H16,Hk16,D128", "H16,Hk2,D256"], "Heads and their size."
)
_TARGET = flags.DEFINE_string("target", "cuda:h200", "The chip whose peak gives the floor.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "One tiny shape, interpreted on the CPU.")

TOKENS = 32768
PASSES = ("fwd", "both")

# fla in a process of its own: torch and jax would each take the whole memory.
TORCH_PROGRAM = """
import statistics, sys
import torch
from fla.ops.attn.parallel import parallel_attn
B, T, H, Hk, D = map(int, sys.argv[1:])
make = lambda heads: torch.randn(B, T, heads, D, device="cuda", dtype=torch.bfloat16)
arrays = [make(H), make(Hk), make(Hk), make(H)]
dy = make(H)
def op(q, k, v, gate):
    return parallel_attn(q, k, v) * torch.sigmoid(gate)
def forward():
    with torch.no_grad():
        op(*arrays)
def both():
    leaves = [a.detach().requires_grad_() for a in arrays]
    op(*leaves).backward(dy)
for fn in (forward, both):
    for _ in range(3):
        fn()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5e3)
    print("seconds", statistics.median(times))
"""


def sizes(shape: str) -> dict[str, int]:
    """ "B4,T4096,H16,Hk2,D256" -> {"B": 4, ...}."""
    return {name: int(size) for name, size in re.findall(r"([A-Z][a-z]?)(\d+)", shape)}


def ours(q, k, v, gate=None):
    return attention(q, k, v, gate_logits=gate, implementation="gpu", interpret=_DRY_RUN.value)


def cudnn(q, k, v, gate):
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return o * jax.nn.sigmoid(gate)


def measure_jax(fn: Callable, gated: bool, shape: str) -> dict[str, float]:
    """Seconds of each pass of fn(q, k, v[, gate])."""
    B, T, H, Hk, D = (sizes(shape)[a] for a in ("B", "T", "H", "Hk", "D"))
    r = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(
        r.standard_normal((B, T, heads, D), np.float32), jnp.bfloat16
    )
    arrays, dy = [normal(h) for h in (H, Hk, Hk, H)][: 4 if gated else 3], normal(H)

    def both(dy, *arrays):
        y, vjp = jax.vjp(fn, *arrays)
        return y, vjp(dy)

    samples = 2 if _DRY_RUN.value else 20
    return {
        "fwd": median_seconds(jax.jit(fn), *arrays, samples=samples),
        "both": median_seconds(jax.jit(both), dy, *arrays, samples=samples),
    }


def measure_fla(shape: str) -> dict[str, float]:
    metadata.version("torch"), metadata.version("fla-core")
    arguments = [str(sizes(shape)[a]) for a in ("B", "T", "H", "Hk", "D")]
    done = subprocess.run(
        [sys.executable, "-c", TORCH_PROGRAM, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    times = [
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds")
    ]
    return dict(zip(PASSES, times))


OPS: dict[str, Callable[[str], dict[str, float]]] = {
    "gpu": lambda shape: measure_jax(ours, True, shape),
    "gpu, no gate": lambda shape: measure_jax(ours, False, shape),
    "cudnn": lambda shape: measure_jax(cudnn, True, shape),
    "fla": measure_fla,
}


def measure(op: str, shape: str) -> dict[str, object]:
    """Seconds of each pass, or why there are none."""
    try:
        return OPS[op](shape)
    except metadata.PackageNotFoundError as missing:
        return {"left out": f"{missing.name} is not installed"}
    except Exception as error:  # a peer's complaints have no type of their own
        return {
            "left out": f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        }


def floor_seconds(shape: str) -> dict[str, float]:
    s = sizes(shape)
    one_product = (
        s["B"] * s["H"] * s["T"] * (s["T"] + 1) * s["D"] / target(_TARGET.value).peak_flops
    )
    return {"fwd": 2 * one_product, "both": 7 * one_product}


def versions() -> dict[str, str]:
    found = {}
    for name in (
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "nvidia-cudnn-cu13",
        "triton",
        "torch",
        "fla-core",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(_) -> None:
    shapes = [
        f"B{max(1, TOKENS // T)},T{T},{heads}" for heads in _HEADS.value for T in _LENGTHS.value
    ]
    rows = []
    for shape in ["B1,T32,H2,Hk1,D16"] if _DRY_RUN.value else shapes:
        for op in OPS:
            rows.append(
                {"shape": shape, "op": op, **measure(op, shape), "floor": floor_seconds(shape)}
            )
            print(rows[-1], flush=True)
    ms = lambda row, name: (
        f"{row[name] * 1e3:.3f}" if name in row else row.get("left out", "-")[:40]
    )
    cells = [
        [r["op"], r["shape"], *(ms(r, n) for n in PASSES), f"{r['floor']['both'] * 1e3:.3f}"]
        for r in rows
    ]
    print(table(["op", "shape", "fwd ms", "both ms", "floor ms"], cells))
    if _JSON.value:
        write_json(
            _JSON.value,
            {"device": device(), "dtype": "bfloat16", "unit": "seconds", "rows": rows},
            versions(),
        )


if __name__ == "__main__":
    app.run(main)
