"""From the records of a study's runs to a table (Markdown) and pictures. Every figure is a mean and
a spread.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gatedjax.reporting.figure import new_figure
from gatedjax.study.grid import Label, Picture, Study

Record = Mapping[str, Any]  # {"labels": {...}, "seed": 0, "values": {...}}


class Row(NamedTuple):
    """Runs with the same labels. spread: standard deviation over seeds, 0 for one seed; NaN: none
    of them survived.
    """

    labels: dict[str, Label]
    mean: dict[str, float]
    spread: dict[str, float]
    seeds: int
    diverged: int


def rows(study: Study, records: Sequence[Record]) -> list[Row]:
    """A row for each cell."""
    cells: dict[tuple, list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record["labels"].items()), []).append(record)
    return [_row(dict(labels), group, study.columns) for labels, group in cells.items()]


def _row(labels: dict[str, Label], group: Sequence[Record], columns: Sequence[str]) -> Row:
    values = {
        c: np.array([r["values"].get(c, math.nan) for r in group], np.float64) for c in columns
    }
    alive = np.array([not r["values"]["diverged"] for r in group])
    mean = {c: float(x[alive].mean()) if alive.any() else math.nan for c, x in values.items()}
    spread = {c: float(x[alive].std(ddof=1)) if alive.sum() > 1 else 0.0 for c, x in values.items()}
    return Row(labels, mean, spread, len(group), int((~alive).sum()))


def markdown(study: Study, found: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, under the study's title and above the notes (command, versions, time)."""
    names = list(found[0].labels)
    lines = [f"# {study.title}", "", "| " + " | ".join([*names, *study.columns, "seeds"]) + " |"]
    lines.append("|" + "---|" * (len(names) + len(study.columns) + 1))
    for row in found:
        seeds = f"{row.seeds}" + (f", {row.diverged} diverged" if row.diverged else "")
        cells = (
            [str(row.labels[n]) for n in names] + [_figure(row, c) for c in study.columns] + [seeds]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes, ""])


def _figure(row: Row, column: str) -> str:
    mean, spread = row.mean[column], row.spread[column]
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if row.seeds - row.diverged < 2 else f"{mean:.4g} ± {spread:.2g}"


def draw(picture: Picture, found: Sequence[Row], title: str) -> Any:
    """The matplotlib figure: error bars are the spread over seeds."""
    figure, axes = new_figure((7.0, 4.4))
    lines: dict[Label, list[Point]] = {}
    for row in found:
        points = [p for p in _points(picture, row) if not math.isnan(p.y)]
        lines.setdefault(row.labels[picture.line] if picture.line else picture.y, []).extend(points)
    lines = {name: points for name, points in lines.items() if points}
    xlabel, ylabel = picture.x, picture.y.removesuffix("@")
    if any(isinstance(p.x, str) for points in lines.values() for p in points):
        _dots(axes, lines)
        xlabel, ylabel = ylabel, ""
    else:
        for name, points in lines.items():
            x, y, spread = zip(*sorted(points))
            axes.errorbar(x, y, yerr=spread, marker="o", ms=4, lw=1.4, capsize=3, label=str(name))
        if picture.log_x:
            axes.set_xscale("log")
            ticks = sorted({p.x for points in lines.values() for p in points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_xticks([], minor=True)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if picture.line:
        axes.legend(frameon=False, fontsize=8)
    return figure


class Point(NamedTuple):
    x: Label
    y: float
    spread: float


def _points(picture: Picture, row: Row) -> list[Point]:
    if not picture.y.endswith("@"):
        return [Point(row.labels[picture.x], row.mean[picture.y], row.spread[picture.y])]
    columns = [c for c in row.mean if c.startswith(picture.y)]
    return [Point(float(c.removeprefix(picture.y)), row.mean[c], row.spread[c]) for c in columns]


def _dots(axes: Any, lines: Mapping[Label, list[Point]]) -> None:
    """A row for each name, a dot and its number: differences of a few percent, which bars from zero
    would hide.
    """
    places = list(dict.fromkeys(p.x for points in lines.values() for p in points))
    for name, points in lines.items():
        at, spread = [places.index(p.x) for p in points], [p.spread for p in points]
        axes.errorbar(
            [p.y for p in points], at, xerr=spread, fmt="o", ms=5, capsize=3, label=str(name)
        )
        for place, p in zip(at, points):
            axes.annotate(
                f"{p.y:.3g}",
                (p.y, place),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.margins(y=0.08)
