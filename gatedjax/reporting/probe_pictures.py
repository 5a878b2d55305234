"""A picture of each probe, and the report of `eval.py --probes`: probes.json and the PNGs."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gatedjax.errors import InputError
from gatedjax.evaluation.probes import Probes, to_json
from gatedjax.reporting.figure import COLORS, DASHES, new_figure

Layers = Mapping[int, np.ndarray]  # layer -> the values of a probe
# Draws the layers of one probe; the last argument is all probes of the model.
Draw = Callable[[Any, Any, Layers, Probes], None]

LARGEST_LABELED_GRID = 256  # a larger grid has no numbers in its squares
MOST_TICKS = 16  # along an axis of layers, heads or experts
MOST_LEGEND_LINES = 8  # more layers are colored by depth, and some of them named


def write_report(probes: Probes, folder: Path) -> list[Path]:
    """Writes probes.json and a PNG per probe into `folder`, which is made; returns their paths.

    Raises:
      InputError: no right to write, or matplotlib is not installed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = folder / "probes.json"
        numbers.write_text(json.dumps(to_json(probes), indent=1) + "\n")
        paths = [numbers]
        for name, figure in figures(probes):
            picture = folder / f"{name}.png"
            figure.savefig(picture)
            paths.append(picture)
    except OSError as e:
        raise InputError(f"could not write {folder}: {e.strerror}") from e
    return paths


def require_no_links(folder: Path) -> None:
    """InputError if a link in the checkpoint would lead what is written to another place."""
    for path in [folder, *folder.glob("*")]:
        if path.is_symlink():
            raise InputError(f"{path}: is a link, expected a folder of plain files; remove it")


def images(probes: Probes) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture as uint8 [height, width, 3], for TensorBoard."""
    for name, figure in figures(probes):
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())
        # Without alpha, and not a view of the canvas.
        yield name, pixels[..., :3].copy()


def figures(probes: Probes) -> Iterator[tuple[str, Any]]:
    """(probe, matplotlib figure) for all that can be drawn."""
    for name, (title, draw) in _PICTURES.items():
        if name in probes:
            figure, axes = new_figure((6.4, 4.0))
            axes.set_title(title)
            draw(figure, axes, probes[name], probes)
            yield name, figure


def _draw_fraction(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    _draw_grid(
        figure,
        axes,
        layers,
        columns="head",
        top=1.0,
    )


def _draw_heads(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    _draw_grid(figure, axes, layers, columns="head")


def _draw_experts(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    _draw_grid(figure, axes, layers, columns="expert")


def _draw_grid(
    figure: Any,
    axes: Any,
    layers: Layers,
    columns: str,
    top: float | None = None,
) -> None:
    """Layers x heads or experts, each square with its number.

    Args:
      figure: the matplotlib figure.
      axes: its axes.
      layers: layer -> one value per column.
      columns: what a column is.
      top: the value of the brightest color; None for the largest value.
    """
    values = _as_grid(layers)
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="cividis",
        vmin=0,
        vmax=top,
    )
    middle = image.norm.vmax / 2
    if values.size <= LARGEST_LABELED_GRID:
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            axes.text(
                column,
                row,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value < middle else "black",
            )
    axes.set_xlabel(columns)
    axes.set_ylabel("layer")
    names = list(layers)
    rows = _spread(len(names), MOST_TICKS)
    axes.set_xticks(_spread(values.shape[1], MOST_TICKS))
    axes.set_yticks(rows, [str(names[row]) for row in rows])
    figure.colorbar(image)


def _as_grid(layers: Layers) -> np.ndarray:
    """[layers, columns]; NaN where a layer has fewer heads or experts than another."""
    columns = max(len(values) for values in layers.values())
    grid = np.full((len(layers), columns), np.nan)
    for row, values in zip(grid, layers.values()):
        row[: len(values)] = values
    return grid


def _spread(count: int, most: int) -> list[int]:
    """0 .. count - 1 if these are not too many; else some of them at even distances."""
    step = -(-count // most)
    return list(range(0, count, step))


def _styles(layers: Layers) -> dict[int, dict[str, Any]]:
    """The color of each layer's line, and its name where it is named.

    Few layers have colors of their own. Many are colored by depth, from dark to bright.
    """
    names = list(layers)
    if len(names) <= MOST_LEGEND_LINES:
        return {
            layer: {"label": f"layer {layer}", "color": color, "ls": dash}
            for layer, color, dash in zip(names, COLORS, DASHES)
        }
    import matplotlib

    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    named = _spread(len(names), MOST_LEGEND_LINES)
    styles = {}
    for place, layer in enumerate(names):
        styles[layer] = {"color": colors[place]}
        if place in named:
            styles[layer]["label"] = f"layer {layer}"
    return styles


def _draw_bars(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    names = list(layers)
    heights = [float(value) for value in layers.values()]
    axes.bar(range(len(names)), heights, color=COLORS[0])
    places = _spread(len(names), MOST_TICKS)
    axes.set_xticks(places, [str(names[place]) for place in places])
    axes.set_xlabel("after layer")
    axes.set_yscale("log")
    if min(heights) > 1.0:
        # The log axis would begin just below the lowest bar, and like heights look unlike.
        axes.set_ylim(1.0, None)
    axes.grid(alpha=0.25, axis="y")


def _draw_massive(
    figure: Any,
    axes: Any,
    layers: Layers,
    probes: Probes,
) -> None:
    """The three largest channels and the median, layer by layer."""
    names = list(layers)
    values = _as_grid(layers)
    for rank in range(values.shape[1]):
        axes.plot(
            names,
            values[:, rank],
            marker="o",
            ms=3,
            lw=1.3,
            label=("largest channel", "second", "third")[rank],
        )
    medians = [float(probes["median_activation"][layer]) for layer in names]
    axes.plot(
        names,
        medians,
        color="#555555",
        ls="--",
        lw=1,
        label="median of all entries",
    )
    axes.set_xlabel("after layer")
    axes.set_yscale("log")
    places = _spread(len(names), MOST_TICKS)
    axes.set_xticks([names[place] for place in places])
    _finish_lines(axes)


def _draw_entropy(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    styles = _styles(layers)
    for layer, by_position in layers.items():
        seen = np.arange(1, len(by_position) + 1)
        axes.plot(
            seen,
            by_position,
            lw=1.2,
            **styles[layer],
        )
    # Attention spread evenly over n tokens has an entropy of log n. All layers see as many.
    longest = max(len(by_position) for by_position in layers.values())
    seen = np.arange(1, longest + 1)
    axes.plot(
        seen,
        np.log(seen),
        color="#555555",
        ls="--",
        lw=1,
        label="even attention",
    )
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("nats")
    axes.set_xscale("log")
    _finish_lines(axes)


def _draw_gates(
    figure: Any,
    axes: Any,
    layers: Layers,
    probes: Probes,
) -> None:
    for layer, style in _styles(layers).items():
        edges = probes["gate_edges"][layer]
        density = layers[layer] / np.diff(edges)
        if "label" in style:
            mean = float(probes["gate_mean"][layer])
            style["label"] += f", mean {mean:.2f}"
        axes.stairs(
            density,
            edges,
            lw=1.3,
            **style,
        )
    axes.set_xlabel("gate")
    axes.set_ylabel("density")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, None)
    _finish_lines(axes)


def _draw_half_lives(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    styles = _styles(layers)
    for layer, tokens in layers.items():
        fractions = np.linspace(0, 1, len(tokens))
        axes.plot(
            fractions,
            np.sort(tokens),
            lw=1.3,
            **styles[layer],
        )
    axes.set_xlabel("fraction of channels")
    axes.set_ylabel("tokens")
    axes.set_yscale("log")
    _finish_lines(axes)


def _finish_lines(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


# probe -> title, and what draws it
_PICTURES: dict[str, tuple[str, Draw]] = {
    "first_token_fraction": ("attention on the document's first token", _draw_fraction),
    "attention_entropy": ("attention entropy by position", _draw_entropy),
    "gate_histogram": ("gates", _draw_gates),
    "massive_channels": ("massive activations: channels of the residual stream", _draw_massive),
    "max_activation": ("largest magnitude in the residual stream", _draw_bars),
    "kurtosis": ("kurtosis of the residual stream (3: normal)", _draw_bars),
    "mixer_max_activation": ("largest magnitude in a mixer's output", _draw_bars),
    "mixer_kurtosis": ("kurtosis of a mixer's output (3: normal)", _draw_bars),
    "effective_rank": ("effective rank of a head's value-output map", _draw_heads),
    "half_life": ("half-lives of linear layers' states", _draw_half_lives),
    "expert_load": ("expert load over an even load", _draw_experts),
}
