"""Values born inside `shard_map(check_vma=True)`, such as a scan's zero carry, must vary like the data they meet."""

import jax
from jax import Array


def varying_axes(*arrays: Array) -> frozenset[str]:
    """The manual mesh axes over which any of `arrays` varies; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying_like(x: Array, *arrays: Array) -> Array:
    """`x`, marked as varying over every manual mesh axis that any of `arrays` varies over. The values do not change."""
    missing = varying_axes(*arrays) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
