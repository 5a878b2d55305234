"""Queries and keys of length one, as the layers of the delta rule use them."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# Under the root, so that an all-zero key stays zero and its gradient finite.
L2_EPSILON = 1e-6


def l2_normalized(x: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """x / sqrt(x.x + 1e-6), in x's dtype."""
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(squares + L2_EPSILON)
