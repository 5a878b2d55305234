"""What the GPU kernels of several ops share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def moved(arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
    """Bytes of arrays that are read or written once."""
    return sum(a.size * jnp.dtype(a.dtype).itemsize for a in arrays)
