"""MNIST-1D (arXiv 2011.14439): signals of 40 samples, made from a template for each digit.

The same numbers as `make_dataset` of the package mnist1d at its defaults: templates are padded,
stretched, shifted, put into noise and sheared. The order of the draws is part of the data set.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

SAMPLES = 5000
# The first ones, four fifths, are for training.
TRAIN_SAMPLES = 4000
SEED = 42

_PADDING = (36, 60)
_LENGTH = 40
_LARGEST_SHIFT = 48
_SCALE = 0.4
_SHEAR = 0.75
_NOISE = 0.02
_SMOOTH_NOISE = 0.25
_SMOOTHING = 2
# Tells the template from what it is padded with.
_NOT_ZERO = 1e-8

# fmt: off
_TEMPLATES = np.array([
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
    [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
    [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
    [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
    [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
])
# fmt: on


class Signals(NamedTuple):
    """The signals, of mean 0 and standard deviation 1 together, and their digits."""

    signals: Float64[np.ndarray, "samples 40"]
    digits: Int64[np.ndarray, " samples"]


def make_signals(samples: int = SAMPLES, seed: int = SEED) -> Signals:
    """The data set, as many signals of each digit."""
    # The older generator of numpy, whose draws those of the package are.
    rng = np.random.RandomState(seed)
    templates = (_TEMPLATES - _TEMPLATES.mean(1, keepdims=True)) / _TEMPLATES.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6.0
    of_each = samples // len(templates)
    digits = np.repeat(np.arange(len(templates)), of_each)
    signals = np.stack([_signal(rng, templates[digit]) for digit in digits])
    order = rng.permutation(len(digits))
    signals = signals[order]
    return Signals((signals - signals.mean()) / signals.std(), digits[order])


def _signal(
    rng: np.random.RandomState,
    template: Float64[np.ndarray, "12"],
) -> Float64[np.ndarray, "40"]:
    """A signal of this template."""
    # Here: it takes a fifth of a second to import, and text needs no scipy.
    from scipy.ndimage import gaussian_filter

    low, high = _PADDING
    padding = low + int(rng.rand() * (high - low + 1))
    signal = np.concatenate([template + _NOT_ZERO, np.zeros(padding)])
    signal = _stretched(signal, len(template) + high)
    signal = signal * (1 + _SCALE * (rng.rand() - 0.5))
    signal = np.roll(signal, rng.choice(_LARGEST_SHIFT))
    is_template = signal != 0
    smooth = gaussian_filter(_SMOOTH_NOISE * rng.randn(len(signal)), _SMOOTHING)
    signal = np.where(is_template, signal, smooth)
    signal = signal + _NOISE * rng.randn(len(signal))
    slope = _SHEAR * (rng.rand() - 0.5)
    signal = signal - slope * np.linspace(-0.5, 0.5, len(signal))
    return _stretched(signal, _LENGTH)


def _stretched(
    signal: Float64[np.ndarray, " before"],
    length: int,
) -> Float64[np.ndarray, " after"]:
    """The signal at as many places from its first sample to its last, between samples linear."""
    places = np.linspace(0, 1, length)
    return np.interp(places, np.linspace(0, 1, len(signal)), signal)
