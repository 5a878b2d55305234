"""What XLA on a CPU must not know of an array: that all its columns are the same.

XLA on CPUs (seen with jaxlib 0.11.2 and 0.12.0.1) fuses a matrix product with a reduction beside
it into one "YNN fusion". If the right operand of that product is a smaller array, broadcast along
its last axis, then the fusion reads the smaller array as if it were the larger one: memory of
others, results that differ from run to run, NaN.

    jax.jit(lambda a, b: a @ jnp.ones((64, 64)) + jnp.sum(b * b, -1, keepdims=True))

is wrong for arrays [256, 64]. An empty state is such a broadcast, and so is the cotangent of a sum.
docs/notes/xla_cpu_ynn_broadcast.md has the details.
"""

import jax

from kernels_pallas.common.device import target_platform


def opaque[Arrays](arrays: Arrays) -> Arrays:
    """The same values, behind an optimization barrier where a CPU computes.

    Args:
      arrays: an array or a pytree of them; None leaves stay.

    Returns:
      `arrays`, untouched for other platforms: there a barrier would only cost fusions.
    """
    if target_platform() != "cpu":
        return arrays
    return jax.lax.optimization_barrier(arrays)
