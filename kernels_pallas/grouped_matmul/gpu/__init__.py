"""The GPU kernels of `grouped_matmul`: what `api.py` and `expert_mlp` call. It imports them when it
is called.
"""

from collections.abc import Sequence
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.gpu import missing_triton


def unsupported(lhs: Array) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    missing = missing_triton()
    if missing is not None:
        return missing
    from kernels_pallas.grouped_matmul.gpu import op

    return op.unsupported(lhs)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: Any,
    interpret: bool,
) -> Float[Array, "M N"]:
    """As `op.grouped_matmul`.

    Args:
      lhs, rhs, group_sizes: as `api.grouped_matmul`.
      out_dtype: of the result.
      interpret: whether the kernels run in interpret mode.
    """
    from kernels_pallas.grouped_matmul.gpu import op

    return op.grouped_matmul(lhs, rhs, group_sizes, out_dtype=out_dtype, interpret=interpret)


def grouped_matmuls(
    lhs: Float[Array, "M K"],
    matrices: Sequence[Float[Array, "G K N"]],
    group_sizes: Int[Array, "G"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "M N"], ...]:
    """As `op.grouped_matmuls`.

    Args:
      lhs: read once for all of `matrices`.
      matrices: of one shape.
      group_sizes: as `api.grouped_matmul`.
      interpret: whether the kernels run in interpret mode.
    """
    from kernels_pallas.grouped_matmul.gpu import op

    return op.grouped_matmuls(lhs, matrices, group_sizes, interpret=interpret)
