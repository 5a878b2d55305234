"""A run's progress on the console, and how numbers are written for a person."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from gatedjax.errors import printable
from gatedjax.reporting.live import LiveBar
from gatedjax.runtime import run_log

# name -> a Python, NumPy or JAX number (or array), or None for "not known"
Scalars = Mapping[str, Any]

_PREFIXES = ("", "k", "M", "G", "T", "P")

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR


@runtime_checkable
class Stream(Protocol):
    """What lines are written to, such as `sys.stdout`."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


# The bar at the foot of the terminal, while there is one.
_bar: LiveBar | None = None


def say(text: str, out: Stream | None = None) -> None:
    """Prints a line on process 0, above the live bar if there is one; logs it too."""
    if jax.process_index() != 0:
        return
    run_log.note(text)
    _show(text, out or sys.stdout)


def _show(text: str, out: Stream) -> None:
    line = printable(text)
    if _bar is not None and _bar.out is out:
        _bar.say(line)
    else:
        print(line, file=out, flush=True)


@contextlib.contextmanager
def live_bar(total_steps: int, out: Stream | None = None) -> Iterator[None]:
    """A bar at the foot of the terminal inside the `with` block; nothing elsewhere.

    Args:
      total_steps: the last step of the run.
      out: what lines are written to; None for standard output.
    """
    global _bar
    out = out or sys.stdout
    can_be_redrawn = out.isatty() and os.environ.get("TERM") != "dumb"
    if jax.process_index() != 0 or not can_be_redrawn:
        yield
        return
    _bar = LiveBar(total_steps, out)
    try:
        _bar.start()
        yield
    finally:
        _bar.stop()
        _bar = None


def is_live() -> bool:
    """Whether there is a bar, which wants to know of every step."""
    return _bar is not None


def doing(what: str) -> None:
    """What the run is doing now, for the bar."""
    if _bar is not None:
        _bar.show(what)


def show_step(step: int, total_steps: int, scalars: Scalars) -> None:
    """What is known of a step, for the bar."""
    if _bar is not None:
        _bar.show(format_step(step, total_steps, scalars), step)


class Console:
    """Progress: the writer of `writers.py` that a person reads.

    With a live bar, training is seen there; elsewhere, and for other splits, each write adds a
    line.
    """

    def __init__(self, total_steps: int, out: Stream | None = None):
        self._total_steps = total_steps
        self._out = out or sys.stdout
        # That only the bar has shown.
        self._last_line: str | None = None

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        line = format_step(step, self._total_steps, scalars, split)
        if is_live() and split == "train":
            show_step(step, self._total_steps, scalars)
            self._last_line = line
            run_log.note(line)
        else:
            say(line, self._out)

    def close(self) -> None:
        # The bar goes; where training ended stays.
        if self._last_line is not None:
            _show(self._last_line, self._out)


def format_step(
    step: int,
    total_steps: int,
    scalars: Scalars,
    split: str = "train",
) -> str:
    """A line such as "step  120/600  loss 2.134  bpb 3.080  41.2k tok/s  mfu 12.3%  eta 2m10s".

    Scalars that are absent or None are left out. Without an MFU, the model's FLOP/s; skipped steps
    only if there are.

    Args:
      step: the optimizer step.
      total_steps: the last step of the run.
      scalars: what is known of the step.
      split: "train", or another split, which is then named.

    Returns:
      The line, without a line break.
    """
    known = {name: value for name, value in scalars.items() if value is not None}
    if "mfu" in known:
        known.pop("flops_per_s", None)
    if not known.get("skipped_steps"):
        known.pop("skipped_steps", None)
    width = len(str(total_steps))
    parts = [f"step {step:>{width}}/{total_steps}"]
    if split != "train":
        parts.append(split)
    for name, write in _WRITE_SCALAR.items():
        if name in known:
            parts.append(write(known[name]))
    return "  ".join(parts)


# The scalars that the console knows, in the order of the line.
_WRITE_SCALAR: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.3f}",
    "bits_per_byte": lambda x: f"bpb {x:.3f}",
    "accuracy": lambda x: f"acc {100 * x:.2f}%",
    "tokens_per_s": lambda x: f"{format_si(x)} tok/s",
    "mfu": lambda x: f"mfu {100 * x:.1f}%",
    "flops_per_s": lambda x: f"{format_si(x, ' ')}FLOP/s",
    "eta_s": lambda x: f"eta {format_duration(x)}",
    "grad_norm": lambda x: f"grad {x:.2f}",
    "skipped_steps": lambda x: f"skipped {x:.0f}",
}


def format_si(x: float, space: str = "") -> str:
    """Three digits and a prefix: 41234 -> "41.2k"; with space " ", 1.2e11 -> "120 G"."""
    if not math.isfinite(x):
        return f"{x}{space}"
    # Rounded to three digits first: 999.9 becomes 1.00e+03, which is 1.00k.
    mantissa, exponent = f"{x:.2e}".split("e")
    power = int(exponent) // 3
    power = min(max(power, 0), len(_PREFIXES) - 1)
    digits_before_point = int(exponent) - 3 * power
    scaled = float(mantissa) * 10.0**digits_before_point
    decimals = min(max(2 - digits_before_point, 0), 2)
    return f"{scaled:.{decimals}f}{space}{_PREFIXES[power]}"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 2m10s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    s = round(max(seconds, 0.0))
    if s < MINUTE:
        return f"{s}s"
    if s < HOUR:
        return f"{s // MINUTE}m{s % MINUTE:02}s"
    if s < DAY:
        return f"{s // HOUR}h{s % HOUR // MINUTE:02}m"
    return f"{s // DAY}d{s % DAY // HOUR:02}h"
