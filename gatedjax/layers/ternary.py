"""Ternary matrices (BitNet b1.58, arXiv 2402.17764): -1, 0 or 1 times the mean magnitude."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Of the mean magnitude: a matrix of zeros stays one.
LEAST_SCALE = 1e-5


def ternary(
    matrix: Float[Array, "..."],
    stacked: int = 0,
) -> Float[Array, "..."]:
    """`s clip(round(W / s), -1, 1)`, s the mean magnitude; the gradient is that of W itself.

    Args:
      matrix: of any number of axes.
      stacked: how many leading axes count matrices, each of which has an s of its own.
    """
    axes = tuple(range(stacked, matrix.ndim))
    scale = jnp.mean(jnp.abs(matrix), axis=axes, keepdims=True)
    scale = jnp.maximum(scale, LEAST_SCALE)
    rounded = scale * jnp.clip(jnp.round(matrix / scale), -1, 1)
    # Straight through: the difference is a constant.
    return matrix + jax.lax.stop_gradient(rounded - matrix)
