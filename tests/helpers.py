"""What tests share: the one error measure, and the mark of cases that `make test` leaves out."""

import jax
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


def check_gradients(formula, given, gradient) -> None:
    """Gradients of a number, leaf by leaf along one direction each, against its differences.

    Args:
      formula: the number of a tree of float64 arrays, by numpy.
      given: the tree.
      gradient: what autodiff found.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda a: np.asarray(a, np.float64), given))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    for i, found in enumerate(jax.tree.leaves(gradient)):
        direction = np.random.default_rng(i).normal(size=leaves[i].shape)

        def moved(step, i=i, direction=direction):
            changed = [*leaves]
            changed[i] = leaves[i] + step * direction
            return formula(jax.tree.unflatten(tree, changed))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        found = np.asarray(found, np.float64)
        size = np.sqrt((found**2).sum() * direction.size)
        error = abs((found * direction).sum() - slope)
        assert error < 2e-5 * size + 1e-6, names[i]
