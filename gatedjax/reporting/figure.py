"""What all pictures need: a matplotlib figure without a display, one style, and a moving mean."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gatedjax.errors import InputError

# Colors that readers with any color vision tell apart (Okabe and Ito), from dark to light by turns;
# with a marker and a dash each, so that they are told apart in gray as well.
COLORS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
# Twice as many: the ninth line has the first one's color, and a marker of its own.
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h", "d", "H", "8", "x")


def moving_mean(values: Float[np.ndarray, "N"], window: int) -> Float[np.ndarray, "means"]:
    """Means over all whole windows of an odd number of values.

    The first mean belongs to the value at `window // 2`.
    """
    weights = np.full(window, 1.0 / window)
    return np.convolve(values, weights, mode="valid")


def empty_figure(inches: tuple[float, float], dpi: int = 150) -> Any:
    """A matplotlib figure without axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("pictures need matplotlib: pip install gatedjax[plots]") from e
    # No pyplot: no global state, no display.
    figure = Figure(figsize=inches, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(inches: tuple[float, float]) -> tuple[Any, Any]:
    """An empty matplotlib figure with one pair of axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    figure = empty_figure(inches)
    return figure, figure.add_subplot()


def tell_lines_apart(axes: Any) -> None:
    """Lines that are drawn from now on have a color, a marker and a dash each."""
    repeats = len(MARKERS) // len(COLORS)
    # The second time with other dashes, too.
    dashes = DASHES + DASHES[::-1]
    axes.set_prop_cycle(color=COLORS * repeats, marker=MARKERS, linestyle=dashes)


def save(figure: Any, path: Path) -> None:
    """Writes a figure.

    Raises:
      InputError: no right to write, or no place.
    """
    try:
        figure.savefig(path)
    except OSError as e:
        raise InputError(f"could not write {path}: {e.strerror}") from e
