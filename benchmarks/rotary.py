"""rotary compiled for TPUs that are not there: our kernels beside the same by plain XLA.

    python benchmarks/rotary.py [--target=tpu:v6e ...] [--shape=B4,T4096,H16,D128 ...]
        [--op=tpu,xla] [--json=benchmarks/results/rotary_tpu.json]

Norm of every head and rotation of all its channels, from columns [B, T, H D], as matrix products
make them, to columns, as attention reads them. For every shape, chip and pass: model time of the
whole program, cosines included, against the time of the compulsory bytes (every input and output
once). Times are the schedule's replay, not measurements; `gatedjax/aot` says how far to trust them.
Each row compiles in a process of its own, in half a minute; rows that the JSON file has from these
versions of what is installed are not made again (delete the file after a change of the kernels).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import compiled_op
import jax
import jax.numpy as jnp
import numpy as np
from compiled_op import KEYS as KEYS
from jax import Array

from kernels_pallas.ops import rotary

SHAPES = ("B4,T4096,H16,D128", "B4,T4096,H8,D128", "B4,T4096,H8,D256")


def program(implementation: str, shape: str):
    """Of columns, the norm's scale and positions."""
    B, T, H, D = (int(part[1:]) for part in shape.split(","))
    frequencies = np.float32(10_000.0 ** (-np.arange(D // 2) / (D // 2)))

    def rotated(columns: Array, scale: Array, positions: Array) -> Array:
        heads = columns.reshape(B, T, H, D)
        y = rotary(heads, positions, frequencies, scale, implementation=implementation)
        return y.reshape(columns.shape)

    columns = jax.ShapeDtypeStruct((B, T, H * D), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((D,), jnp.float32)
    positions = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return rotated, (columns, scale, positions), 2


if __name__ == "__main__":
    compiled_op.main(__doc__, __file__, SHAPES, program)
