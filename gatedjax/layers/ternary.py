"""Ternary matrices and inputs of 8 bits (BitNet b1.58, arXiv 2402.17764)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Of the magnitudes that numbers are divided by: zeros stay zeros.
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


def eight_bits(x: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """`s clip(round(x / s), -128, 127)`, s = max |x| / 127 of a token; the gradient is that of x.

    Args:
      x: the input of a matrix.
      axes: how many of the last axes are a token's channels.
    """
    wide = x.astype(jnp.float32)
    channels = tuple(range(x.ndim - axes, x.ndim))
    largest = jnp.max(jnp.abs(wide), axis=channels, keepdims=True)
    scale = jnp.maximum(largest, LEAST_SCALE) / 127
    rounded = scale * jnp.clip(jnp.round(wide / scale), -128, 127)
    # Straight through, as above.
    return (wide + jax.lax.stop_gradient(rounded - wide)).astype(x.dtype)
