"""attention's GPU kernels compiled for an H200 that is not here: registers, spills, shared memory,
memory of programs.

    python benchmarks/attention_h200.py [--json=benchmarks/results/attention_h200.json]

Forward and backward in one program, bfloat16, causal; and a decoding step. Static facts, no times.
Needs jax's CUDA plugin (make test-cuda-aot builds an environment) and ptxas.
"""

import os
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on a device

import jax
import jax.numpy as jnp
from report import parser, table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from kernels_pallas.ops import attention_step

TARGET = "cuda:h200"
CASES = [
    ("B4,T4096,H16,D64", {"gate": "element"}),
    ("B4,T4096,H16,D128", {}),
    ("B4,T4096,H16,D128", {"gate": "element"}),
    ("B4,T4096,H16,D128", {"gate": "head", "window": "1024", "segments": "yes"}),
    ("B1,T32768,H16,Hk2,D256", {"gate": "element"}),
]
STEPS = [(32, 8192, 16, 2, 128), (1, 32768, 16, 2, 256)]  # B, slots, H, Hk, D
FIGURES = (
    "registers",
    "spill_bytes",
    "shared_memory_bytes",
    "blocks_per_core",
    "threads",
    "wgmma",
    "mma",
)
COLUMNS = (
    "case",
    "kernel",
    "registers",
    "spill_bytes",
    "shared_memory_bytes",
    "blocks_per_core",
    "wgmma",
)


def compiled(label: str, fn: Callable, *args: jax.ShapeDtypeStruct) -> list[dict[str, object]]:
    """A row for each of our kernels in the program."""
    _, report = compile_for(TARGET, fn, *args)
    ours = [kernel for kernel in report.kernels if kernel.name.startswith("attention")]
    rows = []
    for kernel in sorted(ours, key=lambda kernel: kernel.name):
        figures = {name: getattr(kernel, name) for name in FIGURES}
        rows.append(
            {
                "case": label,
                "kernel": kernel.name,
                **figures,
                "program_temp_bytes": report.temp_bytes,
            }
        )
    return rows


def step(q, k_cache, v_cache, valid):
    return attention_step(q, k_cache, v_cache, valid=valid, implementation="gpu")


def step_rows(B: int, S: int, H: int, Hk: int, D: int) -> list[dict[str, object]]:
    """Of one decoding step against a cache of S slots."""
    q = jax.ShapeDtypeStruct((B, H, D), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((B, S, Hk, D), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct((B, S), jnp.bool_)
    return compiled(f"step B{B},S{S},H{H},Hk{Hk},D{D}", step, q, cache, cache, valid)


def main() -> None:
    args = parser(__doc__).parse_args()
    rows = []
    for shape, options in CASES:
        case = make_case("attention", shape, "bfloat16", {"implementation": "gpu", **options})
        settings = [f"{name}={value}" for name, value in options.items()]
        label = " ".join([shape, *settings])
        rows += compiled(label, case.backward(), *case.backward_args())
    for sizes in STEPS:
        rows += step_rows(*sizes)
    print(table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
    if args.json:
        write_json(args.json, {"target": TARGET, "rows": rows}, {})


if __name__ == "__main__":
    main()
