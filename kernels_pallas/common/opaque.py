"""What XLA must not know of an array: that all its columns are the same.

XLA on CPUs (seen with jaxlib 0.11.2 and 0.12.0.1) fuses a matrix product with a reduction beside it
into one "YNN fusion". If the right factor of that product is a smaller array, broadcast along its
last axis, then the fusion reads the smaller array as if it were the larger one: other memory,
results that differ from run to run, NaN. Wrong for [256, 64] arrays:

    jax.jit(lambda a, b: a @ jnp.zeros((64, 64)) + jnp.sum(b * b, -1, keepdims=True))

An empty state is such a broadcast, and so is the cotangent of a sum.
docs/notes/xla_cpu_ynn_broadcast.md has more.
"""

import jax


def opaque[Tree](arrays: Tree) -> Tree:
    """The same pytree, materialized before what follows: no fusion sees how it was made."""
    return jax.lax.optimization_barrier(arrays)
