"""Schedules refined from the gradient norms of an earlier run (arXiv 2310.07831).

With weights w_t = 1 / |g_t|^2 (SGD), or 1 / |g_t|_1 (Adam, where the run recorded that norm), the
rate of step t is proportional to w_t sum_(p > t) w_p: large where gradients are small, and falling
to 0 at the last step. Constant norms give linear decay; a warm-up comes by itself where gradients
are large at first.
"""

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gatedjax.errors import InputError, require
from gatedjax.paths import expand

# Half the width of the median filter, as a part of the run.
SMOOTHING = 0.1
# Of a run directory.
METRICS_FILE = "metrics.jsonl"
# A line of it has one of them, or both.
L1_NORM = "grad_norm_l1"
L2_NORM = "grad_norm"


def refined(
    norms: Float[np.ndarray, " T"] | Sequence[float],
    power: float,
    smoothing: float = SMOOTHING,
) -> Float[np.ndarray, " T"]:
    """The factor of every step's rate, from 0 to 1.

    Args:
      norms: of the gradients of each step, above 0.
      power: 2 for SGD and the Euclidean norm, 1 for Adam and the sum of absolute values.
      smoothing: the median filter looks at this part of the run to either side.

    Raises:
      InputError: a norm that is 0, negative or no number.
    """
    norms = np.asarray(norms, np.float64)
    is_good = np.isfinite(norms) & (norms > 0)
    require(bool(np.all(is_good)), "norms", norms[~is_good][:3].tolist(), "numbers above 0")
    weights = _smoothed(norms, smoothing) ** -power
    # Of the steps after each: the last has none.
    after = np.cumsum(weights[::-1])[::-1] - weights
    after[-1] = 0.0
    factors = weights * np.maximum(after, 0.0)
    largest = np.max(factors)
    return factors / largest if largest > 0 else np.ones_like(factors)


def _smoothed(norms: Float[np.ndarray, " T"], smoothing: float) -> Float[np.ndarray, " T"]:
    """Running medians; ends are mirrored."""
    half = min(int(smoothing * len(norms) / 2), len(norms) - 1)
    if half == 0:
        return norms
    padded = np.pad(norms, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return np.median(windows, axis=1)


def refined_factors(path: str, steps: int) -> Float[np.ndarray, " steps"]:
    """The factors of a run of `steps`, from the metrics of an earlier run of any length.

    Args:
      path: a run directory, or its metrics.jsonl.
      steps: of the new run.

    Raises:
      InputError: no such file, or one without norms of gradients.
    """
    key = "config.optim.refined_from"
    file = expand(path, key)
    if file.is_dir():
        file = file / METRICS_FILE
    require(file.is_file(), key, path, f"a run directory with {METRICS_FILE}")
    at, norms, power = _recorded(file.read_text(encoding="utf-8"), key, path)
    # Steps are compared by the part of the run that is done before them.
    places = (np.arange(steps) + 0.5) / steps
    recorded = (at - 0.5) / at[-1]
    of_steps = np.interp(places, recorded, norms)
    return refined(of_steps, power)


def _recorded(text: str, key: str, path: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(steps, norms, power) of the lines that training wrote."""
    lines = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{key}: got {path}, expected lines of JSON") from None
        # A run that went on from a checkpoint has written some steps twice: the later ones count.
        if L2_NORM in record:
            lines[record["step"]] = record
    steps = sorted(lines)
    require(len(steps) >= 2, key, path, f"a run with two records of {L2_NORM} at least")
    has_l1 = all(L1_NORM in lines[step] for step in steps)
    norm = L1_NORM if has_l1 else L2_NORM
    norms = np.array([lines[step][norm] for step in steps], np.float64)
    return np.array(steps, np.float64), norms, 1.0 if has_l1 else 2.0
