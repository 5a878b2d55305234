"""A picture of each probe, and the report that `eval.py --probes` writes: probes.json and the PNGs
beside it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gatedjax.errors import InputError
from gatedjax.evaluation.probes import Probes, to_json
from gatedjax.reporting.figure import new_figure

Layers = dict[int, np.ndarray]

TITLES = {
    "first_token_fraction": "attention on the document's first token",
    "attention_entropy": "attention entropy by position",
    "gate_histogram": "gate scores",
    "max_activation": "largest magnitude in the residual stream",
    "kurtosis": "kurtosis of the residual stream (3: normal)",
    "effective_rank": "effective rank of a head's value-output map",
    "half_life": "half-lives of linear layers' states",
    "expert_load": "expert load over an even share",
}


def write_report(probes: Probes, folder: Path) -> list[Path]:
    """Writes probes.json and a PNG per probe into `folder`, which is made; returns their paths.

    Raises:
      InputError: no right to write, or matplotlib is not installed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probes.json").write_text(json.dumps(to_json(probes), indent=1) + "\n")
        paths = [folder / "probes.json"]
        for name, figure in figures(probes):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
    except OSError as e:
        raise InputError(f"could not write {folder}: {e.strerror}") from e
    return paths


def images(probes: Probes) -> Iterator[tuple[str, np.ndarray]]:
    """Every picture as uint8 [height, width, 3], for TensorBoard."""
    for name, figure in figures(probes):
        figure.canvas.draw()
        yield name, np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def figures(probes: Probes) -> Iterator[tuple[str, object]]:
    """(probe, matplotlib figure) for all that can be drawn."""
    for name, title in TITLES.items():
        if name in probes:
            figure, axes = new_figure((6.4, 4.0))
            axes.set_title(title)
            _DRAW[name](figure, axes, probes[name], probes)
            yield name, figure


def _grid(figure, axes, layers: Layers, top: float | None, columns: str) -> None:
    """Layers x heads or experts, each square with its number."""
    values = np.stack(list(layers.values()))
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=top)
    middle = image.norm.vmax / 2
    if values.size <= 256:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < middle else "black"
            axes.text(
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=color
            )
    axes.set(xlabel=columns, ylabel="layer")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), list(layers))
    figure.colorbar(image)


def _bars(figure, axes, layers: Layers, _) -> None:
    axes.bar([str(i) for i in layers], [float(x) for x in layers.values()], color="#4477aa")
    axes.set(xlabel="after layer", yscale="log")
    axes.grid(alpha=0.25, axis="y")


def _entropy(figure, axes, layers: Layers, _) -> None:
    for i, by_position in layers.items():
        axes.plot(np.arange(1, len(by_position) + 1), by_position, lw=1.2, label=f"layer {i}")
    seen = np.arange(1, len(by_position) + 1)
    axes.plot(seen, np.log(seen), color="#555555", ls="--", lw=1, label="even attention")
    axes.set(xlabel="tokens seen", ylabel="nats", xscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _gates(figure, axes, layers: Layers, probes: Probes) -> None:
    for i, shares in layers.items():
        edges, mean = probes["gate_edges"][i], float(probes["gate_mean"][i])
        axes.stairs(shares / np.diff(edges), edges, lw=1.3, label=f"layer {i}, mean {mean:.2f}")
    axes.set(xlabel="score", ylabel="density", yscale="log", ylim=(1e-3, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _half_lives(figure, axes, layers: Layers, _) -> None:
    for i, tokens in layers.items():
        axes.plot(np.linspace(0, 1, len(tokens)), np.sort(tokens), lw=1.3, label=f"layer {i}")
    axes.set(xlabel="share of channels", ylabel="tokens", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


_DRAW = {
    "first_token_fraction": lambda f, a, layers, _: _grid(f, a, layers, 1.0, "head"),
    "attention_entropy": _entropy,
    "gate_histogram": _gates,
    "max_activation": _bars,
    "kurtosis": _bars,
    "effective_rank": lambda f, a, layers, _: _grid(f, a, layers, None, "head"),
    "half_life": _half_lives,
    "expert_load": lambda f, a, layers, _: _grid(f, a, layers, None, "expert"),
}
