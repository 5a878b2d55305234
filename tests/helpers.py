"""What tests share: the one error measure, and the mark of cases that `make test` leaves out."""

import numpy as np
import pytest


def slow(*values):
    """A parametrized case that a neighbor of it also covers; `make test-all` runs it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def rel_rms(actual, expected) -> float:
    """RMS(actual - expected) / RMS(expected), in float64. The measure of every numerical test
    here.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), "non-finite values"
    scale = np.sqrt(np.mean(expected**2)) if expected.size else 0.0
    error = np.sqrt(np.mean((actual - expected) ** 2)) if expected.size else 0.0
    return float(error / scale) if scale > 0 else float(error)
