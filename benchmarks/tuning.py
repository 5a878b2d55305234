"""What the tuners share: every combination of settings, and the best forward and backward schedule
by model time.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from gatedjax.aot import compile_for
from gatedjax.aot.cases import Case

PASSES = ("forward", "backward")
INFINITY = float("inf")


def combinations(
    settings: Sequence[str],
    parse: Callable[[str], Any] = int,
) -> Iterator[dict[str, Any]]:
    """Every combination of settings such as "rows=128,256".

    Args:
      settings: each a name and its values.
      parse: of one value.

    Yields:
      A value for each name.
    """
    axes = {}
    for text in settings:
        name, values = text.split("=")
        axes[name] = [parse(value) for value in values.split(",")]
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values))


def seconds_of_passes(target: str, case: Case) -> dict[str, float]:
    """Model seconds of each pass's kernel in one program of both; infinity if it does not
    compile.
    """
    try:
        _, report = compile_for(target, case.backward(), *case.backward_args())
    except jax.errors.JaxRuntimeError as error:  # too much VMEM
        print(str(error).splitlines()[0])
        return dict.fromkeys(PASSES, INFINITY)
    found = {}
    for kernel in report.kernels:
        for pass_name in PASSES:
            if pass_name in kernel.name:
                found[pass_name] = kernel.seconds
    return found


def search(
    target: str,
    tried: Mapping[str, Sequence],
    seconds: Callable[[Any, Any], dict[str, float]],
) -> None:
    """Compiles a forward and a backward schedule at a time; prints each, and the best of each pass.

    Args:
      target: the chip's name, for the lines.
      tried: schedules by pass. Where one pass has fewer, its best so far goes with the others.
      seconds: of each pass, for a forward and a backward schedule.
    """
    best_seconds = dict.fromkeys(PASSES, INFINITY)
    best: dict[str, Any] = dict.fromkeys(PASSES)
    for pair in itertools.zip_longest(tried["forward"], tried["backward"]):
        schedules = {}
        for pass_name, schedule in zip(PASSES, pair):
            schedules[pass_name] = schedule or best[pass_name]
        times = seconds(schedules["forward"], schedules["backward"])
        for pass_name, schedule in schedules.items():
            time = times[pass_name]
            print(f"{target} {pass_name:8s} {1e6 * time:8.1f} us  {schedule}", flush=True)
            if time < best_seconds[pass_name]:
                best_seconds[pass_name] = time
                best[pass_name] = schedule
    for pass_name in PASSES:
        microseconds = 1e6 * best_seconds[pass_name]
        print(f"best {pass_name}: {microseconds:.1f} us with {best[pass_name]}")
