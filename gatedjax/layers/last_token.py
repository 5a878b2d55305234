"""A prompt in a decoder behind a decoder: the second one sees the last token of each row alone.

Its layers keep nothing of the tokens: their keys, values and memories are those of layers before
them (`ModelConfig.cross_decoder`). Of a prompt, only what comes out for its last token is asked
for, so that token goes through them as one that is decoded, after all the others.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from gatedjax.layers.shared_weights import SharedWeights
from gatedjax.layers.token_info import History, TokenInfo


def last_places(info: TokenInfo, length: int) -> Int[Array, "B 1"]:
    """Where the last token of each row stands, with padding behind the tokens; 0 without one."""
    if info.segment_ids is None:
        return jnp.full((info.positions.shape[0], 1), length - 1, jnp.int32)
    count = jnp.sum(info.segment_ids != 0, axis=1, dtype=jnp.int32)
    return jnp.maximum(count - 1, 0)[:, None]


def at_places(x: Array, places: Int[Array, "B 1"]) -> Array:
    """[B, 1, ...] of [B, T, ...]: a token a row."""
    index = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def info_of_last(info: TokenInfo, after: History, places: Int[Array, "B 1"]) -> TokenInfo:
    """What layers are told of the last token of each row, which goes on with its document.

    Args:
      info: about all tokens of a call, as `arranged` gives it.
      after: what the caches hold with them.
      places: of the last tokens.
    """

    def cut(x: Array | None) -> Array | None:
        return None if x is None else at_places(x, places)

    segment_ids = None
    added = jnp.ones_like(after.tokens)
    if info.segment_ids is not None:
        # A row of padding alone has no last token.
        segment_ids = jnp.minimum(at_places(info.segment_ids, places), 1)
        added = segment_ids[:, 0]
    before = History(
        tokens=after.tokens - added,
        in_document=after.in_document - added,
        next_position=after.next_position - added,
        segment_id=after.segment_id,
    )
    return dataclasses.replace(
        info,
        positions=at_places(info.positions, places),
        segment_ids=segment_ids,
        tokens=cut(info.tokens),
        before=before,
        bank_values=cut(info.bank_values),
        keys=None if info.keys is None else _keys_of_last(info.keys, places),
        memory=cut(info.memory),
    )


def _keys_of_last(keys: SharedWeights, places: Int[Array, "B 1"]) -> SharedWeights:
    """The cache has them all: queries find them there."""
    assert keys.v is not None
    return dataclasses.replace(
        keys,
        q=at_places(keys.q, places),
        k=at_places(keys.k, places),
        v=at_places(keys.v, places),
    )
