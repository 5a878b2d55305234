"""The mathematics of one tile of attention: R queries against C keys, as pure functions of arrays.

Leading axes (`...`: batch and heads, or none inside a kernel) are carried along. Backends differ
in which tiles they compute and in what order; the formulas are these, and those that turn logits
into weights: `normalizers/`. Statistics and accumulators have `statistics_dtype`.

The functions under "element by element" broadcast their arguments, so that a kernel can use them
on tiles in either orientation: queries by keys, or transposed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.normalizers.base import Added, Normalizer, Row


def statistics_dtype(*inputs: Array) -> jnp.dtype:
    """Float32, or float64 if an input is float64."""
    # Not `promote_types`, which refuses mixed inputs under strict promotion.
    any_float64 = any(x.dtype == jnp.float64 for x in inputs)
    return jnp.dtype(jnp.float64 if any_float64 else jnp.float32)


def matmul(
    subscripts: str,
    x: Array,
    y: Array,
    dtype: jnp.dtype,
) -> Array:
    """An einsum of two operands, accumulated and returned in `dtype`.

    Two of 16 bits are multiplied as such. One of 16 bits with one of 32 takes part in float32 at
    the machine's default precision: exact on a CPU, TF32 on a GPU, rounded to bfloat16 by a TPU.
    Two of 32 bits are multiplied in float32 everywhere.

    Args:
      subscripts: as of `jnp.einsum`.
      x, y: the operands, of any float dtypes.
      dtype: of the accumulator and the result.

    Returns:
      The product.

    Raises:
      ValueError: shapes that the subscripts do not fit.
    """
    # None is the machine's default.
    precision = None
    if min(x.dtype.itemsize, y.dtype.itemsize) > 2:
        precision = "highest"
    # Of float16 with bfloat16 only float32 has every number.
    common = x.dtype if x.dtype == y.dtype else statistics_dtype(x, y)
    return jnp.einsum(
        subscripts,
        x.astype(common),
        y.astype(common),
        precision=precision,
        preferred_element_type=dtype,
    )


# Products that select: what a row does not see is left out, whatever it holds. A weight of 0 is not
# enough, because 0 times NaN is NaN.


def without_special(x: Array) -> Array:
    """`x` with zeros for what is not finite."""
    # NaN is not below infinity either.
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0)


def special_products(
    weights: Array,
    seen: Array,
    x: Array,
    product: Callable[[Array, Array], Array],
) -> Array:
    """What the entries of `x` that are not finite add to product(weights, x), by IEEE's rules.

    Only pairs that are seen count. A weight of 0 makes NaN of an infinity, and so do infinities of
    both signs.

    Args:
      weights: 0 where a pair is not seen.
      seen: the mask, of the shape of `weights`.
      x: the other operand.
      product: the matrix product, which must be exact for small integers.

    Returns:
      0, infinity or NaN everywhere, of the product's shape.
    """
    dtype = weights.dtype
    x = x.astype(dtype)
    is_special = jnp.logical_not(jnp.abs(x) < jnp.inf).astype(dtype)
    infinity = (x == jnp.inf).astype(dtype) - (x == -jnp.inf).astype(dtype)
    sign = jnp.where(seen, jnp.sign(weights), 0)
    # How many special entries each sum meets, and how many infinities with their signs.
    count = product(seen.astype(dtype), is_special)
    balance = product(sign, infinity)
    # All of one sign, or else NaN: there was a NaN, a weight of 0 or the other sign.
    one_sign = jnp.abs(balance) == count
    special = jnp.where(one_sign, balance * jnp.inf, jnp.nan)
    return jnp.where(count == 0, 0, special)


def selecting_product(
    weights: Array,
    seen: Array,
    x: Array,
    product: Callable[[Array, Array], Array],
) -> Array:
    """product(weights, x), in which a row of `x` that is not seen does not count.

    Where all of `x` is finite, that is the product itself, bit for bit.

    Args:
      weights: of a tile's pairs, 0 where a pair is not seen.
      seen: the mask, which broadcasts to the weights.
      x: the other operand, a row for each key or for each query of the tile.
      product: the matrix product, as the machine does it, over one axis of the weights.

    Returns:
      The product, of which entries that are not finite are in the rows that see one of `x`.
    """
    finite_sum = product(weights, without_special(x))
    mask = jnp.broadcast_to(seen, weights.shape)
    return finite_sum + special_products(weights, mask, x, product).astype(finite_sum.dtype)


class Factors(NamedTuple):
    """The operands of a product, as `selecting_product` takes them."""

    weights: Array
    x: Array
    product: Callable[[Array, Array], Array]


def selecting_products(
    factors: Sequence[Factors],
    seen: Array | None,
    any_special: Array | Callable[..., Array] | None,
) -> list[Array]:
    """`selecting_product` of each of some factors, at the cost of plain ones where all is finite.

    Args:
      factors: of all products of a tile, which share one branch.
      seen: the mask; None if every pair is seen.
      any_special: whether any `x` may have an entry that is not finite; or a function that tells
        it of the plain products, where those are much smaller than what is multiplied.

    Returns:
      The products.
    """
    plain = [product(weights, x) for weights, x, product in factors]
    if seen is None or any_special is None:
        return plain
    mask = seen
    if callable(any_special):
        # A weight of 0 hides nothing: its product with what is not finite is NaN.
        any_special = any_special(*plain)

    def careful() -> list[Array]:
        return [selecting_product(weights, mask, x, product) for weights, x, product in factors]

    return jax.lax.cond(any_special, careful, lambda: plain)


def has_special(*arrays: Array) -> Bool[Array, ""]:
    """Whether any entry of some arrays is NaN or infinite."""
    found = [jnp.logical_not(jnp.all(jnp.abs(x) < jnp.inf)) for x in arrays]
    return jnp.any(jnp.stack(found))


def selected(x: Array, seen: Array | None) -> Array:
    """`x`, 0 where a pair is not seen."""
    return x if seen is None else jnp.where(seen, x, 0)


# Element by element, in either orientation.


def visible_pairs(
    queries: Int[Array, "..."],
    keys: Int[Array, "..."],
    *,
    length: int | Int[Array, ""] | None = None,
    causal: bool = False,
    window: int | None = None,
    query_segments: Int[Array, "..."] | None = None,
    key_segments: Int[Array, "..."] | None = None,
) -> Bool[Array, "..."] | None:
    """Which keys a query may see, for positions that broadcast against each other.

    Args:
      queries, keys: positions, such as [R, 1] and [1, C], or transposed [1, R] and [C, 1].
      length: keys at this position and beyond are padding; None if there are none.
      causal: a query sees no later key.
      window: w: query i sees keys j with i-w < j < i+w.
      query_segments, key_segments: documents, in the shapes of the positions.

    Returns:
      The mask, or None if every pair is visible.
    """
    conditions = []
    # How many tokens back the key is.
    distance = queries - keys
    if length is not None:
        # Mosaic wants operands of `&` that have one shape.
        conditions.append(jnp.broadcast_to(keys < length, distance.shape))
    if causal:
        # Not distance >= 0: a subtraction less for each pair.
        conditions.append(queries >= keys)
    if window is not None:
        # With `causal`, the keys after a query are hidden already.
        steps = distance if causal else jnp.abs(distance)
        conditions.append(steps < window)
    if query_segments is not None and key_segments is not None:
        # Tokens see their own document only.
        conditions.append(query_segments == key_segments)

    if not conditions:
        return None
    # No `all` over a new axis: kernels have no such arrays.
    mask = conditions[0]
    for condition in conditions[1:]:
        mask = mask & condition
    return mask


def soft_capped(s: Array, logits_soft_cap: float | None) -> Array:
    """c tanh(s / c); s itself without a cap."""
    if logits_soft_cap is None:
        return s
    # Multiplied by the reciprocal, a constant, instead of divided.
    return logits_soft_cap * jnp.tanh(s * (1 / logits_soft_cap))


def through_soft_cap(
    ds: Array,
    capped: Array,
    logits_soft_cap: float | None,
) -> Array:
    """The gradient of the logits before the soft cap, from that of the `capped` ones."""
    if logits_soft_cap is None:
        return ds
    # d/ds c tanh(s / c) = 1 - tanh(s / c)^2
    tanh = capped * (1 / logits_soft_cap)
    return ds * (1 - tanh**2)


# Tiles [..., R, C], queries by keys.


def visible(
    rows: Int[Array, "R"],
    keys: Int[Array, "C"],
    *,
    length: int | Int[Array, ""] | None,
    causal: bool,
    window: int | None,
    row_segments: Int[Array, "*batch R"] | None = None,
    key_segments: Int[Array, "*batch C"] | None = None,
) -> Bool[Array, "*batch R C"]:
    """The mask of a tile: which keys a row may see.

    Args:
      rows, keys: positions of the tile's queries and keys.
      length: keys at this position and beyond are padding; None if there are none.
      causal, window: as of `visible_pairs`.
      row_segments, key_segments: the documents of the queries and keys, both or neither.

    Returns:
      The mask; leading axes are those of the segments.
    """
    # As many leading axes as the segments have.
    leading = (1,) * (0 if row_segments is None else row_segments.ndim - 1)
    mask = visible_pairs(
        rows.reshape(*leading, -1, 1),
        keys.reshape(*leading, 1, -1),
        length=length,
        causal=causal,
        window=window,
        query_segments=None if row_segments is None else row_segments[..., :, None],
        key_segments=None if key_segments is None else key_segments[..., None, :],
    )
    if mask is None:
        # Of the shape of the mask that it stands for: callers add conditions.
        return jnp.ones((*leading, rows.shape[-1], keys.shape[-1]), bool)
    return mask


def distance(
    rows: Int[Array, "*batch R"],
    keys: Int[Array, "*batch C"],
    dtype: jnp.dtype,
) -> Float[Array, "*batch R C"]:
    """|i - j| of positions, for ALiBi."""
    return jnp.abs(rows[..., :, None] - keys[..., None, :]).astype(dtype)


class Alibi(NamedTuple):
    """What ALiBi subtracts from a tile's logits: slope times distance."""

    # Of the row's head.
    slopes: Float[Array, "... R 1"]
    # [1, 1, R, C], or [B, 1, 1, C] where every row has the same position.
    distances: Float[Array, "... C"]


class Mask(NamedTuple):
    """Where a tile lies among the queries and keys."""

    # Which keys a row may see; None if every one.
    seen: Bool[Array, "... R C"] | None
    # The keys' positions, which tell them apart.
    keys: Int[Array, "... 1 C"]
    # None without slopes.
    alibi: Alibi | None


class Logits(NamedTuple):
    """A tile of logits before the mask."""

    # The logits.
    s: Float[Array, "... R C"]
    # The same before ALiBi, which the gradient of a soft cap needs.
    capped: Float[Array, "... R C"]


def logits(
    q: Float[Array, "*batch R K"],
    k: Float[Array, "*batch C K"],
    alibi: Alibi | None,
    *,
    scale: float,
    logits_soft_cap: float | None,
    dtype: jnp.dtype,
) -> Logits:
    """scale q k^T, with the soft cap and ALiBi.

    Args:
      q, k: a tile's queries and keys.
      alibi: slopes and distances, or None.
      scale: what the products are multiplied by.
      logits_soft_cap: c of c tanh(. / c), or None.
      dtype: of the result.

    Returns:
      The logits, and what they were before ALiBi.
    """
    s = scale * matmul("...rk,...ck->...rc", q, k, dtype)
    # The cap bounds what queries and keys say; distances are not bounded.
    capped = soft_capped(s, logits_soft_cap)
    if alibi is None:
        return Logits(capped, capped)
    return Logits(capped - alibi.slopes * alibi.distances, capped)


def accumulate(
    sums: Sequence[Array],
    added: Added,
    v: Float[Array, "*batch C V"],
    product: Callable[[Array, Array], Array],
    seen: Bool[Array, "... R C"] | None = None,
    any_special: Bool[Array, ""] | Callable[..., Array] | None = None,
) -> list[Array]:
    """The sums of weighted values after a tile: keep * sums + weights v.

    Args:
      sums: the sums [..., R, V] before the tile.
      added: what the normalizer made of the tile.
      v: the tile's values.
      product: the matrix product of weights and values, as the machine does it.
      seen: the mask; None if every pair is seen.
      any_special: as of `selecting_products`; None if values are finite where not seen.

    Returns:
      The sums after the tile.
    """
    factors = [Factors(weights, v, product) for weights in added.weights]
    products = selecting_products(factors, seen, any_special)
    result = []
    for before, of_tile in zip(sums, products):
        # A new maximum of the row makes all that was summed before smaller.
        kept = before if added.keep is None else added.keep * before
        result.append(kept + of_tile)
    return result


class RowGradient(NamedTuple):
    """What the backward pass knows of a tile's rows."""

    # The gradient of the ungated output.
    do: Float[Array, "... R V"]
    # sum(do * output) [..., R, 1] for each output in `Normalizer.deltas`.
    deltas: Sequence[Array]
    # What `Normalizer.finish` saved [..., R, 1].
    saved: Row


class TileGradients(NamedTuple):
    """What a tile adds to each gradient.

    dq and dk lack the factor `scale`: whoever adds the tiles up multiplies once, at the end.
    """

    dq: Float[Array, "... R K"]
    dk: Float[Array, "... C K"]
    dv: Float[Array, "... C V"]
    dslopes: Float[Array, "... R 1"] | None


def gradients(
    normalizer: Normalizer,
    q: Float[Array, "*batch R K"],
    k: Float[Array, "*batch C K"],
    v: Float[Array, "*batch C V"],
    row: RowGradient,
    mask: Mask,
    any_special: Bool[Array, ""],
    *,
    scale: float,
    logits_soft_cap: float | None,
    dtype: jnp.dtype,
) -> TileGradients:
    """A tile of the backward pass, recomputed from its inputs and what was saved of its rows.

    Args:
      normalizer: how logits became weights.
      q, k, v: a tile's queries, keys and values.
      row: what is known of the queries' rows.
      mask: where the tile lies.
      any_special: whether queries, keys or do may be NaN or infinite.
      scale, logits_soft_cap, dtype: as of `logits`.

    Returns:
      The tile's part of every gradient, in `dtype`.
    """
    # The logits of the forward pass again.
    s = logits(q, k, mask.alibi, scale=scale, logits_soft_cap=logits_soft_cap, dtype=dtype)
    dweights = matmul("...rv,...cv->...rc", row.do, v, dtype)
    weights, ds = normalizer.gradient(s.s, mask.seen, mask.keys, dweights, row.deltas, row.saved)
    # A row whose statistics are NaN, or a value that is, says nothing about what is not seen.
    weights = selected(weights, mask.seen)
    ds = selected(ds, mask.seen)

    def over_queries(x: Array, y: Array) -> Array:
        return matmul("...rc,...rd->...cd", x, y, dtype)

    def over_keys(x: Array, y: Array) -> Array:
        return matmul("...rc,...cd->...rd", x, y, dtype)

    # Of s = capped - slope * distance; after the soft cap, so before its gradient.
    dslopes = None
    if mask.alibi is not None:
        dslopes = -jnp.sum(ds * mask.alibi.distances, axis=-1, keepdims=True)

    # From here on ds is the gradient of scale q k^T.
    ds = through_soft_cap(ds, s.capped, logits_soft_cap)
    if logits_soft_cap is not None:
        # The cap's slope is NaN where a logit is, seen or not.
        ds = selected(ds, mask.seen)
    dv, dq, dk = selecting_products(
        [
            Factors(weights, row.do, over_queries),
            Factors(ds, k, over_keys),
            Factors(ds, q, over_queries),
        ],
        mask.seen,
        any_special,
    )
    return TileGradients(dq, dk, dv, dslopes)
