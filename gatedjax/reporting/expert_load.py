"""A picture of how experts were loaded over a run.

    python -m gatedjax.reporting.expert_load --workdir=runs/tiny_moe

expert_load.png: how the load of every expert went over the steps, a panel for each layer, from the
run's metrics.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from gatedjax.errors import InputError
from gatedjax.reporting.console import say
from gatedjax.reporting.writers import METRICS_FILE, read_records
from gatedjax.runtime import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, as --workdir of train.py.")
PANELS = 8  # layers shown, evenly spaced, if there are more


def main(_) -> None:
    """Draws all that the run directory has the records for."""
    say(f"expert load: {plot_expert_load(cli.required(_WORKDIR))}")


def plot_expert_load(run_dir: str | os.PathLike) -> Path:
    """Writes `expert_load.png` into the run directory.

    Raises:
      InputError: no metrics, no expert loads in them, no right to write, or matplotlib is not
        installed.
    """
    path = Path(run_dir) / METRICS_FILE
    steps, load = expert_loads(read_records(path))
    if not len(steps):
        raise InputError(f"{path}: holds no expert_load to draw; the model has no sparse layers")
    picture = Path(run_dir) / "expert_load.png"
    figure = draw_expert_load(steps, load, Path(run_dir).resolve().name)
    try:
        figure.savefig(picture)
    except OSError as e:
        raise InputError(f"could not write {picture}: {e.strerror}") from e
    return picture


def expert_loads(records: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N], and loads [N, layers, experts] as shares of an even load; NaN where a layer has
    fewer experts.
    """
    found = [
        (r["step"], r["expert_load"])
        for r in records
        if r.get("split") == "train" and "expert_load" in r
    ]
    steps, loads = zip(*found) if found else ((), ())
    return np.array(steps, np.int64), np.array(loads, np.float64)  # None becomes NaN


def draw_expert_load(steps: np.ndarray, load: np.ndarray, title: str) -> Any:
    """The matplotlib figure: steps to the right, experts upwards; white is an even load, blue less,
    red more.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("pictures need matplotlib: pip install gatedjax[plots]") from e
    layers = np.unique(
        np.linspace(0, load.shape[1] - 1, min(PANELS, load.shape[1])).round().astype(int)
    )
    figure = Figure(figsize=(8, 1.0 + 1.3 * len(layers)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges(steps)
    for panel, layer in zip(panels, layers):
        experts = int(np.isfinite(load[-1, layer]).sum())
        shown = np.clip(load[:, layer, :experts].T, 0.25, 4.0)
        norm = LogNorm(0.25, 4.0)
        image = panel.pcolormesh(
            edges, np.arange(experts + 1) - 0.5, shown, norm=norm, cmap="RdBu_r", rasterized=True
        )
        worst = float(np.nanmax(load[-1, layer]))
        panel.set_ylabel(f"sparse layer {layer}", fontsize=9)
        panel.set_title(f"at the end, largest / mean {worst:.2f}", fontsize=8, loc="right", pad=2)
    panels[-1].set_xlabel("optimizer step")
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8, label="load / even load")
    ticks = [0.25, 0.5, 1, 2, 4]
    bar.set_ticks(ticks, labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.set_ticks([], minor=True)
    figure.suptitle(f"{title}: expert load")
    return figure


def _edges(steps: np.ndarray) -> np.ndarray:
    """Where each record's column begins and ends: a record tells of the steps around it."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0]], middle, [steps[-1]]])


if __name__ == "__main__":
    cli.run(main)
