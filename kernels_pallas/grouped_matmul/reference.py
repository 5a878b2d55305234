"""`grouped_matmul` as every row against every group's matrix, and a one-hot choice: G times the work, by intention.

Computes in float32, or in float64 when an input is float64.
"""

import jax.numpy as jnp
from jax import Array


def grouped_matmul(lhs, rhs, group_sizes, *, out_dtype: jnp.dtype) -> Array:
    """As `api.grouped_matmul`, with every default filled in."""
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(lhs, rhs))
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    member = (ends - group_sizes <= row) & (row < ends)  # [M, G]; all False beyond the last group
    every = jnp.einsum("mk,gkn->mgn", lhs.astype(dtype), rhs.astype(dtype), precision="highest")
    return jnp.sum(jnp.where(member[:, :, None], every, 0), axis=1).astype(out_dtype)
