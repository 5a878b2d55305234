"""A picture of a run's loss from its `metrics.jsonl`: bits per byte, or nats of an encoder.

python -c "from gatedjax.reporting.curves import plot_run; plot_run('runs/tiny', {'gzip -9': 1.81})"
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from gatedjax.errors import InputError
from gatedjax.reporting.figure import moving_mean, new_figure, save
from gatedjax.reporting.writers import METRICS_FILE, read_records

# Steps and losses.
Curve = tuple[Float64[np.ndarray, "N"], Float64[np.ndarray, "N"]]

# Told apart by readers with any color vision.
_TRAIN_COLOR = "#4477aa"
_VALIDATION_COLOR = "#cc3311"
_REFERENCE_COLOR = "#555555"

# Of the vertical axis: the interesting part is far below where training starts.
_TICKS = [0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12]

# Shorter curves are drawn as they are, longer ones as a moving mean over the records.
_SMOOTHED_FROM = 100


def plot_run(run_dir: str | os.PathLike, references: Mapping[str, float] | None = None) -> Path:
    """Writes `curves.png` into the run directory: loss by step, in bits per byte if it is of text.

    Args:
      run_dir: a run's directory, with its metrics file.
      references: name -> bits per byte of horizontal lines, such as what gzip -9 makes of the
        validation text.

    Returns:
      The picture's path.

    Raises:
      InputError: no metrics, none of them a loss, no right to write, or matplotlib is not
        installed.
    """
    run_dir = Path(run_dir)
    metrics_file = run_dir / METRICS_FILE
    records = read_records(metrics_file)
    quantity = "bits_per_byte"
    has_bits = any("bits_per_byte" in record for record in records)
    if not has_bits and any("loss" in record for record in records):
        quantity = "loss"
    curves = {split: loss_curve(records, split, quantity) for split in ("train", "validation")}
    if not any(len(steps) for steps, _ in curves.values()):
        raise InputError(f"{metrics_file}: holds no {quantity} to draw")
    picture = run_dir / "curves.png"
    figure = draw(curves, references or {}, run_dir.resolve().name, quantity)
    save(figure, picture)
    return picture


def loss_curve(
    records: Sequence[Mapping[str, Any]],
    split: str,
    quantity: str = "bits_per_byte",
) -> Curve:
    """Steps and losses of one split; records without a finite value are left out."""
    steps = []
    bits = []
    for record in records:
        # A value that was not finite is null in the file.
        if record.get("split") == split and record.get(quantity):
            steps.append(record["step"])
            bits.append(record[quantity])
    return np.array(steps, np.float64), np.array(bits, np.float64)


def draw(
    curves: Mapping[str, Curve],
    references: Mapping[str, float],
    title: str,
    quantity: str = "bits_per_byte",
) -> Any:
    """The matplotlib figure.

    Args:
      curves: by split.
      references: horizontal lines by name.
      title: of the picture.
      quantity: which loss it is.
    """
    figure, axes = new_figure((8, 4.5))
    steps, bits = curves["train"]
    if len(steps):
        _draw_training(axes, steps, bits)
    steps, bits = curves["validation"]
    if len(steps):
        _draw_validation(axes, steps, bits)
    for name, value in references.items():
        _draw_reference(axes, name, value)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    if quantity == "bits_per_byte":
        axes.set_ylabel("loss (bits per byte, log scale)")
        axes.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.set_yticks([], minor=True)
    else:
        axes.set_ylabel("loss (nats, log scale)")
    bottom, top = _limits(curves, references)
    axes.set_ylim(bottom, top)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _limits(curves: Mapping[str, Curve], references: Mapping[str, float]) -> tuple[float, float]:
    """Of the vertical axis: all that is shown, and a margin of 8 %."""
    shown = [bits for _, bits in curves.values()]
    shown.append(np.array(list(references.values()), np.float64))
    values = np.concatenate(shown)
    return values.min() / 1.08, values.max() * 1.08


def _draw_training(
    axes: Any, steps: Float64[np.ndarray, "N"], bits: Float64[np.ndarray, "N"]
) -> None:
    if len(steps) < _SMOOTHED_FROM:
        axes.plot(
            steps,
            bits,
            color=_TRAIN_COLOR,
            lw=1.4,
            label="training",
        )
        return
    # About a fiftieth of the records, an odd number of them.
    half = len(steps) // 100
    window = 2 * half + 1
    means = moving_mean(bits, window)
    axes.plot(
        steps,
        bits,
        color=_TRAIN_COLOR,
        lw=0.6,
        alpha=0.35,
    )
    axes.plot(
        steps[half:-half],
        means,
        color=_TRAIN_COLOR,
        lw=1.4,
        label=f"training (mean of {window} records)",
    )


def _draw_validation(
    axes: Any, steps: Float64[np.ndarray, "N"], bits: Float64[np.ndarray, "N"]
) -> None:
    axes.plot(
        steps,
        bits,
        "o-",
        color=_VALIDATION_COLOR,
        ms=4,
        lw=1.4,
        label=f"validation (last {bits[-1]:.3f})",
    )


def _draw_reference(axes: Any, name: str, value: float) -> None:
    axes.axhline(
        value,
        color=_REFERENCE_COLOR,
        ls="--",
        lw=1,
        zorder=1,
    )
    # The label is in the right margin, where no curve goes.
    axes.annotate(
        f"{name}: {value:.2f}",
        xy=(1, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=_REFERENCE_COLOR,
        fontsize=9,
    )
