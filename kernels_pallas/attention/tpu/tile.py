"""The mathematics of a tile on TPU: products, masks and logits, and softmax in registers' shape.

Rows of a tile are queries in the forward pass. In the backward pass a tile is transposed: its rows
are keys, so that the statistics of queries run along lanes, [1, R]. There a row of numbers is
stored without waste, and broadcast over sublanes for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import kernel_tile
from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.kernel_tile import Logits, Positions
from kernels_pallas.attention.normalizers.base import (
    Added,
    Normalizer,
    Row,
    Softmax,
    finite,
    masked,
)
from kernels_pallas.attention.products import special_products, without_special
from kernels_pallas.attention.tpu.plan import DIAGONAL, LANES, Plan

# Contracted axes of the two operands of a matrix product.
NN = ((1,), (0,))  # x y
NT = ((1,), (1,))  # x y^T
TN = ((0,), (0,))  # x^T y

Contraction = tuple[tuple[int], tuple[int]]


@runtime_checkable
class Multiplies(Protocol):
    """Static arguments that say how matrices are multiplied: of every kernel here."""

    @property
    def rounds(self) -> bool:
        """Whether operands are rounded to bfloat16, in one pass."""
        ...


def matmul(
    plan: Multiplies,
    x: Array,
    y: Array,
    contraction: Contraction = NN,
) -> Array:
    """A matrix product summed in float32.

    Args:
      plan: `rounds` says whether operands are rounded to bfloat16 or keep all their bits.
      x: the left operand, a matrix.
      y: the right operand, a matrix.
      contraction: NN, NT or TN: which of the two is transposed.

    Returns:
      The product in float32.
    """
    if plan.rounds:
        dtype = jnp.bfloat16
        precision = None
    else:
        # Without a precision, even float32 operands are multiplied in one pass of bfloat16.
        dtype = jnp.float32
        precision = "highest"
    no_batch_axes = ((), ())
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (contraction, no_batch_axes),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


# A magnitude from which on a product may overflow. Below it dp = do v^T is finite, and a weight of
# 0 makes 0 of it; sums of 256 products of two such numbers stay below 2^127.
LARGE_EXPONENT = 59


def has_large(*blocks: Array) -> Array:
    """Whether any number of some blocks is NaN, infinite, or at least 2^59: a scalar bool.

    By integers, so that NaN needs no care: what is added to a number's exponent carries into the
    place of its sign if the exponent is as large. Of bfloat16 two are tested in one lane. What is
    slow is the way from lanes to a scalar, and all blocks go it together.
    """
    found = _large_by_lane(blocks[0])
    for x in blocks[1:]:
        found = jnp.maximum(found, _large_by_lane(x))
    return jnp.max(found) > 0


def _large_by_lane(x: Array) -> Array:
    """1 where `has_large` is true of a number in that place of a register, [8 or 1, 128]."""
    # The exponent of 2^59 is 59 + 127; the sign is 256 beyond an exponent of 0.
    to_sign = 256 - (LARGE_EXPONENT + 127)
    if x.dtype == jnp.bfloat16:
        x = pltpu.bitcast(x, jnp.int32)
        exponents = 0x7F807F80
        carry = (to_sign << 23) | (to_sign << 7)
        signs = 0x80008000 - 2**32
    else:
        x = lax.bitcast_convert_type(x, jnp.int32)
        exponents = 0x7F800000
        carry = to_sign << 23
        signs = 0x80000000 - 2**32
    carried = (x & exponents) + carry
    # Registers are folded onto one: in halves, and what is odd one by one.
    while carried.shape[0] % 16 == 0:
        half = carried.shape[0] // 2
        carried = carried[:half] | carried[half:]
    rows = min(8, carried.shape[0])
    folded = jnp.zeros((rows, LANES), jnp.int32)
    for row in range(0, carried.shape[0], rows):
        for lane in range(0, carried.shape[1], LANES):
            folded = folded | carried[row : row + rows, lane : lane + LANES]
    return (folded & signs != 0).astype(jnp.float32)


def selecting_product(
    plan: Multiplies,
    weights: Array,
    seen: Array | None,
    x: Array,
    contraction: Contraction = NN,
) -> Array:
    """`matmul` of weights and x that leaves out rows of x that are not seen, whatever they hold."""

    def product(x: Array, y: Array) -> Array:
        return matmul(plan, x, y, contraction)

    if seen is None:
        return product(weights, x)
    # A vector unit may know no bfloat16.
    x = x.astype(jnp.float32)
    special = special_products(weights, seen, x, product)
    return product(weights, without_special(x)) + special


def positions(
    first_query: Array | int,
    num_queries: int,
    first_key: Array | int,
    num_keys: int,
    transposed: bool,
) -> Positions:
    """The positions of a tile, without segments.

    Args:
      first_query: the position of the tile's first query.
      num_queries: how many queries it has.
      first_key: the position of the tile's first key.
      num_keys: how many keys it has.
      transposed: whether rows are keys.

    Returns:
      Queries [R, 1] and keys [1, C]; transposed, queries [1, C] and keys [R, 1].
    """
    # Axis 0 runs down the rows of a tile, axis 1 along them.
    query_axis = 1 if transposed else 0
    key_axis = 1 - query_axis
    return Positions(
        queries=_consecutive(first_query, num_queries, query_axis),
        keys=_consecutive(first_key, num_keys, key_axis),
    )


def _consecutive(first: Array | int, count: int, axis: int) -> Array:
    """first, first + 1, ... along an axis of a matrix; the other axis has size 1."""
    # Mosaic has no one-dimensional iota.
    shape = (count, 1) if axis == 0 else (1, count)
    return first + lax.broadcasted_iota(jnp.int32, shape, axis)


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
    length = None
    if not plan.causal and plan.pads_keys:
        # Some blocks are padded. Where attention is causal, that hides their keys too: they come
        # after every query.
        length = plan.S
    mask = attention_tile.visible_pairs(
        at.queries,
        at.keys,
        length=length,
        causal=plan.causal,
        window=plan.window,
        query_segments=at.query_segments,
        key_segments=at.key_segments,
    )
    if not plan.pads_queries:
        return mask
    # Queries of padding are zeros, and see nothing: 0 times an infinite key is NaN, and weights by
    # a slope alone, which may be negative, overflow.
    tile_shape = jnp.broadcast_shapes(at.queries.shape, at.keys.shape)
    real = jnp.broadcast_to(at.queries < plan.T, tile_shape)
    return real if mask is None else mask & real


def only_triangles(plan: Plan, kind: int) -> bool:
    """Whether `below_diagonal` hides all that there is to hide in a tile of this kind."""
    # Queries of padding must see nothing.
    by_causality = kind == DIAGONAL and not plan.segments and not plan.pads_queries
    return by_causality and plan.normalizer.hidden_by_logit


def below_diagonal(s: Array, transposed: bool) -> Array:
    """Logits of a group of rows on the diagonal, -inf where the query comes before the key.

    Only as many columns as there are rows are cut by the diagonal: the last ones, or if the tile is
    transposed the first ones. The others, which are most of a tile, cost no comparison.

    Args:
      s: logits [R, C], C >= R, of which only causality hides any.
      transposed: whether rows are keys.

    Returns:
      The logits, for a normalizer that is `hidden_by_logit`.
    """
    rows, columns = s.shape
    row = lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
    column = lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    if transposed:
        cut = jnp.where(column >= row, s[:, :rows], -jnp.inf)
        parts = [cut, s[:, rows:]]
    else:
        cut = jnp.where(row >= column, s[:, columns - rows :], -jnp.inf)
        parts = [s[:, : columns - rows], cut]
    return cut if rows == columns else jnp.concatenate(parts, axis=1)


def logits(
    plan: Plan,
    x: Array,
    y: Array,
    slope: Array | None,
    at: Positions,
) -> Logits:
    """The logits of a tile, by the rows of x and the rows of y.

    Args:
      plan: scale and soft cap.
      x: queries; keys, if the tile is transposed.
      y: keys; queries, if the tile is transposed.
      slope: of this head, or None.
      at: where the tile is.

    Returns:
      Logits x y^T before the mask.
    """
    scaled = matmul(plan, x, y, NT) * plan.scale
    capped = attention_tile.soft_capped(scaled, plan.logits_soft_cap)
    distance = None if slope is None else at.distance()
    return kernel_tile.with_slopes(capped, slope, distance)


@dataclass(frozen=True)
class LaneSoftmax(Softmax):
    """`Softmax` whose rows of statistics are [R, 128]: the maximum in every lane, the sum spread.

    With statistics of [R, 1] every tile would broadcast the maximum over lanes and sum its weights
    along lanes. Here that sum is taken once, at the end. On v6e this saves a quarter of the time.
    """

    lanes: ClassVar[int] = LANES

    def start(
        self,
        zero: Array,
        known: Row = (),
        sink: Array | None = None,
    ) -> Row:
        if sink is None:
            return zero - jnp.inf, zero
        # The sink's weight is 1, in one lane only, because the lanes are added up at the end.
        first_lane = lax.broadcasted_iota(jnp.int32, zero.shape, 1) == 0
        return sink, jnp.where(first_lane & (sink > -jnp.inf), 1.0, zero)

    def add(
        self,
        row: Row,
        s: Array,
        seen: Array | None,
        keys: Array,
    ) -> Added:
        # The maximum so far is in every lane; the sum so far is spread over the lanes.
        before, total = row
        s = masked(s, seen)
        maximum = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        # 0 for a row that has seen nothing: -inf - -inf would be NaN.
        shift = finite(maximum)
        weights = jnp.exp(s - across(shift, s.shape[1]))
        # What was summed up relative to the old maximum.
        keep = jnp.exp(before - shift)
        # Lane n sums the columns n, n + 128, ...
        starts = range(0, weights.shape[1], LANES)
        folded = sum(weights[:, n : n + LANES] for n in starts)
        return Added(
            (maximum, keep * total + folded),
            keep,
            (weights,),
        )

    def finish(self, row: Row, sums: Sequence[Array]) -> tuple[tuple[Array, ...], Row]:
        return super().finish(as_columns(self, row), sums)


def on_tpu(normalizer: Normalizer) -> Normalizer:
    """The normalizer in the form that is fastest here."""
    return LaneSoftmax() if type(normalizer) is Softmax else normalizer


def off_tpu(normalizer: Normalizer) -> Normalizer:
    """The inverse of `on_tpu`."""
    return Softmax() if type(normalizer) is LaneSoftmax else normalizer


def lanes(normalizer: Normalizer) -> int:
    """The number of columns of a row's statistics while the kernel loops over the keys."""
    return getattr(normalizer, "lanes", 1)


def as_columns(normalizer: Normalizer, row: Row) -> Row:
    """A row's statistics as those of `off_tpu`, [..., R, 1] each."""
    if not isinstance(normalizer, LaneSoftmax):
        return row
    maximum, total = row
    # The one sum along lanes; the maximum is in all of them, so the first will do.
    return maximum[..., :1], jnp.sum(total, axis=-1, keepdims=True)


def across(x: Array, width: int) -> Array:
    """[R, 128] with equal lanes as [R, width]; a column [R, 1] as it is."""
    if x.shape[1] in (1, width):
        return x
    whole = -(-width // LANES)
    return jnp.tile(x, (1, whole))[:, :width]


def as_row(column: Array) -> Array:
    """[R, 1] -> [1, R]."""
    # Mosaic transposes whole registers, so the column is spread over one first.
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]
