"""`grouped_matmul` as every row times every group's matrix, of which one is selected.

G times the work, by intention. Computes in float32, or in float64 when an input is float64.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.grouped_matmul.xla import bounds


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """As `api.grouped_matmul`, with every default filled in."""
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(lhs, rhs))
    starts, ends = bounds(group_sizes, lhs.shape[0])
    row = jnp.arange(lhs.shape[0])[:, None]
    # [M, G]: whether a row is of a group. Rows beyond the last group are of none.
    is_member = (starts <= row) & (row < ends)
    # Selected before and after, not multiplied by 0: a row or matrix of another group may be NaN,
    # and the gradients sum over all rows and groups.
    lhs_of_groups = jnp.where(is_member[:, :, None], lhs.astype(dtype)[:, None], 0)
    every_product = jnp.einsum(
        "mgk,gkn->mgn",
        lhs_of_groups,
        rhs.astype(dtype),
        precision="highest",
    )
    selected = jnp.where(is_member[:, :, None], every_product, 0)
    return jnp.sum(selected, axis=1).astype(out_dtype)
