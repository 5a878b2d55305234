"""causal_conv compiled for TPUs that are not there: our kernels beside the same by plain XLA.

    python benchmarks/causal_conv.py [--target=tpu:v6e ...] [--shape=B4,T4096,F2048,W4,packed ...]
        [--op=tpu,xla] [--json=benchmarks/results/causal_conv_tpu.json]

With SiLU, of packed documents or of whole rows. For every shape, chip and pass: model time of the
whole program against the time of the compulsory bytes (every input and output once). Times are the
schedule's replay, not measurements; `gatedjax/aot` says how far to trust them. Each row compiles in
a process of its own, in seconds; rows that the JSON file has from these versions of what is
installed are not made again (delete the file after a change of the kernels).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is loaded to compile, not to run

import compiled_op
import jax
import jax.numpy as jnp
from compiled_op import KEYS as KEYS
from jax import Array

from kernels_pallas.ops import causal_conv

SHAPES = ("B4,T4096,F2048,W4,packed", "B4,T4096,F2048,W4,whole", "B4,T4096,F6144,W4,packed")


def program(implementation: str, shape: str):
    """Of x, the kernel and, where rows are packed, segments."""
    *sizes, rows = shape.split(",")
    B, T, F, W = (int(part[1:]) for part in sizes)

    def activated(x: Array, kernel: Array, segment_ids: Array | None = None) -> Array:
        return causal_conv(
            x,
            kernel,
            segment_ids=segment_ids,
            is_activated=True,
            implementation=implementation,
        )

    x = jax.ShapeDtypeStruct((B, T, F), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((W, F), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return activated, (x, kernel, segment_ids)[: 3 if rows == "packed" else 2], 2


if __name__ == "__main__":
    compiled_op.main(__doc__, __file__, SHAPES, program)
