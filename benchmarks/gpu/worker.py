"""The processes that import jax or torch: python -m benchmarks.gpu.worker TASK [--out=DIR ...]."""

import argparse

from benchmarks.gpu.guard import WorkerOptions
from benchmarks.gpu.settings import add_arguments, from_arguments

TASKS = (
    "versions",
    "numerics",
    "compile",
    "time",
    "variants",
    "tuned",
    "one",
    "torch",
    "compile_fla",
)


def run(task: str, options: WorkerOptions) -> None:
    """Does a task. Imports are here, since torch and jax do not share a process."""
    match task:
        case "versions":
            from benchmarks.gpu.versions import record_versions

            record_versions(options.settings)
        case "numerics":
            from benchmarks.gpu.numerics import check_numerics

            check_numerics(options)
        case "compile":
            from benchmarks.gpu.timing import compile_programs

            compile_programs(options)
        case "time":
            from benchmarks.gpu.timing import time_programs

            time_programs(options)
        case "variants":
            from benchmarks.gpu.tune import measure_variants

            measure_variants(options)
        case "tuned":
            from benchmarks.gpu.tune import time_tuned

            time_tuned(options)
        case "one":
            from benchmarks.gpu.timing import call_once

            call_once(options)
        case "torch":
            from benchmarks.gpu.torch_timing import time_torch

            time_torch(options)
        case "compile_fla":
            from benchmarks.gpu.torch_timing import compile_fla

            compile_fla(options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--case", default="")
    add_arguments(parser)
    args = parser.parse_args()
    options = WorkerOptions(
        settings=from_arguments(args),
        part=args.part,
        parts=args.parts,
        skip=args.skip,
        case=args.case,
    )
    run(args.task, options)


if __name__ == "__main__":
    main()
