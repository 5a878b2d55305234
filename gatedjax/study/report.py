"""From the records of a study's runs to a table (Markdown) and pictures.

Every value is a mean and a spread over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from gatedjax.reporting.figure import new_figure, tell_lines_apart
from gatedjax.study.grid import Label, Picture, Study
from gatedjax.study.words import Words, words_of

Record = Mapping[str, Any]  # {"labels": {...}, "seed": 0, "values": {...}}


class Row(NamedTuple):
    """Runs with the same labels.

    mean: over the seeds that did not diverge; NaN if there are none.
    spread: standard deviation over seeds, 0 for one seed.
    seeds: how many there were, those that diverged too.
    """

    labels: dict[str, Label]
    mean: dict[str, float]
    spread: dict[str, float]
    seeds: int
    diverged: int

    @property
    def survivors(self) -> int:
        """Seeds that did not diverge."""
        return self.seeds - self.diverged


def rows(study: Study, records: Sequence[Record]) -> list[Row]:
    """A row for each cell."""
    cells: dict[tuple, list[Record]] = {}
    for record in records:
        labels = tuple(record["labels"].items())
        cells.setdefault(labels, []).append(record)
    return [_row(dict(labels), group, study.columns) for labels, group in cells.items()]


def _row(labels: dict[str, Label], group: Sequence[Record], columns: Sequence[str]) -> Row:
    runs = [record["values"] for record in group]
    survived = np.array([not run["diverged"] for run in runs], bool)
    mean = {}
    spread = {}
    for column in columns:
        # A value that was not finite is None, which becomes NaN.
        values = np.array([run.get(column, math.nan) for run in runs], np.float64)
        summary = _mean_and_spread(values, survived)
        mean[column] = summary.mean
        spread[column] = summary.spread
    # Runs that diverged are counted, not averaged.
    return Row(
        labels=labels,
        mean=mean,
        spread=spread,
        seeds=len(group),
        diverged=int((~survived).sum()),
    )


class _Summary(NamedTuple):
    """Of one column, over the seeds of a cell."""

    mean: float
    spread: float


def _mean_and_spread(
    values: Float64[np.ndarray, "seeds"], survived: Bool[np.ndarray, "seeds"]
) -> _Summary:
    kept = values[survived]
    if len(kept) == 0:
        return _Summary(math.nan, 0.0)
    mean = float(kept.mean())
    # A sample's standard deviation needs two values.
    spread = 0.0
    if len(kept) > 1:
        spread = float(kept.std(ddof=1))
    return _Summary(mean, spread)


def markdown(study: Study, table: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, under the study's title and above the notes (command, versions, time)."""
    names = list(table[0].labels)
    header = [*names, *study.columns, "seeds"]
    lines = [f"# {study.title}", "", _table_line(header), "|" + "---|" * len(header)]
    for row in table:
        cells = [str(row.labels[name]) for name in names]
        cells += [_value(row, column) for column in study.columns]
        cells.append(_seeds(row))
        lines.append(_table_line(cells))
    lines.append("")
    lines.extend(notes)
    return "\n".join(lines) + "\n"


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _value(row: Row, column: str) -> str:
    mean = row.mean[column]
    if math.isnan(mean):
        return "-"
    if row.survivors < 2:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {row.spread[column]:.2g}"


def _seeds(row: Row) -> str:
    if row.diverged:
        return f"{row.seeds}, {row.diverged} diverged"
    return str(row.seeds)


# Of a row of dots: how far apart, in rows, the dots of two lines are.
APART = 0.22


class Point(NamedTuple):
    """A mean over seeds, and its spread, at a place of a picture."""

    x: Label
    y: float
    spread: float


Lines = dict[Label, list[Point]]  # what the legend says -> points


def draw(picture: Picture, table: Sequence[Row], title: str) -> Any:
    """The matplotlib figure: error bars are the spread over seeds, as far as values can be."""
    lines = _lines(picture, table)
    places = {point.x for points in lines.values() for point in points}
    has_names = any(isinstance(place, str) for place in places)
    height = 4.4
    if has_names:
        # A name and the number above its dot need so much each.
        height = max(height, (0.16 + 0.2 * len(lines)) * len(places))
    figure, axes = new_figure((7.0, height))
    tell_lines_apart(axes)
    of_y = words_of(picture.y)
    if has_names:
        # Dots lie on their side: the values are on the horizontal axis.
        _draw_dots(axes, lines, of_y)
        axes.set_xlabel(of_y.label)
        if picture.log_x:
            axes.set_xscale("log")
    else:
        _draw_lines(axes, lines, of_y)
        axes.set_xlabel(words_of(picture.x).label)
        axes.set_ylabel(of_y.label)
        if picture.log_y:
            # Error bars that reach 0 end at the edge of the picture.
            axes.set_yscale("log", nonpositive="clip")
        if picture.log_x:
            axes.set_xscale("log")
            ticks = sorted(places)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if picture.line:
        title = words_of(picture.line).text
        axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
    return figure


def _lines(picture: Picture, table: Sequence[Row]) -> Lines:
    """The points of each line; lines and points without a value are left out."""
    lines: Lines = {}
    for row in table:
        name: Label = picture.y
        if picture.line:
            name = row.labels[picture.line]
        for point in _points(picture, row):
            if not math.isnan(point.y):
                lines.setdefault(name, []).append(point)
    return lines


def _points(picture: Picture, row: Row) -> list[Point]:
    if not picture.y.endswith("@"):
        # One column: its place is a label of the cell.
        point = Point(x=row.labels[picture.x], y=row.mean[picture.y], spread=row.spread[picture.y])
        return [point]
    # Several columns: each is a place.
    points = []
    for column in row.mean:
        if column.startswith(picture.y):
            point = Point(
                x=_place(column.removeprefix(picture.y)),
                y=row.mean[column],
                spread=row.spread[column],
            )
            points.append(point)
    return points


def _place(text: str) -> Label:
    """What follows "@" in a column: a number where it is one, else a name."""
    try:
        return float(text)
    except ValueError:
        return text


def _bar(point: Point, of_y: Words) -> tuple[float, float]:
    """How far the error bar reaches down and up: not to where no value can be."""
    down = min(point.spread, max(point.y - of_y.low, 0.0))
    up = min(point.spread, max(of_y.high - point.y, 0.0))
    return down, up


def _draw_lines(axes: Any, lines: Lines, of_y: Words) -> None:
    for name, points in lines.items():
        # By x: the cells of a table may be in any order.
        points = sorted(points)
        axes.errorbar(
            [point.x for point in points],
            [point.y for point in points],
            yerr=np.transpose([_bar(point, of_y) for point in points]),
            ms=5,
            lw=1.4,
            capsize=3,
            label=str(name),
        )


def _number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:#.3g}".rstrip(".") if abs(x) < 1000 else f"{x:.0f}"


def _draw_dots(axes: Any, lines: Lines, of_y: Words) -> None:
    """A row for each name, with a dot and its number.

    Differences are of a few percent: bars from zero would hide them.
    """
    # A dict keeps the order of the table.
    places = list(dict.fromkeys(point.x for points in lines.values() for point in points))
    for count, (name, points) in enumerate(lines.items()):
        # Lines stand below each other in a row, so that their numbers can be read.
        shift = APART * (count - (len(lines) - 1) / 2)
        heights = [places.index(point.x) + shift for point in points]
        axes.errorbar(
            [point.y for point in points],
            heights,
            xerr=np.transpose([_bar(point, of_y) for point in points]),
            ls="none",
            ms=5,
            capsize=3,
            label=str(name),
        )
        for height, point in zip(heights, points):
            axes.annotate(
                _number(point.y),
                xy=(point.y, height),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    # The first row of the table on top.
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.margins(y=0.08)
