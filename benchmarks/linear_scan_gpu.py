"""linear_scan on this GPU as the sequence grows, beside XLA and, where installed, the nearest
public kernels.

    python benchmarks/linear_scan_gpu.py [--length=2048 ...] [--decay=vector,scalar] [--json=FILE]

B x T = 32k tokens, H = 16, K = V = 128, bfloat16, float32 log decays, no initial state; medians.
"fwd" is the forward pass alone, "both" forward and backward in one program. floor: the time that
the compulsory bytes (every input and output once) take at the HBM bandwidth of --target. Peers: fla
is flash-linear-attention (Triton, torch: chunk_gla, chunk_simple_gla), jla is
jax-linear-attention's GLA (Mosaic GPU, forward only). A peer that is not installed, or refuses, is
left out with its reason. --dry_run: one tiny shape, interpreted on the CPU.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
from absl import app, flags
from gpu_timing import device, inputs, median_seconds, sizes
from report import table, write_json

from gatedjax.aot.targets import target
from kernels_pallas.ops import linear_scan

_LENGTHS = flags.DEFINE_multi_integer(
    "length", [2048, 4096, 8192, 16384, 32768], "Sequence lengths T."
)
_DECAY = flags.DEFINE_list("decay", ["vector", "scalar"], "Kinds of decay.")
_TARGET = flags.DEFINE_string("target", "cuda:h200", "The chip whose bandwidth gives the floor.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "One tiny shape, interpreted on the CPU.")

TOKENS = 32768
PASSES = ("fwd", "both")

# fla in a process of its own: torch and jax would each take the whole memory.
TORCH_PROGRAM = """
import statistics, sys
import torch
import torch.nn.functional as F
B, T, H, K, V, decay = *map(int, sys.argv[1:6]), sys.argv[6]
if decay == "vector":
    from fla.ops.gla import chunk_gla as op
else:
    from fla.ops.simple_gla import chunk_simple_gla as op
make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
g = F.logsigmoid(make(*((B, T, H, K) if decay == "vector" else (B, T, H))).float()) / 16
arrays = [make(B, T, H, K), make(B, T, H, K), make(B, T, H, V), g]
do = make(B, T, H, V)
def forward():
    with torch.no_grad():
        op(*arrays)
def both():
    leaves = [a.detach().requires_grad_() for a in arrays]
    op(*leaves)[0].backward(do)
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


def ours(implementation: str) -> Callable:
    interpret = _DRY_RUN.value and implementation == "gpu"
    return lambda q, k, v, *g: linear_scan(
        q, k, v, *g, implementation=implementation, interpret=interpret
    )


def measure_ours(implementation: str, shape: str, decay: str) -> dict[str, float]:
    q, k, v, g = inputs(shape, decay)
    arrays, fn = (q, k, v, g), ours(implementation)

    def both(cotangent, *arrays):
        o, vjp = jax.vjp(fn, *arrays)
        return o, vjp(cotangent)

    samples = 2 if _DRY_RUN.value else 20
    return {
        "fwd": median_seconds(jax.jit(fn), *arrays, samples=samples),
        "both": median_seconds(jax.jit(both), v, *arrays, samples=samples),
    }


def measure_fla(shape: str, decay: str) -> dict[str, float]:
    metadata.version("torch"), metadata.version("fla-core")
    arguments = [*(str(sizes(shape)[a]) for a in "BTHKV"), decay]
    done = subprocess.run(
        [sys.executable, "-c", TORCH_PROGRAM, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    times = [
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds")
    ]
    return dict(zip(PASSES, times))


def measure_jla(shape: str, decay: str) -> dict[str, float]:
    metadata.version("jax-linear-attention")
    if decay != "vector":
        raise NotImplementedError("no scalar decay there")
    from jla.ops.mosaic_gpu.gla import gla

    return {
        "fwd": median_seconds(jax.jit(lambda q, k, v, g: gla(q, k, v, g)), *inputs(shape, decay))
    }


OPS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "gpu": lambda *a: measure_ours("gpu", *a),
    "xla": lambda *a: measure_ours("xla", *a),
    "fla": measure_fla,
    "jla": measure_jla,
}


def measure(op: str, shape: str, decay: str) -> dict[str, object]:
    """Seconds of each pass, or why there are none."""
    try:
        return OPS[op](shape, decay)
    except metadata.PackageNotFoundError as missing:
        return {"left out": f"{missing.name} is not installed"}
    except Exception as error:  # a peer's complaints have no type of their own
        return {
            "left out": f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        }


def floor_seconds(shape: str, decay: str) -> dict[str, float]:
    s = sizes(shape)
    tokens = s["B"] * s["T"] * s["H"]
    of_q_k_v, of_logs = 2 * (2 * s["K"] + s["V"]), {"vector": 4 * s["K"], "scalar": 4}[decay]
    forward, bandwidth = of_q_k_v + of_logs + 2 * s["V"], target(_TARGET.value).hbm_bytes_per_second
    # Backward: inputs again, do, and a cotangent of every input.
    backward = 2 * (of_q_k_v + of_logs) + 2 * s["V"]
    return {"fwd": tokens * forward / bandwidth, "both": tokens * (forward + backward) / bandwidth}


def versions() -> dict[str, str]:
    found = {}
    for name in (
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "jax-triton",
        "triton",
        "torch",
        "fla-core",
        "jax-linear-attention",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(_) -> None:
    lengths = [32] if _DRY_RUN.value else _LENGTHS.value
    shapes = [
        f"B1,T{T},H1,K16,V16" if _DRY_RUN.value else f"B{max(1, TOKENS // T)},T{T},H16,K128,V128"
        for T in lengths
    ]
    rows = []
    for decay in _DECAY.value:
        for shape in shapes:
            for op in OPS:
                found = measure(op, shape, decay)
                rows.append(
                    {
                        "decay": decay,
                        "shape": shape,
                        "op": op,
                        **found,
                        "floor": floor_seconds(shape, decay),
                    }
                )
                print(decay, shape, op, found, flush=True)
    ms = lambda row, name: (
        f"{row[name] * 1e3:.3f}" if name in row else row.get("left out", "-")[:40]
    )
    cells = [
        [
            r["op"],
            r["decay"],
            r["shape"],
            *(ms(r, n) for n in PASSES),
            f"{r['floor']['both'] * 1e3:.3f}",
        ]
        for r in rows
    ]
    print(table(["op", "decay", "shape", "fwd ms", "both ms", "floor ms"], cells))
    if _JSON.value:
        figures = {
            "device": device(),
            "dtype": str(jnp.dtype(jnp.bfloat16)),
            "unit": "seconds",
            "rows": rows,
        }
        write_json(_JSON.value, figures, versions())


if __name__ == "__main__":
    app.run(main)
