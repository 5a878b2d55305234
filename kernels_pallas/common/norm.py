"""The norm that layers and ops share."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.common.precision import accumulator_dtype


def rms_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    eps: float,
) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (or float64).

    Returns x's dtype (arXiv 1910.07467).
    """
    dtype = accumulator_dtype(x.dtype)
    wide = x.astype(dtype)
    # Not centered: RMSNorm leaves the mean alone.
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale.astype(dtype), range(x.ndim - 1))
    return (wide * lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)
