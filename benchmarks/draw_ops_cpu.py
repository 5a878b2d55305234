"""Draws what `ops_cpu.py` measured: time and temporary memory over the length of the sequence.

python benchmarks/draw_ops_cpu.py [results/ops_cpu.json [docs/pictures/ops_by_length.png]]
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
COLORS = ("#4477aa", "#66ccee", "#cc3311", "#999999")  # told apart by readers with any color vision
PANELS = (("milliseconds", 1.0, "ms"), ("temporary_bytes", 2.0**20, "temporary MiB"))


def draw(results: dict) -> Figure:
    """Two panels, both axes logarithmic; a hollow point was compiled but not run."""
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, scale, label) in zip(figure.subplots(1, 2), PANELS):
        for (name, points), color in zip(results["points"].items(), COLORS):
            draw_op(axes, name, points, color, key, scale)
        draw_axes(axes, results, label)
    figure.axes[0].legend(frameon=False, fontsize=8)
    sizes = results["shape"]
    shape = f"B {sizes['B']}, H {sizes['H']}, K = V = {sizes['K']}, {sizes['dtype']}"
    title = f"Forward and backward on {results['cores']} cores of a CPU ({shape})"
    figure.suptitle(title, fontsize=10)
    return figure


def draw_op(axes: Axes, name: str, points: dict, color: str, key: str, scale: float) -> None:
    """One op's line: `key` of its points, in units of `scale`."""
    known = {int(T): point for T, point in points.items() if point[key]}
    values = [point[key] / scale for point in known.values()]
    axes.plot(list(known), values, color=color, lw=1.4, label=name)
    for (T, point), value in zip(known.items(), values):
        was_run = point["milliseconds"] is not None
        fill = color if was_run else "white"
        axes.plot(T, value, "o", ms=5, color=color, markerfacecolor=fill)


def draw_axes(axes: Axes, results: dict, label: str) -> None:
    ticks = sorted({int(T) for points in results["points"].values() for T in points})
    axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label)
    axes.set_xticks(ticks, [f"{T:,}" for T in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main(
    source: str = "benchmarks/results/ops_cpu.json",
    target: str = "docs/pictures/ops_by_length.png",
) -> None:
    results = json.loads((ROOT / source).read_text())
    draw(results).savefig(ROOT / target)
    print(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
