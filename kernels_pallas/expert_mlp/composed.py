"""`expert_mlp` as three calls of `grouped_matmul`, each by the implementation named: reference, xla or gpu."""

from jax import Array

from kernels_pallas.expert_mlp.gate import gated_product
from kernels_pallas.grouped_matmul import grouped_matmul


def expert_mlp(rows, gate, up, down, group_sizes, *, activation: str, implementation: str, interpret: bool) -> Array:
    """As `api.expert_mlp`, with every default filled in."""
    options = dict(implementation=implementation, interpret=interpret)
    pre = (grouped_matmul(rows, matrix, group_sizes, **options) for matrix in (gate, up))
    return grouped_matmul(gated_product(activation, *pre).astype(rows.dtype), down, group_sizes, **options)
