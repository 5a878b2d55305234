"""`expert_mlp` as three calls of `grouped_matmul`, each by the implementation named: reference, xla or gpu."""

from jax import Array

from kernels_pallas.expert_mlp.gate import gated_product
from kernels_pallas.grouped_matmul import grouped_matmul


def expert_mlp(
    rows,
    gate,
    up,
    down,
    group_sizes,
    weights,
    *,
    activation: str,
    implementation: str,
    interpret: bool,
) -> Array:
    """As `api.expert_mlp`, with every default filled in.

    Weights multiply the product, not what becomes of it, which is the same: their gradient then needs the product and
    its cotangent only, not the result.
    """
    options = dict(implementation=implementation, interpret=interpret)
    pre = (grouped_matmul(rows, matrix, group_sizes, **options) for matrix in (gate, up))
    product = gated_product(activation, *pre)
    if weights is not None:
        product = product * weights.astype(product.dtype)[:, None]
    return grouped_matmul(product.astype(rows.dtype), down, group_sizes, **options)
