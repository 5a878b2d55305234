"""A picture of a run's loss from its `metrics.jsonl`.

python -c "from gatedjax.reporting.curves import plot_run; plot_run('runs/tiny', {'gzip -9': 1.81})"
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gatedjax.errors import InputError
from gatedjax.reporting.figure import moving_mean, new_figure
from gatedjax.reporting.writers import METRICS_FILE, read_records

Curve = tuple[np.ndarray, np.ndarray]  # steps, bits per byte

_TRAIN, _VALIDATION, _REFERENCE = (
    "#4477aa",
    "#cc3311",
    "#555555",
)  # told apart by readers with any color vision


def plot_run(run_dir: str | os.PathLike, references: Mapping[str, float] | None = None) -> Path:
    """Writes `curves.png` into the run directory: training and validation loss in bits per byte, by
    step.

    Args:
      run_dir: a run's directory, with its metrics file.
      references: name -> bits per byte of horizontal lines, such as what gzip -9 makes of the
        validation text.

    Raises:
      InputError: no metrics, none of them a loss in bits per byte, no right to write, or matplotlib
        is not installed.
    """
    path = Path(run_dir) / METRICS_FILE
    records = read_records(path)
    curves = {split: loss_curve(records, split) for split in ("train", "validation")}
    if not any(len(steps) for steps, _ in curves.values()):
        raise InputError(f"{path}: holds no bits_per_byte to draw")
    picture = Path(run_dir) / "curves.png"
    try:
        draw(curves, references or {}, Path(run_dir).resolve().name).savefig(picture)
    except OSError as e:
        raise InputError(f"could not write {picture}: {e.strerror}") from e
    return picture


def loss_curve(records: list[dict[str, Any]], split: str) -> Curve:
    """Steps and bits per byte of one split; records without a finite value are left out."""
    points = [
        (r["step"], r["bits_per_byte"])
        for r in records
        if r.get("split") == split and r.get("bits_per_byte")
    ]
    steps, bits = np.array(points, np.float64).reshape(-1, 2).T
    return steps, bits


def draw(curves: Mapping[str, Curve], references: Mapping[str, float], title: str) -> Any:
    """The matplotlib figure."""
    figure, axes = new_figure((8, 4.5))
    _draw_training(axes, *curves["train"])
    steps, bits = curves["validation"]
    if len(steps):
        axes.plot(
            steps,
            bits,
            "o-",
            color=_VALIDATION,
            ms=4,
            lw=1.4,
            label=f"validation (last {bits[-1]:.3f})",
        )
    for name, value in references.items():
        axes.axhline(value, color=_REFERENCE, ls="--", lw=1, zorder=1)
        # In the margin, where no curve goes.
        place = {
            "xy": (1, value),
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
        }
        axes.annotate(
            f"{name}: {value:.2f}",
            xytext=(4, 0),
            va="center",
            color=_REFERENCE,
            fontsize=9,
            **place,
        )
    axes.set(
        xlabel="optimizer step", ylabel="loss (bits per byte, log scale)", title=title, yscale="log"
    )
    axes.set_xlim(left=0)
    ticks = [0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12]
    axes.set_yticks(
        ticks, [f"{t:g}" for t in ticks]
    )  # the interesting part is far below where training starts
    axes.set_yticks([], minor=True)
    axes.set_ylim(*_limits(curves, references))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _limits(curves: Mapping[str, Curve], references: Mapping[str, float]) -> tuple[float, float]:
    shown = np.concatenate([bits for _, bits in curves.values()] + [list(references.values())])
    return shown.min() / 1.08, shown.max() * 1.08


def _draw_training(axes: Any, steps: np.ndarray, bits: np.ndarray) -> None:
    if not len(steps):
        return
    if len(steps) < 100:
        axes.plot(steps, bits, color=_TRAIN, lw=1.4, label="training")
        return
    window = len(steps) // 50 // 2 * 2 + 1
    half = window // 2
    means = moving_mean(bits, window)
    axes.plot(steps, bits, color=_TRAIN, lw=0.6, alpha=0.35)
    axes.plot(
        steps[half:-half], means, color=_TRAIN, lw=1.4, label=f"training (mean of {window} records)"
    )
