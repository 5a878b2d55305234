"""Compares schedules of grouped_matmul's TPU kernels by model time, for
`kernels_pallas/grouped_matmul/tpu/tuning.py`.

    python benchmarks/tune_grouped_matmul.py --target=tpu:v5e [--shape=M16384,K2048,N1024,G64] [--set=step=512,1024 ...]

Settings are the fields of `tpu_tuning.Tuning`, outer_step as 1024x512; without --set those that
mattered. Every candidate is compiled for the chip and its schedule replayed, for equal groups and
for Zipf-skewed ones: no TPU is needed, and a minute each. Prints candidates as they come, and the
best of each kernel by the sum of both.
"""

import argparse
import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax

from gatedjax.aot import compile_and_replay
from gatedjax.aot.cases import make_case
from kernels_pallas.grouped_matmul.tpu import tuning as tpu_tuning

SETTINGS = ["tile=256,512", "part=64,128", "step=512,1024", "outer_step=1024x512,1024x1024"]
KERNELS = ("forward", "dlhs", "drhs")
DEVICES = {"tpu:v5e": "TPU v5 lite", "tpu:v5p": "TPU v5", "tpu:v6e": "TPU v6 lite"}


def candidates(base: tpu_tuning.Tuning, settings: list[str]) -> list[tpu_tuning.Tuning]:
    """ "step=512,1024" and the like, every combination of them."""
    axes = {
        name: [_value(v) for v in text.split(",")]
        for name, text in (s.split("=") for s in settings)
    }
    return [
        base._replace(**dict(zip(axes, values))) for values in itertools.product(*axes.values())
    ]


def _value(text: str):
    return tuple(map(int, text.split("x"))) if "x" in text else int(text)


def microseconds(target: str, shape: str, row: tpu_tuning.Tuning) -> dict[tuple[str, str], float]:
    """Model time of each kernel for each kind of group sizes; empty if the candidate does not
    compile.
    """
    tpu_tuning.TUNED[DEVICES[target]] = row
    case, skewed = (
        make_case("grouped_matmul", shape, "bfloat16", {"implementation": "tpu", "sizes": s})
        for s in ("equal", "zipf")
    )
    concretes = {"equal": case.concrete, "zipf": skewed.concrete}
    try:
        _, reports = compile_and_replay(
            target, case.backward(), *case.backward_args(), concretes=concretes
        )
    except jax.errors.JaxRuntimeError as error:  # too much VMEM
        print(str(error).splitlines()[0])
        return {}
    named = lambda report: (
        (name, 1e6 * k.seconds) for k in report.kernels for name in KERNELS if name in k.name
    )
    return {(name, kind): time for kind, report in reports.items() for name, time in named(report)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, choices=DEVICES)
    parser.add_argument("--shape", default="M16384,K2048,N1024,G64")
    parser.add_argument("--set", action="append", help="a setting and its values: step=512,1024")
    args = parser.parse_args()
    best = dict.fromkeys(KERNELS, (float("inf"), None))
    for row in candidates(tpu_tuning.TUNED[DEVICES[args.target]], args.set or SETTINGS):
        times = microseconds(args.target, args.shape, row)
        shown = "  ".join(f"{name} {kind} {time:,.1f}" for (name, kind), time in times.items())
        print(f"{args.target} {shown}  {row}", flush=True)
        for name in KERNELS if times else ():
            total = sum(time for (of, _), time in times.items() if of == name)
            best[name] = min(best[name], (total, row), key=lambda b: b[0])
    for name, (time, row) in best.items():
        print(f"best {name}: {time:.1f} us in sum with {row}")


if __name__ == "__main__":
    main()
