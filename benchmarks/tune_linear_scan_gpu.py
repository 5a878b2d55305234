"""Chooses schedules of linear_scan's GPU kernels by time on this GPU, for
`kernels_pallas/linear_scan/gpu/tuning.py`.

    python benchmarks/tune_linear_scan_gpu.py [--shape=B4,T4096,H16,K128,V128] [--decay=vector,scalar] [--json=FILE]

One setting of the Schedule after the other, forward and backward together, from the table's row; a
setting stays when it is at least 2 % faster. Prints what was tried and the row to put into the
table. A schedule that does not compile or does not fit counts as infinitely slow. --dry_run: a tiny
shape, interpreted on the CPU, to try the program itself.
"""

import math

import jax
from absl import app, flags
from gpu_timing import device, inputs, median_seconds
from report import write_json

from kernels_pallas.linear_scan.gpu import tuning as gpu_tuning
from kernels_pallas.ops import linear_scan

_SHAPE = flags.DEFINE_string("shape", "B4,T4096,H16,K128,V128", "Sizes of B, T, H, K and V.")
_DECAY = flags.DEFINE_list("decay", ["vector", "scalar"], "Kinds of decay.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "A tiny shape, interpreted on the CPU, two candidates."
)

# In this order: what the passes share first.
CANDIDATES = {
    "chunk": (32, 64, 128),
    "scan_block_v": (16, 32, 64, 128),
    "scan_block_k": (32, 64, 128),
    "scan_warps": (2, 4, 8),
    "scan_stages": (1, 2, 3, 4),
    "programs_per_core": (1, 2, 4),
    "intra_block_k": (16, 32, 64, 128),
    "intra_warps": (4, 8),
    "back_block_k": (16, 32, 64),
    "back_block_v": (32, 64, 128),
    "back_warps": (4, 8),
    "dproducts_warps": (4, 8),
}
GAIN = 0.98


def seconds(schedule: gpu_tuning.Schedule, decay: str, arrays, cotangent) -> float:
    """Median seconds of one forward and backward pass under a schedule; inf where it cannot run."""
    chip, kind = gpu_tuning.chip(), "vector" if decay == "vector" else "scalar"
    gpu_tuning.TUNED[chip][2][kind] = schedule

    def both(*arrays):
        run = lambda *a: linear_scan(*a, implementation="gpu", interpret=_DRY_RUN.value)
        o, vjp = jax.vjp(run, *arrays)
        return o, vjp(cotangent)

    try:
        return median_seconds(jax.jit(both), *arrays, samples=2 if _DRY_RUN.value else 15)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        print(f"  {str(error).splitlines()[0][:150]}")
        return math.inf


def tune(decay: str, shape: str) -> tuple[gpu_tuning.Schedule, list[dict]]:
    """The best schedule found, and everything tried."""
    q, k, v, g = inputs(shape, decay)
    arrays, cotangent = (q, k, v) if g is None else (q, k, v, g), v
    best = gpu_tuning.schedule(decay)
    fastest = seconds(best, decay, arrays, cotangent)
    tried = [{"schedule": best._asdict(), "seconds": fastest}]
    print(f"{decay} {shape} {fastest * 1e6:.0f} us with {best}", flush=True)
    for name, values in list(CANDIDATES.items())[: 1 if _DRY_RUN.value else None]:
        for value in (16, 32) if _DRY_RUN.value else values:
            candidate = best._replace(**{name: value})
            if candidate == best:
                continue
            time = seconds(candidate, decay, arrays, cotangent)
            tried.append(
                {"schedule": candidate._asdict(), "seconds": time if math.isfinite(time) else None}
            )
            print(f"  {name}={value}: {time * 1e6:.0f} us", flush=True)
            if time < GAIN * fastest:
                best, fastest = candidate, time
    return best, tried


def main(_) -> None:
    shape = "B1,T64,H1,K16,V16" if _DRY_RUN.value else _SHAPE.value
    found = {decay: tune(decay, shape) for decay in _DECAY.value}
    print(f'put into TUNED["{gpu_tuning.chip()}"] of kernels_pallas/linear_scan/gpu/tuning.py:')
    for decay, (best, _) in found.items():
        changed = {
            n: v for n, v in best._asdict().items() if v != gpu_tuning.Schedule._field_defaults[n]
        }
        print(f'    "{decay}": Schedule({", ".join(f"{n}={v}" for n, v in changed.items())}),')
    if _JSON.value:
        rows = {d: {"best": best._asdict(), "tried": tried} for d, (best, tried) in found.items()}
        write_json(
            _JSON.value,
            {"device": device(), "shape": shape, "dtype": "bfloat16", "decays": rows},
            {},
        )


if __name__ == "__main__":
    app.run(main)
