"""Which tokens of a batch are tokens, and which of them belong together.

One meaning for all feed-forwards: segment id 0 is padding, and a run of neighbors with the same
other id is a document. Without segment ids a row is one document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.layers.token_info import TokenInfo


class Documents(NamedTuple):
    """The documents of every row, as each of their tokens sees them."""

    is_token: Bool[Array, "B T"]
    index: Int[Array, "B T"]  # of the token's run: 0, 1, 2 ... along the row, padding's too
    start: Int[Array, "B T"]  # where in the row the token's run begins
    length: Int[Array, "B T"]  # tokens of the run


def is_token(info: TokenInfo | None) -> Bool[Array, "B T"] | None:
    """True for tokens, False for padding; None where all are tokens."""
    if info is None or info.segment_ids is None:
        return None
    return jnp.asarray(info.segment_ids) != 0


def documents_of(info: TokenInfo | None) -> Documents | None:
    """The documents of a packed batch; None where every row is one."""
    mask = is_token(info)
    if info is None or mask is None:
        return None
    ids = jnp.asarray(info.segment_ids)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    is_change = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(mask[:, :1])
    is_first = jnp.concatenate([edge, is_change], axis=1)
    is_last = jnp.concatenate([is_change, edge], axis=1)
    # The nearest first place at or before each token, and the nearest last one at or after it.
    start = jax.lax.cummax(jnp.where(is_first, place, 0), axis=1)
    no_end = ids.shape[1]
    end = jax.lax.cummin(jnp.where(is_last, place, no_end), axis=1, reverse=True)
    index = jnp.cumsum(is_first, axis=1, dtype=jnp.int32) - 1
    return Documents(
        mask,
        index,
        start,
        end - start + 1,
    )


def without_padding(
    x: Float[Array, "B T *channels"],
    mask: Bool[Array, "B T"] | None,
) -> Float[Array, "B T *channels"]:
    """x with zeros where there is no token, whatever was there.

    Selected, not multiplied: padding may hold NaN, and no gradient comes out of it.
    """
    if mask is None:
        return x
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0)
