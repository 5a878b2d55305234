"""Gradients against differences of a function in float64."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def assert_equals_differences(
    loss: Callable[[Any], float],
    given: Any,
    gradient: Any,
    bound: float = 2e-5,
) -> None:
    """Every leaf of `gradient` along one direction, by central differences of `loss`.

    Args:
      loss: of a tree like `given`, of float64 arrays.
      given: where the gradient was taken.
      gradient: of every leaf.
      bound: of an error, over the root of the sum of squares that chance would give.
    """
    at = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    leaves, tree = jax.tree.flatten(at)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(given)]
    for i, found in enumerate(jax.tree.leaves(gradient)):
        found = np.asarray(found, np.float64)
        direction = np.random.default_rng(i).normal(size=found.shape)

        def moved(step, i=i, direction=direction):
            changed = [*leaves]
            changed[i] = leaves[i] + step * direction
            return loss(jax.tree.unflatten(tree, changed))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        size = np.sqrt((found**2).sum() * direction.size)
        error = abs((found * direction).sum() - slope)
        assert error < bound * size + 1e-6, names[i]
