"""A piece of several tokens after those that a cache holds, and caches that are full."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.layers.kv_cache import KVCache, num_tokens
from gatedjax.layers.token_info import History


class Row(NamedTuple):
    """What `attention_on_mesh` is called with: a piece, and what the cache holds before it."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hk V"]
    gate_logits: Float[Array, "B T H _"] | None
    segment_ids: Int[Array, "B T"] | None


def row_of_piece(
    piece: Row,
    held: KVCache,
    is_held: Bool[Array, "B S"],
) -> Row:
    """A piece of several tokens after those of a cache, as one row of self-attention.

    The queries of the tokens in the cache are gone and not wanted: theirs are zeros. That computes
    more than needed, and makes a piece what one longer prompt is: window, distances and documents
    are where they always were.

    Args:
      piece: the new tokens. Their documents are numbered; None if they go on with the cache's.
      held: keys and values of the tokens before, the newest last.
      is_held: which of them the row's document has: `kv_cache.in_time_order`.
    """
    segment_ids = piece.segment_ids
    if segment_ids is None:
        segment_ids = jnp.ones(piece.q.shape[:2], jnp.int32)
    earlier = held.k.shape[1]

    def after_zeros(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = (earlier, 0)
        return jnp.pad(x, widths)

    gate_logits = piece.gate_logits
    return Row(
        q=after_zeros(piece.q),
        k=jnp.concatenate([held.k.astype(piece.k.dtype), piece.k], axis=1),
        v=jnp.concatenate([held.v.astype(piece.v.dtype), piece.v], axis=1),
        gate_logits=None if gate_logits is None else after_zeros(gate_logits),
        segment_ids=jnp.concatenate([is_held.astype(jnp.int32), segment_ids], axis=1),
    )


def require_room(
    most: int | None,
    length: int,
    segment_ids: Int[Array, "B T"] | None,
) -> None:
    """Refuses what can never fit, whatever the cache holds.

    Args:
      most: tokens that it has room for; None for any number.
      length: of the piece, with padding.
      segment_ids: of its tokens; None where none is padding.
    """
    if most is not None and segment_ids is None and length > most:
        raise ValueError(f"cache: got room for {most} tokens, expected at least {length}")


def where_there_is_room(
    o: Float[Array, "B T H V"],
    most: int | None,
    before: History,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
    """`o`, and NaN in rows that have become longer than the cache.

    How many tokens a cache holds is not known when a program is compiled, and a program cannot
    raise; a cache that silently forgot would be worse.

    Args:
      o: of the new tokens.
      most: tokens that the cache has room for; None for any number.
      before: what it held before them.
      segment_ids: of the new tokens; None where none is padding.
    """
    if most is None:
        return o
    is_full = before.tokens + num_tokens(o, segment_ids) > most
    return jnp.where(is_full[:, None, None, None], jnp.nan, o)
