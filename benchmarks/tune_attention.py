"""Chooses schedules of attention's TPU kernels by model time, for
`kernels_pallas/attention/tpu/tuning.py`.

    python benchmarks/tune_attention.py --target=tpu:v5e [--shape=B4,T4096,H16,D128] [--forward=rows=128,256] [...]

Without --forward and --backward the settings that mattered. Every candidate is compiled for the
chip and its schedule replayed: no TPU is needed, and half a minute each. Prints candidates as they
come, and the best.
"""

import argparse
import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import importlib

import jax

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case

tpu_tuning = importlib.import_module("kernels_pallas.attention.tpu.tuning")
Schedule = tpu_tuning.Schedule

SETTINGS = {
    "forward": ["block=1024,2048", "rows=128,256,512"],
    "backward": ["block=1024,2048", "rows=256,512,128"],
}


def candidates(settings: list[str]) -> list[Schedule]:
    """ "rows=128,256" and the like, every combination of them."""
    axes = {name: text.split(",") for name, text in (s.split("=") for s in settings)}
    fixed = dict(block=1024, rows=256)
    return [
        Schedule(**fixed | dict(zip(axes, map(int, c)))) for c in itertools.product(*axes.values())
    ]


def seconds(target: str, shape: str, forward: Schedule, backward: Schedule) -> dict[str, float]:
    """Model seconds of each kernel in one program of forward and backward pass; inf if it does not
    compile.
    """
    for row in tpu_tuning.TUNED.values():
        row.update(dict.fromkeys(row, (forward, backward)))
    case = make_case("attention", shape, "bfloat16", {"implementation": "tpu"})
    try:
        _, report = compile_for(target, case.backward(), *case.backward_args())
    except jax.errors.JaxRuntimeError as error:  # too much VMEM
        print(str(error).splitlines()[0])
        return dict.fromkeys(SETTINGS, float("inf"))
    return {way: k.seconds for k in report.kernels for way in SETTINGS if way in k.name}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="tpu:v5e, tpu:v5p, tpu:v6e or tpu:v7x")
    parser.add_argument("--shape", default="B4,T4096,H16,D128")
    for way in SETTINGS:
        parser.add_argument(
            f"--{way}", action="append", help="a setting and its values: rows=128,256"
        )
    args = parser.parse_args()
    tried = {way: candidates(getattr(args, way) or SETTINGS[way]) for way in SETTINGS}
    best = {way: (float("inf"), None) for way in SETTINGS}
    for pair in itertools.zip_longest(*tried.values()):
        pair = [one or best[way][1] for one, way in zip(pair, SETTINGS)]
        times = seconds(args.target, args.shape, *pair)
        for way, schedule in zip(SETTINGS, pair):
            print(f"{args.target} {way:8s} {1e6 * times[way]:8.1f} us  {schedule}", flush=True)
            best[way] = min(best[way], (times[way], schedule), key=lambda b: b[0])
    for way, (time, schedule) in best.items():
        print(f"best {way}: {1e6 * time:.1f} us with {schedule}")


if __name__ == "__main__":
    main()
