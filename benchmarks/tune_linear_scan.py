"""Chooses schedules of linear_scan's TPU kernels by model time, for
`kernels_pallas/linear_scan/tpu/tuning.py`.

    python benchmarks/tune_linear_scan.py --target=tpu:v5e [--decay=vector] [--forward=lag=4,6]
        [--backward=lag=5,6]

Without --forward and --backward the settings that mattered. Every candidate is compiled for the
chip and its schedule replayed: no TPU is needed, and half a minute each. Prints candidates as they
come, and the best.
"""

import argparse
import os
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

from tuning import PASSES, combinations, search, seconds_of_passes

from gatedjax.aot.cases import make_case
from kernels_pallas.linear_scan.tpu.plan import Schedule
from kernels_pallas.linear_scan.tpu.tuning import TUNED

SETTINGS = {
    "forward": ["chunks=1,2", "lag=None,0,6", "stack=False,True", "round_early=True"],
    "backward": ["lag=0,4,6", "round_early=False,True", "transpose=True,False"],
}
WORDS = {"None": None, "True": True, "False": False}


def value(text: str) -> int | bool | None:
    return WORDS[text] if text in WORDS else int(text)


def candidates(settings: list[str]) -> list[Schedule]:
    default = {"heads": 8, "chunks": 1, "lag": None}
    return [Schedule(**default | chosen) for chosen in combinations(settings, value)]


def seconds(
    target: str,
    shape: str,
    decay: str,
    forward: Schedule,
    backward: Schedule,
) -> dict[str, float]:
    """Model seconds of each pass under these schedules."""
    kind = "vector" if decay == "vector" else "scalar"
    for row in TUNED.values():
        row[kind] = (forward, backward)
    case = make_case("linear_scan", shape, "bfloat16", {"decay": decay, "implementation": "tpu"})
    return seconds_of_passes(target, case)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="tpu:v5e, tpu:v5p, tpu:v6e or tpu:v7x")
    parser.add_argument("--decay", default="vector", help="vector, scalar, constant or none")
    parser.add_argument("--shape", default="B4,T4096,H8,K128,V256")
    for pass_name in PASSES:
        parser.add_argument(
            f"--{pass_name}",
            action="append",
            help="a setting and its values: lag=4,5,6",
        )
    args = parser.parse_args()
    tried = {}
    for pass_name in PASSES:
        settings = getattr(args, pass_name) or SETTINGS[pass_name]
        tried[pass_name] = candidates(settings)
    search(args.target, tried, partial(seconds, args.target, args.shape, args.decay))


if __name__ == "__main__":
    main()
