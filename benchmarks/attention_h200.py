"""attention's GPU kernels compiled for an H200 that is not here: registers, spills, shared memory,
memory of programs.

    python benchmarks/attention_h200.py [--json=benchmarks/results/attention_h200.json]

Forward and backward in one program, bfloat16, causal; and a decoding step. Static facts, no times.
Needs jax's CUDA plugin (make test-cuda-aot builds an environment) and ptxas.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on a device

import jax
import jax.numpy as jnp
from report import table, write_json

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from gatedjax.aot.report import GpuKernel
from kernels_pallas.attention import attention_step

TARGET = "cuda:h200"
CASES = [
    ("B4,T4096,H16,D64", {"gate": "element"}),
    ("B4,T4096,H16,D128", {}),
    ("B4,T4096,H16,D128", {"gate": "element"}),
    ("B4,T4096,H16,D128", {"gate": "head", "window": "1024", "segments": "yes"}),
    ("B1,T32768,H16,Hk2,D256", {"gate": "element"}),
]
STEPS = [(32, 8192, 16, 2, 128), (1, 32768, 16, 2, 256)]  # B, slots, H, Hk, D


def figures(k: GpuKernel) -> dict[str, object]:
    names = (
        "registers",
        "spill_bytes",
        "shared_memory_bytes",
        "blocks_per_core",
        "threads",
        "wgmma",
        "mma",
    )
    return {"kernel": k.name} | {name: getattr(k, name) for name in names}


def compiled(label: str, fn, *args) -> list[dict[str, object]]:
    _, report = compile_for(TARGET, fn, *args)
    ours = sorted(
        (k for k in report.kernels if k.name.startswith("attention")), key=lambda k: k.name
    )
    return [{"case": label, **figures(k), "program_temp_bytes": report.temp_bytes} for k in ours]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write the figures to this file")
    path, rows = parser.parse_args().json, []
    for shape, options in CASES:
        case = make_case("attention", shape, "bfloat16", {"implementation": "gpu", **options})
        label = " ".join([shape, *(f"{n}={x}" for n, x in options.items())])
        rows += compiled(label, case.backward(), *case.backward_args())
    for B, S, H, Hk, D in STEPS:
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        step = lambda q, k, v, valid: attention_step(q, k, v, valid=valid, implementation="gpu")
        valid = jax.ShapeDtypeStruct((B, S), jnp.bool_)
        rows += compiled(
            f"step B{B},S{S},H{H},Hk{Hk},D{D}",
            step,
            array(B, H, D),
            *[array(B, S, Hk, D)] * 2,
            valid,
        )
    columns = [name for name in rows[0] if name not in ("threads", "mma", "program_temp_bytes")]
    print(table(columns, [[row[name] for name in columns] for row in rows]))
    if path:
        write_json(path, {"target": TARGET, "rows": rows}, {})


if __name__ == "__main__":
    main()
