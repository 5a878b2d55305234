"""How the GPU kernels of `attention` multiply matrices, by the dtypes of a call's inputs.

With bfloat16 inputs matmuls are of bfloat16: weights and the gradients of logits are rounded, as
every flash kernel does. With float16 ones these keep the bits of TF32; with float32 inputs matmuls
keep all bits, in three passes of TF32.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.common.precision import one_pass_allowed


class Operands(NamedTuple):
    """What products are rounded to before they are multiplied again, and how exactly then."""

    dtype: jnp.dtype
    precision: lax.Precision | lax.DotAlgorithmPreset | None


# All bits of float32.
EXACT = "tf32_x3"

# The names are also those of the rows of `tuning.py`.
OPERANDS = {
    "bfloat16": Operands(jnp.dtype(jnp.bfloat16), None),
    "tf32": Operands(jnp.dtype(jnp.float32), lax.DotAlgorithmPreset.TF32_TF32_F32),
    EXACT: Operands(jnp.dtype(jnp.float32), lax.DotAlgorithmPreset.TF32_TF32_F32_X3),
}


def matmuls(*arrays: Array) -> str:
    """How a call with these inputs multiplies: a name of `OPERANDS`."""
    # As asked for by `jax.default_matmul_precision`, whatever the dtypes.
    if not one_pass_allowed():
        return EXACT
    if all(x.dtype == jnp.bfloat16 for x in arrays):
        return "bfloat16"
    # Float16 among them: TF32 has its 10 bits of mantissa, bfloat16 has 7.
    if all(x.dtype.itemsize == 2 for x in arrays):
        return "tf32"
    return EXACT


def operands(interpret: bool, matmuls: str) -> Operands:
    """Those of a call; interpreted matmuls round nothing."""
    if interpret:
        return Operands(jnp.dtype(jnp.float32), lax.Precision.HIGHEST)
    return OPERANDS[matmuls]
