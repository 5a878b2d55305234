"""Chooses schedules of linear_scan's TPU kernels by model time, for
`kernels_pallas/linear_scan/tpu/tuning.py`.

    python benchmarks/tune_linear_scan.py --target=tpu:v5e [--decay=vector] [--forward=lag=4,6] [--backward=lag=5,6]

Without --forward and --backward the settings that mattered. Every candidate is compiled for the
chip and its schedule replayed: no TPU is needed, and half a minute each. Prints candidates as they
come, and the best.
"""

import argparse
import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import jax

from gatedjax.aot import compile_for
from gatedjax.aot.cases import make_case
from kernels_pallas.linear_scan.tpu import tuning as tpu_tuning
from kernels_pallas.linear_scan.tpu.plan import Schedule

SETTINGS = {
    "forward": ["chunks=1,2", "lag=None,0,6", "stack=False,True", "round_early=True"],
    "backward": ["lag=0,4,6", "round_early=False,True", "transpose=True,False"],
}
VALUES = {"None": None, "True": True, "False": False}


def candidates(settings: list[str]) -> list[Schedule]:
    """ "lag=4,6" and the like, every combination of them."""
    axes = {name: text.split(",") for name, text in (s.split("=") for s in settings)}
    value = lambda text: VALUES[text] if text in VALUES else int(text)
    fixed = dict(heads=8, chunks=1, lag=None)
    return [
        Schedule(**fixed | dict(zip(axes, map(value, c))))
        for c in itertools.product(*axes.values())
    ]


def seconds(
    target: str, shape: str, decay: str, forward: Schedule, backward: Schedule
) -> dict[str, float]:
    """Model seconds of each kernel in one program of forward and backward pass; inf if it does not
    compile.
    """
    for row in tpu_tuning.TUNED.values():
        row["vector" if decay == "vector" else "scalar"] = forward, backward
    case = make_case("linear_scan", shape, "bfloat16", {"decay": decay, "implementation": "tpu"})
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
    parser.add_argument("--decay", default="vector", help="vector, scalar, constant or none")
    parser.add_argument("--shape", default="B4,T4096,H8,K128,V256")
    for way in SETTINGS:
        parser.add_argument(f"--{way}", action="append", help="a setting and its values: lag=4,5,6")
    args = parser.parse_args()
    tried = {way: candidates(getattr(args, way) or SETTINGS[way]) for way in SETTINGS}
    best = {way: (float("inf"), None) for way in SETTINGS}
    for pair in itertools.zip_longest(*tried.values()):
        pair = [one or best[way][1] for one, way in zip(pair, SETTINGS)]
        times = seconds(args.target, args.shape, args.decay, *pair)
        for way, schedule in zip(SETTINGS, pair):
            print(f"{args.target} {way:8s} {1e6 * times[way]:8.1f} us  {schedule}", flush=True)
            best[way] = min(best[way], (times[way], schedule), key=lambda b: b[0])
    for way, (time, schedule) in best.items():
        print(f"best {way}: {1e6 * time:.1f} us with {schedule}")


if __name__ == "__main__":
    main()
