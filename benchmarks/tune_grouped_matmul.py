"""Compares schedules of grouped_matmul's TPU kernels by model time, for
`kernels_pallas/grouped_matmul/tpu/tuning.py`.

    python benchmarks/tune_grouped_matmul.py --target=tpu:v5e [--shape=M16384,K2048,N1024,G64]
        [--set=step=512,1024 ...]

Settings are the fields of the table's `Tuning`, outer_step as 1024x512; without --set those that
mattered. Every candidate is compiled for the chip and its schedule replayed, for equal groups and
for Zipf-skewed ones: no TPU is needed, and a minute each. Prints candidates as they come, and the
best of each kernel by the sum of both.
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax
from tuning import INFINITY, combinations

from gatedjax.aot import compile_and_replay
from gatedjax.aot.cases import make_case
from kernels_pallas.grouped_matmul.tpu.tuning import TUNED, Tuning

SETTINGS = ["tile=256,512", "part=64,128", "step=512,1024", "outer_step=1024x512,1024x1024"]
KERNELS = ("forward", "dlhs", "drhs")
SIZES = ("equal", "zipf")
DEVICES = {
    "tpu:v5e": "TPU v5 lite",
    "tpu:v5p": "TPU v5",
    "tpu:v6e": "TPU v6 lite",
    "tpu:v7x": "TPU7x",
}


def value(text: str) -> int | tuple[int, ...]:
    """ "512" -> 512; "1024x512" -> (1024, 512)."""
    numbers = tuple(int(part) for part in text.split("x"))
    return numbers if len(numbers) > 1 else numbers[0]


def candidates(base: Tuning, settings: list[str]) -> list[Tuning]:
    """`base` with every combination of the settings."""
    return [base._replace(**chosen) for chosen in combinations(settings, value)]


def microseconds(target: str, shape: str, row: Tuning) -> dict[tuple[str, str], float]:
    """Model time of each kernel for each kind of group sizes; empty if the candidate does not
    compile.
    """
    TUNED[DEVICES[target]] = row
    cases = {}
    for sizes in SIZES:
        options = {"implementation": "tpu", "sizes": sizes}
        cases[sizes] = make_case("grouped_matmul", shape, "bfloat16", options)
    case = cases["equal"]
    try:
        _, reports = compile_and_replay(
            target,
            case.backward(),
            *case.backward_args(),
            concretes={sizes: case.concrete for sizes, case in cases.items()},
        )
    except jax.errors.JaxRuntimeError as error:  # too much VMEM
        print(str(error).splitlines()[0])
        return {}
    found = {}
    for sizes, report in reports.items():
        for kernel in report.kernels:
            for name in KERNELS:
                if name in kernel.name:
                    found[name, sizes] = 1e6 * kernel.seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, choices=DEVICES)
    parser.add_argument("--shape", default="M16384,K2048,N1024,G64")
    parser.add_argument("--set", action="append", help="a setting and its values: step=512,1024")
    args = parser.parse_args()
    base = TUNED[DEVICES[args.target]]
    best_time = dict.fromkeys(KERNELS, INFINITY)
    best_row: dict[str, Tuning | None] = dict.fromkeys(KERNELS)
    for row in candidates(base, args.set or SETTINGS):
        times = microseconds(args.target, args.shape, row)
        shown = "  ".join(f"{name} {sizes} {time:,.1f}" for (name, sizes), time in times.items())
        print(f"{args.target} {shown}  {row}", flush=True)
        if not times:
            continue
        for name in KERNELS:
            total = sum(times[name, sizes] for sizes in SIZES)
            if total < best_time[name]:
                best_time[name] = total
                best_row[name] = row
    for name in KERNELS:
        print(f"best {name}: {best_time[name]:.1f} us in sum with {best_row[name]}")


if __name__ == "__main__":
    main()
