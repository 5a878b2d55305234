"""Runs the stages within a budget of seconds, and prints the summary.

    python -m benchmarks.gpu [--budget=560] [--stages=versions,time] [--out=DIR] [--dry]

A stage gets what is left of the budget, up to its own limit. What no longer fits is recorded as
skipped.
"""

import argparse
import signal
import time

from benchmarks.gpu.records import SUMMARY, append_record, one_line
from benchmarks.gpu.settings import Settings, add_arguments, from_arguments
from benchmarks.gpu.stages import LIMITS, default_stages, run_stage
from benchmarks.gpu.summary import summary
from benchmarks.gpu.unpack import unpack

# Seconds: for the summary, and the least that a stage is started with.
RESERVED = 5
SHORTEST_STAGE = 10


def run_stages(settings: Settings, stages: list[str], budget: float) -> None:
    """Runs the stages one after the other. A stage that fails is recorded, and the next one runs.

    Args:
      settings: those of the run.
      stages: names of stages, in the order in which they run.
      budget: seconds for all of them.
    """
    began = time.monotonic()
    unpack(settings)
    for name in stages:
        passed = time.monotonic() - began
        left = budget - passed - RESERVED
        if left < SHORTEST_STAGE:
            append_record(
                settings.out,
                stage=name,
                kind="stage",
                skipped=True,
                left=round(left),
            )
            continue
        print(f"[{passed:5.0f} s] {name}", flush=True)
        try:
            # How fast a CPU interprets says nothing: a dry run has no limits but the budget.
            limit = left if settings.dry else min(LIMITS.get(name, left), left)
            run_stage(settings, name, limit)
        except Exception as error:
            append_record(settings.out, stage=name, kind="stage", error=one_line(error))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--budget", type=float, default=560, help="seconds for the whole run")
    parser.add_argument("--stages", default="", help=f"of {','.join(LIMITS)}")
    add_arguments(parser)
    args = parser.parse_args()
    settings = from_arguments(args)
    stages = args.stages.split(",") if args.stages else default_stages(settings.dry)
    for folder in (settings.out, settings.scratch):
        folder.mkdir(parents=True, exist_ok=True)

    # As Ctrl-C, which ends the processes of the stage too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    run_stages(settings, stages, args.budget)
    text = summary(settings.out, time.monotonic() - began)
    (settings.out / SUMMARY).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
