"""The mathematics of a tile on GPU: products, masks and logits, in both orientations.

In the kernels of dk and dv a tile is transposed, keys by queries, so that what is multiplied again
is never transposed in registers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention import kernel_tile
from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.gpu.plan import Plan, Ref
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


def slope_of_head(plan: Plan, refs: dict[str, Ref], head: Array) -> Array | None:
    """The slope of a head, in the unit of logits; None without slopes."""
    if not plan.slopes:
        return None
    return plan.unit * pltriton.load(refs["slopes"].at[head])


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
    return _from_products(plan, matmul(plan, x, y, trans_y=True), slope, distance)


def logits_of_token(
    plan: Plan,
    x: Array,
    token: Array,
    slope: Array | None,
    distance: Array | None,
) -> Logits:
    """As `logits`, of a tile with one column: that of one token.

    Args:
      plan: scale and soft cap.
      x: queries [R, K]; keys, if the token is a query.
      token: [1, K].
      slope: of this head, or None.
      distance: between the token and each row of x; without a slope it is not used.

    Returns:
      Logits [R, 1] before the mask.
    """
    return _from_products(plan, products_with(x, token), slope, distance)


def products_with(x: Array, token: Array) -> Array:
    """The product of each row of x [R, D] with one token [1, D], float32 [R, 1]."""
    products = x.astype(jnp.float32) * token.astype(jnp.float32)
    return jnp.sum(products, axis=1, keepdims=True)


def _from_products(
    plan: Plan,
    products: Array,
    slope: Array | None,
    distance: Array | None,
) -> Logits:
    # One multiplication: what turns logits into powers of two is part of the scale.
    scaled = products * (plan.scale * plan.unit)
    capped = attention_tile.soft_capped(scaled, plan.logits_soft_cap)
    return kernel_tile.with_slopes(capped, slope, distance)


# --- NaN and infinities


def write_or_repeat(
    plan: Plan,
    sums: Sequence[Array],
    *,
    write: Callable[[], None],
    repeat: Callable[[], None],
) -> None:
    """write(), or repeat() where a sum is not finite.

    A matrix product multiplies what the mask hides by a weight of 0, and 0 times NaN or infinity is
    NaN. Looking for such values in every tile would cost time in every tile. But NaN and infinity
    stay in a sum. So the program looks at its sums once, when they are complete, and if it finds
    any it computes them again: one token at a time, each selected by the mask before it is added.
    That takes many times longer, and happens only where the inputs have NaN or infinities.

    Args:
      plan: the static arguments.
      sums: of matrix products, after the loop over tiles.
      write: ends the program with these sums.
      repeat: computes everything again, and writes it.
    """
    if not plan.hides_pairs:
        write()
        return
    finite = _all_finite(sums[0])
    for x in sums[1:]:
        finite = finite & _all_finite(x)
    # Both branches write: a value that comes from either would have one layout in registers, and
    # its change takes shared memory.
    lax.cond(finite, write, repeat)


def _all_finite(x: Array) -> Array:
    """Whether no element of a tile is NaN or infinite."""
    # NaN compares as False.
    others = jnp.where(jnp.abs(x) < jnp.inf, 0, 1)
    by_row = jnp.max(others, axis=1)
    return jnp.max(by_row, axis=0) == 0


def if_seen(seen: Array | None, x: Array) -> Array:
    """x where the mask leaves a pair, 0 elsewhere."""
    return x if seen is None else jnp.where(seen, x, 0)


def product_if_seen(seen: Array | None, x: Array, y: Array) -> Array:
    """The products of x [R, 1] and y [1, D] in the rows that `seen` [R, 1] has, 0 elsewhere."""
    return if_seen(seen, x * y.astype(jnp.float32))
