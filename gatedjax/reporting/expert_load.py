"""A picture of how experts were loaded over a run.

    python -m gatedjax.reporting.expert_load --workdir=runs/tiny_moe

expert_load.png: the load of every expert over the steps, a panel for each layer, from the run's
metrics.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, Float64, Int, Int64

from gatedjax.errors import InputError
from gatedjax.paths import expand
from gatedjax.reporting.console import say
from gatedjax.reporting.figure import empty_figure, save
from gatedjax.reporting.writers import METRICS_FILE, read_records
from gatedjax.runtime import cli

PANELS = 8  # layers shown, evenly spaced, if there are more

# The colors' range: loads outside of it look like its ends.
_LOWEST = 0.25
_HIGHEST = 4.0
_TICKS = {0.25: "≤ ¼", 0.5: "½", 1: "1", 2: "2", 4: "≥ 4"}


def plot_expert_load(run_dir: str | os.PathLike) -> Path:
    """Writes `expert_load.png` into the run directory.

    Raises:
      InputError: no metrics, no expert loads in them, no right to write, or matplotlib is not
        installed.
    """
    run_dir = Path(run_dir)
    metrics_file = run_dir / METRICS_FILE
    steps, load = expert_loads(read_records(metrics_file))
    if not len(steps):
        raise InputError(
            f"{metrics_file}: holds no expert_load to draw; the model has no sparse layers"
        )
    figure = draw_expert_load(steps, load, title=run_dir.resolve().name)
    picture = run_dir / "expert_load.png"
    save(figure, picture)
    return picture


def expert_loads(
    records: Sequence[Mapping[str, Any]],
) -> tuple[Int64[np.ndarray, "N"], Float64[np.ndarray, "..."]]:
    """Steps [N], and loads [N, layers, experts]: 1 is an even load.

    NaN where a layer has fewer experts than the others.
    """
    steps = []
    loads = []
    for record in records:
        if record.get("split") == "train" and "expert_load" in record:
            steps.append(record["step"])
            loads.append(record["expert_load"])
    # None becomes NaN.
    return np.array(steps, np.int64), np.array(loads, np.float64)


def draw_expert_load(
    steps: Int[np.ndarray, "N"], load: Float[np.ndarray, "N layers experts"], title: str
) -> Any:
    """The matplotlib figure: steps to the right, experts upwards.

    White is an even load, blue less, red more.
    """
    layers = _layers_shown(load.shape[1])
    figure = empty_figure((8, 1.0 + 1.3 * len(layers)), dpi=100)
    panels = figure.subplots(
        len(layers),
        1,
        sharex=True,
        squeeze=False,
    )[:, 0]
    image = None
    for panel, layer in zip(panels, layers):
        image = _draw_layer(panel, steps, load[:, layer], layer)
    panels[-1].set_xlabel("optimizer step")
    bar = figure.colorbar(
        image,
        ax=list(panels),
        shrink=0.8,
        label="load / even load",
    )
    bar.set_ticks(list(_TICKS), labels=list(_TICKS.values()))
    bar.set_ticks([], minor=True)
    figure.suptitle(f"{title}: expert load")
    return figure


def _draw_layer(
    panel: Any,
    steps: Int[np.ndarray, "N"],
    load: Float[np.ndarray, "N experts"],
    layer: int,
) -> Any:
    """One panel; returns its image, for the color bar."""
    from matplotlib.colors import LogNorm

    # The columns past this layer's own experts are NaN.
    num_experts = int(np.isfinite(load[-1]).sum())
    shown = np.clip(load[:, :num_experts].T, _LOWEST, _HIGHEST)
    image = panel.pcolormesh(
        _edges(steps),
        np.arange(num_experts + 1) - 0.5,
        shown,
        norm=LogNorm(_LOWEST, _HIGHEST),
        cmap="RdBu_r",
        rasterized=True,
    )
    largest = float(np.nanmax(load[-1]))
    panel.set_ylabel(f"sparse layer {layer}", fontsize=9)
    panel.set_title(
        f"at the end, largest / mean {largest:.2f}",
        fontsize=8,
        loc="right",
        pad=2,
    )
    return image


def _layers_shown(num_layers: int) -> list[int]:
    """At most PANELS layers, evenly spaced, the first and the last among them."""
    places = np.linspace(0, num_layers - 1, min(PANELS, num_layers))
    return np.unique(places.round().astype(int)).tolist()


def _edges(steps: Int[np.ndarray, "N"]) -> Float64[np.ndarray, "edges"]:
    """Where each record's column begins and ends: a record tells of the steps around it."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0]], middle, [steps[-1]]])


def run() -> None:
    """The command: defines its flags, then draws what the run directory has the records for."""
    workdir = flags.DEFINE_string("workdir", None, "Run directory, as --workdir of train.py.")

    def main(_: Sequence[str]) -> None:
        picture = plot_expert_load(expand(cli.required(workdir), "--workdir"))
        say(f"expert load: {picture}")

    cli.run(main)


if __name__ == "__main__":
    run()
