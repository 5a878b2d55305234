"""The mathematics of one tile of attention: R queries against C keys, as pure functions of arrays.

Leading axes (`...`: batch and heads, or none inside a kernel) are carried along. Backends differ
in which tiles they compute and in what order; the formulas are these, the matrix products of
`products.py`, and what turns logits into weights: `normalizers/`. Statistics and accumulators have
`statistics_dtype`.

The functions under "element by element" broadcast their arguments, so that a kernel can use them
on tiles in either orientation: queries by keys, or transposed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.normalizers.base import Added, Normalizer, Row
from kernels_pallas.attention.products import Factors, matmul, selected, selecting_products

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
      any_special: as of `products.selecting_products`; None if values are finite where not seen.

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
