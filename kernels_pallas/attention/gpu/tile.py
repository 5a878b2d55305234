"""The mathematics of a tile on GPU: products, masks and logits, in both orientations.

In the kernels of dk and dv a tile is transposed, keys by queries, so that what is multiplied again
is never transposed in registers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention import kernel_tile
from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.gpu.plan import Plan
from kernels_pallas.attention.kernel_tile import Logits, Positions
from kernels_pallas.attention.normalizers.base import Row


class Rows(NamedTuple):
    """The carry of a loop over keys: what is known so far of a tile's rows."""

    # What the normalizer keeps of a row, [R, 1] each.
    statistics: Row
    # Of weighted values, [R, V] each.
    sums: list[Array]


def matmul(
    plan: Plan,
    x: Array,
    y: Array,
    trans_y: bool = False,
) -> Array:
    """A matrix product summed in float32, as the tensor core takes it.

    Args:
      plan: what other operands than two of 16 bits are converted to, and the precision.
      x: the left operand, a matrix.
      y: the right operand, a matrix.
      trans_y: whether to multiply by y^T.

    Returns:
      The product in float32. Two operands of 16 bits are multiplied as they are.
    """
    # Inputs as they came. Weights and ds are float32 and become `plan.operand`.
    two_of_16_bits = x.dtype == y.dtype and x.dtype.itemsize <= 2
    if plan.interpret or not two_of_16_bits:
        x = x.astype(plan.operand)
        y = y.astype(plan.operand)
    # `precision` is for float32; the tensor core has one way to multiply 16 bits.
    precision = plan.precision if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, trans_b=trans_y, precision=precision)


def positions(
    queries: Array,
    keys: Array,
    query_segments: Array | None,
    key_segments: Array | None,
    transposed: bool = False,
) -> Positions:
    """The positions of a tile from those of its queries and keys, one-dimensional.

    Args:
      queries: positions of queries.
      keys: positions of keys.
      query_segments: segment ids of the queries, or None.
      key_segments: segment ids of the keys, or None.
      transposed: whether rows are keys.

    Returns:
      Queries [R, 1] and keys [1, C]; transposed, queries [1, C] and keys [R, 1].
    """
    # Rows are the one, columns the other.
    of_queries = as_row if transposed else as_column
    of_keys = as_column if transposed else as_row
    return Positions(
        queries=of_queries(queries),
        keys=of_keys(keys),
        query_segments=None if query_segments is None else of_queries(query_segments),
        key_segments=None if key_segments is None else of_keys(key_segments),
    )


def as_column(x: Array) -> Array:
    """[R] -> [R, 1]."""
    return x[:, None]


def as_row(x: Array) -> Array:
    """[C] -> [1, C]."""
    return x[None, :]


def visible(plan: Plan, at: Positions, by_position: bool) -> Array | None:
    """The mask of a tile: which of its keys each of its queries may see.

    Args:
      plan: the static arguments.
      at: where the tile is.
      by_position: whether positions can hide anything in this tile; if not, only segments decide.

    Returns:
      bool, of the tile's shape; None if everything is visible.
    """
    if not by_position:
        return at.same_segment()
    return attention_tile.visible_pairs(
        at.queries,
        at.keys,
        # Causality hides keys of padding as well: they come after every query.
        length=None if plan.causal else plan.T,
        causal=plan.causal,
        window=plan.window,
        query_segments=at.query_segments,
        key_segments=at.key_segments,
    )


def logits(
    plan: Plan,
    x: Array,
    y: Array,
    slope: Array | None,
    distance: Array | None,
) -> Logits:
    """The logits of a tile, by the rows of x and the rows of y.

    Args:
      plan: scale and soft cap.
      x: queries; keys, if the tile is transposed.
      y: keys; queries, if the tile is transposed.
      slope: of this head, or None.
      distance: between each query and key; without a slope it is not used.

    Returns:
      Logits x y^T before the mask.
    """
    scaled = matmul(plan, x, y, trans_y=True) * plan.scale
    capped = attention_tile.soft_capped(scaled, plan.logits_soft_cap)
    return kernel_tile.with_slopes(capped, slope, distance)
