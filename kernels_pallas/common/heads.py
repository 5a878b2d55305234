"""Grouped heads, where a backend has no form that shares them."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped


def repeat_heads(
    x: Shaped[Array, "*rows heads D"],
    num_heads: int,
) -> Shaped[Array, "*rows H D"]:
    """Head h of `num_heads` is head h // group of x."""
    return jnp.repeat(x, num_heads // x.shape[-2], axis=-2)
