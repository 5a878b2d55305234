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

import itertools
from collections.abc import Callable
from functools import partial
from importlib import metadata

import jax
from absl import app, flags
from gpu_timing import (
    PASSES,
    VERSIONS_OF,
    device,
    inputs,
    median_seconds,
    milliseconds,
    seconds_in_torch,
    seconds_of_passes,
    seconds_or_reason,
    sizes,
)
from report import installed_versions, table, write_json

from gatedjax.aot.targets import target
from kernels_pallas.ops import linear_scan

_LENGTHS = flags.DEFINE_multi_integer(
    "length",
    [2048, 4096, 8192, 16384, 32768],
    "Sequence lengths T.",
)
_DECAY = flags.DEFINE_list("decay", ["vector", "scalar"], "Kinds of decay.")
_TARGET = flags.DEFINE_string("target", "cuda:h200", "The chip whose bandwidth gives the floor.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "One tiny shape, interpreted on the CPU.")

TOKENS = 32768

# What `gpu_timing.TORCH_TIMING` times.
TORCH_PROGRAM = """
import sys
import torch
import torch.nn.functional as F
B, T, H, K, V = map(int, sys.argv[1:6])
decay = sys.argv[6]
if decay == "vector":
    from fla.ops.gla import chunk_gla as scan
else:
    from fla.ops.simple_gla import chunk_simple_gla as scan
def make(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
def op(*arrays):
    return scan(*arrays)[0]
g = F.logsigmoid(make(*((B, T, H, K) if decay == "vector" else (B, T, H))).float()) / 16
arrays = [make(B, T, H, K), make(B, T, H, K), make(B, T, H, V), g]
dy = make(B, T, H, V)
"""


def measure_ours(implementation: str, shape: str, decay: str) -> dict[str, float]:
    q, k, v, log_decay = inputs(shape, decay)
    arrays = (q, k, v) if log_decay is None else (q, k, v, log_decay)

    def scan(*arrays):
        return linear_scan(
            *arrays,
            implementation=implementation,
            interpret=_DRY_RUN.value and implementation == "gpu",
        )

    samples = 2 if _DRY_RUN.value else 20
    return seconds_of_passes(scan, arrays, v, samples)


def measure_fla(shape: str, decay: str) -> dict[str, float]:
    return seconds_in_torch(TORCH_PROGRAM, *(sizes(shape)[axis] for axis in "BTHKV"), decay)


def measure_jla(shape: str, decay: str) -> dict[str, float]:
    metadata.version("jax-linear-attention")
    if decay != "vector":
        raise NotImplementedError("no scalar decay there")
    from jla.ops.mosaic_gpu.gla import gla

    def scan(q, k, v, log_decay):
        return gla(q, k, v, log_decay)

    return {"fwd": median_seconds(jax.jit(scan), *inputs(shape, decay))}


OPS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "gpu": partial(measure_ours, "gpu"),
    "xla": partial(measure_ours, "xla"),
    "fla": measure_fla,
    "jla": measure_jla,
}


def floor_seconds(shape: str, decay: str) -> dict[str, float]:
    B, T, H, K, V = (sizes(shape)[axis] for axis in "BTHKV")
    # Bytes of one token of one head: bfloat16, and float32 decays.
    q_k_v = 2 * (2 * K + V)
    log_decay = {"vector": 4 * K, "scalar": 4}[decay]
    o = 2 * V
    forward = q_k_v + log_decay + o
    # Backward: inputs again, do, and a cotangent of every input.
    backward = 2 * (q_k_v + log_decay) + o
    tokens_per_second = target(_TARGET.value).hbm_bytes_per_second / (B * T * H)
    return {
        "fwd": forward / tokens_per_second,
        "both": (forward + backward) / tokens_per_second,
    }


def shapes() -> list[str]:
    if _DRY_RUN.value:
        return ["B1,T32,H1,K16,V16"]
    return [f"B{max(1, TOKENS // T)},T{T},H16,K128,V128" for T in _LENGTHS.value]


def main(_) -> None:
    rows = []
    for decay, shape, op in itertools.product(_DECAY.value, shapes(), OPS):
        found = seconds_or_reason(partial(OPS[op], shape, decay))
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
    cells = []
    for row in rows:
        times = [milliseconds(row, name) for name in PASSES]
        floor = milliseconds(row["floor"], "both")
        cells.append([row["op"], row["decay"], row["shape"], *times, floor])
    print(table(["op", "decay", "shape", "fwd ms", "both ms", "floor ms"], cells))
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
