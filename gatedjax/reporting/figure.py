"""What pictures of a run share."""

from typing import Any

import numpy as np

from gatedjax.errors import InputError


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over all whole windows (an odd number of values): the first belongs to place window //
    2.
    """
    return np.convolve(values, np.full(window, 1.0 / window), mode="valid")


def new_figure(inches: tuple[float, float]) -> tuple[Any, Any]:
    """An empty matplotlib figure with one pair of axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("pictures need matplotlib: pip install gatedjax[plots]") from e
    figure = Figure(
        figsize=inches, dpi=150, layout="constrained"
    )  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
