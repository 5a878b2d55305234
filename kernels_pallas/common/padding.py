"""Arrays filled up to the sizes that kernels want."""

import jax.numpy as jnp
from jax import Array


def padded(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    """`x` with `axis` filled up to `size`: with zeros, or as `mode` of `jnp.pad` says."""
    missing = size - x.shape[axis]
    return (
        x
        if missing == 0
        else jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)], mode=mode)
    )


def padded_to_multiples(x: Array, *multiples: int) -> Array:
    """`x` with zeros up to multiples of these sizes, one for each axis."""
    return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, multiples)])
