"""Arrays padded to the sizes that kernels take, and the arithmetic of such sizes."""

import jax.numpy as jnp
from jax import Array


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`."""
    # Rounding down the negative number rounds up.
    return -(-size // multiple) * multiple


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def padded(
    x: Array,
    axis: int,
    size: int,
    mode: str = "constant",
) -> Array:
    """`x` with `axis` padded to `size`: with zeros, or as `mode` of `jnp.pad` says."""
    # No operation at all where nothing is missing, so that no copy is made.
    missing = size - x.shape[axis]
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, mode=mode)


def padded_to_multiples(x: Array, *multiples: int) -> Array:
    """`x` padded with zeros to multiples of these sizes, one for each axis."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples)]
    return jnp.pad(x, widths)
