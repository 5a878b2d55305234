"""Chooses schedules of attention's TPU kernels by model time, for
`kernels_pallas/attention/tpu/tuning.py`.

    python benchmarks/tune_attention.py --target=tpu:v5e [--shape=B4,T4096,H16,D128]
        [--forward=rows=128,256] [--backward=block=1024,2048]

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
from kernels_pallas.attention.tpu.tuning import TUNED, Schedule

SETTINGS = {
    "forward": ["block=1024,2048", "rows=128,256,512"],
    "backward": ["block=1024,2048", "rows=256,512,128"],
}


def candidates(settings: list[str]) -> list[Schedule]:
    default = {"block": 1024, "rows": 256}
    return [Schedule(**default | chosen) for chosen in combinations(settings)]


def seconds(target: str, shape: str, forward: Schedule, backward: Schedule) -> dict[str, float]:
    """Model seconds of each pass under these schedules."""
    for row in TUNED.values():
        row.update(dict.fromkeys(row, (forward, backward)))
    case = make_case("attention", shape, "bfloat16", {"implementation": "tpu"})
    return seconds_of_passes(target, case)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="tpu:v5e, tpu:v5p, tpu:v6e or tpu:v7x")
    parser.add_argument("--shape", default="B4,T4096,H16,D128")
    for pass_name in PASSES:
        parser.add_argument(
            f"--{pass_name}",
            action="append",
            help="a setting and its values: rows=128,256",
        )
    args = parser.parse_args()
    tried = {}
    for pass_name in PASSES:
        settings = getattr(args, pass_name) or SETTINGS[pass_name]
        tried[pass_name] = candidates(settings)
    search(args.target, tried, partial(seconds, args.target, args.shape))


if __name__ == "__main__":
    main()
