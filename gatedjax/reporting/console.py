"""A run's progress on the console, and how numbers are written for a person."""

import math
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import jax

Scalars = Mapping[
    str, Any
]  # name -> a Python, NumPy or JAX number (or array), or None for "not known"
_CLEAR_LINE = "\r\x1b[K"


def say(text: str, out: TextIO | None = None) -> None:
    """Prints a line on process 0, over the live progress line if there is one."""
    out = out or sys.stdout
    if jax.process_index() == 0:
        print((_CLEAR_LINE if out.isatty() else "") + text, file=out, flush=True)


class Console:
    """Progress. On a terminal, training redraws one live line; elsewhere, and for other splits,
    each write adds one.
    """

    def __init__(self, total_steps: int, out: TextIO | None = None):
        self._total, self._out = total_steps, out or sys.stdout
        self._live = False

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        line = format_step(step, self._total, scalars, split)
        if not self._out.isatty() or split != "train":
            say(line, self._out)
            self._live = False
            return
        width = (
            shutil.get_terminal_size().columns - 1
        )  # a longer line would wrap, and \r not reach its start
        self._out.write(_CLEAR_LINE + line[:width])
        self._out.flush()
        self._live = True

    def close(self) -> None:
        if self._live:
            self._out.write("\n")
            self._out.flush()


def format_step(step: int, total_steps: int, scalars: Scalars, split: str = "train") -> str:
    """A line such as "step  120/600  loss 2.134  bpb 3.080  41.2k tok/s  mfu 12.3%  eta 2m10s  grad 0.71".

    Scalars that are absent or None are left out. Without an MFU, the model's FLOP/s; skipped steps
    only if there are.
    """
    has = {name: x for name, x in scalars.items() if x is not None}
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts += [] if split == "train" else [split]
    shown = {
        "loss": lambda x: f"loss {x:.3f}",
        "bits_per_byte": lambda x: f"bpb {x:.3f}",
        "tokens_per_s": lambda x: f"{format_si(x)} tok/s",
        "mfu": lambda x: f"mfu {100 * x:.1f}%",
        "flops_per_s": lambda x: "" if "mfu" in has else f"{format_si(x, ' ')}FLOP/s",
        "eta_s": lambda x: f"eta {format_duration(x)}",
        "grad_norm": lambda x: f"grad {x:.2f}",
        "skipped_steps": lambda x: f"skipped {x:.0f}" if x else "",
    }
    parts += [show(has[name]) for name, show in shown.items() if name in has]
    return "  ".join(p for p in parts if p)


def format_si(x: float, space: str = "") -> str:
    """Three significant digits and a prefix: 41234 -> "41.2k"; with space " ", 1.2e11 -> "120
    G".
    """
    if not math.isfinite(x):
        return f"{x}{space}"
    mantissa, exponent = f"{x:.2e}".split("e")
    power = min(max(int(exponent) // 3, 0), 5)
    tens = int(exponent) - 3 * power
    return (
        f"{float(mantissa) * 10.0**tens:.{min(max(2 - tens, 0), 2)}f}{space}{['', *'kMGTP'][power]}"
    )


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 2m10s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    s = round(max(seconds, 0.0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02}m"
    return f"{s // 86400}d{s % 86400 // 3600:02}h"
