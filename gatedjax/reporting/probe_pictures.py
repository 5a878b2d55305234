"""A picture of each probe, and the report of `eval.py --probes`: probes.json and the PNGs."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gatedjax.errors import InputError
from gatedjax.evaluation.probes import Probes, to_json
from gatedjax.reporting.figure import new_figure

Layers = Mapping[int, np.ndarray]  # layer -> the values of a probe
# Draws the layers of one probe; the last argument is all probes of the model.
Draw = Callable[[Any, Any, Layers, Probes], None]

LARGEST_LABELED_GRID = 256  # a larger grid has no numbers in its squares


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
    values = np.stack(list(layers.values()))
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
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), list(layers))
    figure.colorbar(image)


def _draw_bars(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    names = [str(layer) for layer in layers]
    heights = [float(value) for value in layers.values()]
    axes.bar(names, heights, color="#4477aa")
    axes.set_xlabel("after layer")
    axes.set_yscale("log")
    axes.grid(alpha=0.25, axis="y")


def _draw_entropy(
    figure: Any,
    axes: Any,
    layers: Layers,
    _: Probes,
) -> None:
    for layer, by_position in layers.items():
        seen = np.arange(1, len(by_position) + 1)
        axes.plot(
            seen,
            by_position,
            lw=1.2,
            label=f"layer {layer}",
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
    for layer, fractions in layers.items():
        edges = probes["gate_edges"][layer]
        mean = float(probes["gate_mean"][layer])
        density = fractions / np.diff(edges)
        axes.stairs(
            density,
            edges,
            lw=1.3,
            label=f"layer {layer}, mean {mean:.2f}",
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
    for layer, tokens in layers.items():
        fractions = np.linspace(0, 1, len(tokens))
        axes.plot(
            fractions,
            np.sort(tokens),
            lw=1.3,
            label=f"layer {layer}",
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
    "max_activation": ("largest magnitude in the residual stream", _draw_bars),
    "kurtosis": ("kurtosis of the residual stream (3: normal)", _draw_bars),
    "effective_rank": ("effective rank of a head's value-output map", _draw_heads),
    "half_life": ("half-lives of linear layers' states", _draw_half_lives),
    "expert_load": ("expert load over an even load", _draw_experts),
}
