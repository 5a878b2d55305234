"""Rules over optimizers: gradients across the weights, rates and decays by width, rates by batch.

perpGrad (arXiv 2501.04697): a gradient without its part along the weights, which would only scale
them. Width (2510.15262): rates of matrices fall as 1 / width, their decay rises as its root, and
vectors (tables, norms, biases) keep their rate and do not decay; the largest singular values, which
go as sqrt(rate / decay) width^0.75, then match. Batch (2006.09092): rates grow as the batch under
SGD, as its root under Adam and its kin.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, PyTree

# Optimizers whose step is as long as the gradient.
LIKE_SGD = ("am_msgd",)


def perpendicular(stacked: PyTree) -> optax.GradientTransformation:
    """Gradients less their part along the weights, tensor by tensor.

    Args:
      stacked: for each parameter the axes that count tensors.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(across, updates, params, stacked), state

    return optax.GradientTransformation(optax.identity().init, update)


def across(
    grad: Float[Array, "..."],
    weights: Float[Array, "..."],
    stacked: tuple[int, ...] = (),
) -> Float[Array, "..."]:
    """g - (w g / w w) w; g where w is 0."""
    axes = tuple(axis for axis in range(grad.ndim) if axis not in stacked)
    along = jnp.sum(weights * grad, axis=axes, keepdims=True)
    square = jnp.sum(weights**2, axis=axes, keepdims=True)
    return grad - along / jnp.where(square == 0, 1.0, square) * weights


def width_factors(width: int, base_width: int) -> tuple[float, float]:
    """What the rate and the weight decay of matrices are multiplied by, at `width`."""
    ratio = width / base_width
    return 1.0 / ratio, math.sqrt(ratio)


def batch_factor(name: str, batch_size: int, base_batch_size: int) -> float:
    """What the rate is multiplied by, at `batch_size`.

    Args:
      name: of the optimizer (`OptimConfig.name`).
      batch_size: rows of a step.
      base_batch_size: rows of the step that the rate is for.
    """
    ratio = batch_size / base_batch_size
    return ratio if name in LIKE_SGD else math.sqrt(ratio)


def top_singular_values(
    matrices: Float[np.ndarray, "N I O"],
) -> Float[np.ndarray, " N"]:
    """The largest singular value of each matrix, in float64."""
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)[:, 0]


def width_probe(
    matrices: Sequence[Float[np.ndarray, "N I O"]],
    rate: float,
    decay: float,
    width: int,
) -> float:
    """The mean of sigma_max / (sqrt(rate / decay) width^0.75): the same at all widths (2510.15262).

    Args:
      matrices: of a trained model.
      rate: of its matrices.
      decay: likewise.
      width: of the model.
    """
    values = np.concatenate([top_singular_values(x) for x in matrices])
    return float(np.mean(values) / (math.sqrt(rate / decay) * width**0.75))
