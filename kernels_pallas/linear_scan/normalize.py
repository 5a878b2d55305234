"""`linear_scan(normalize=True)`: a column of ones in v, and the division by what it accumulates."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

DENOMINATOR_FLOOR = 1e-6


def append_ones(v: Float[Array, "*rows V"]) -> Float[Array, "*rows V+1"]:
    """Adds a column of ones to v, so that the last column of o is the sum of a query's weights."""
    ones = jnp.ones_like(v[..., :1])
    return jnp.concatenate([v, ones], axis=-1)


def divide_by_last(o: Float[Array, "*rows Vs"]) -> Float[Array, "*rows Vs-1"]:
    """Divides the columns of o by its last one, the sum of weights, kept away from 0."""
    return o[..., :-1] / away_from_zero(o[..., -1:])


def away_from_zero(denominator: Float[Array, "..."]) -> Float[Array, "..."]:
    """The denominator with its sign, at least 1e-6 from 0: weights q k may be negative."""
    size = jnp.maximum(jnp.abs(denominator), DENOMINATOR_FLOOR)
    return jnp.where(denominator < 0, -size, size)
