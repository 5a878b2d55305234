"""How exactly the kernels multiply: what `jax.default_matmul_precision` asks for."""

import jax
import jax.numpy as jnp
from jax import Array

# Values of `jax_default_matmul_precision` that allow one pass of a matrix unit for 16-bit numbers.
_ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


def one_pass_allowed() -> bool:
    """Whether 16-bit operands may be multiplied in one pass of the matrix unit."""
    return jax.config.jax_default_matmul_precision in _ONE_PASS


def one_bfloat16_pass(*arrays: Array) -> bool:
    """Whether matmuls of these arrays are one pass of bfloat16."""
    return one_pass_allowed() and all(x.dtype == jnp.bfloat16 for x in arrays)
