"""The decoding cache of attention: a ring of keys and values.

Slots are counted in tokens of the row, over all of its documents, so every row is at its own place.
A document's tokens stand next to each other: what a query may see is said by distances alone.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.selective_rope import RopePhase, empty_phase
from gatedjax.layers.shared_weights import SharedWeights, ValueCache
from gatedjax.layers.sinks import num_sink_channels
from gatedjax.layers.token_info import History


@struct.dataclass
class KVCache:
    """Keys (after rotation) and values of past tokens.

    The row's token i (from 0) is in slot i mod S: a ring for windows. With Selective RoPE also
    where the rotation stands.
    """

    # Leading axes: the model stacks the caches of a layer over periods.
    k: Float[Array, "... B S Hk K"]
    v: Float[Array, "... B S Hk V"]
    phase: RopePhase | None = None


def empty_cache(
    config: GatedAttentionConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
) -> KVCache | ValueCache:
    """An empty cache for `length` tokens; a window needs no more than its own slots.

    Args:
      config: of the attention layer.
      batch: rows.
      length: the most tokens that a row will have.
      dtype: of keys and values.

    Returns:
      A cache of zeros; of values alone where the weights are another layer's.
    """
    slots = length if config.window is None else min(config.window, length)
    value_channels = config.head_dim
    key_channels = value_channels
    if config.token_sinks:
        key_channels += num_sink_channels(dtype)
    if config.similarity == "gaussian":
        # The squares of queries and of keys.
        key_channels += 2 * num_sink_channels(dtype)
    shape = (batch, slots, config.kv_heads)
    v = jnp.zeros((*shape, value_channels), dtype)
    if config.shares_weights:
        return ValueCache(v)
    return KVCache(
        k=jnp.zeros((*shape, key_channels), dtype),
        v=v,
        phase=empty_phase(config, batch, dtype),
    )


def capacity(config: GatedAttentionConfig, cache: KVCache | ValueCache) -> int | None:
    """The most tokens that a row may have; None where the cache is a ring of a whole window."""
    slots = cache.v.shape[-3]
    is_ring = config.window is not None and slots >= config.window
    return None if is_ring else slots


def append(
    cache: KVCache,
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    before: History,
    segment_ids: Int[Array, "B T"] | None,
) -> KVCache:
    """The cache with T more tokens of each row.

    Args:
      cache: keys and values of the tokens before.
      k: of the new tokens.
      v: of the new tokens.
      before: what the cache holds.
      segment_ids: 0 for padding, which comes last and is not kept; None for no padding.
    """
    return KVCache(
        k=append_to_slots(cache.k, k, before, segment_ids),
        v=append_to_slots(cache.v, v, before, segment_ids),
    )


def append_values(
    cache: KVCache,
    v: Float[Array, "B T Hk V"],
    before: History,
    segment_ids: Int[Array, "B T"] | None,
    weights: SharedWeights | None,
) -> KVCache:
    """`append` where the keys are another layer's, which has appended them.

    Args:
      cache: its keys of the tokens before, own values.
      v: of the new tokens.
      before: what the cache holds.
      segment_ids: 0 for padding, which comes last and is not kept; None for no padding.
      weights: of that layer.
    """
    assert weights is not None and weights.cached is not None
    return KVCache(weights.cached, append_to_slots(cache.v, v, before, segment_ids))


def joined(
    cache: KVCache | ValueCache | None,
    weights: SharedWeights | None,
) -> KVCache | None:
    """The cache as the op wants it: with the keys of the layer whose weights are shared."""
    if not isinstance(cache, ValueCache):
        return cache
    if weights is None or weights.held is None:
        raise ValueError("info.weights: got no cached keys, expected those of the layer before")
    return KVCache(weights.held, cache.v)


def held_of(keys: SharedWeights | None) -> KVCache | None:
    """The other layer's cache before these tokens; None without caches."""
    if keys is None or keys.held is None or keys.held_values is None:
        return None
    return KVCache(keys.held, keys.held_values)


def cached_of(keys: SharedWeights | None) -> KVCache:
    """The other layer's cache with these tokens."""
    assert keys is not None and keys.cached is not None and keys.cached_values is not None
    return KVCache(keys.cached, keys.cached_values)


def append_to_slots(
    old: Float[Array, "B S ..."],
    new: Float[Array, "B T ..."],
    before: History,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B S ..."]:
    """A ring of S slots with T more tokens of each row.

    Args:
      old: what the slots hold.
      new: of the new tokens.
      before: what the cache holds.
      segment_ids: 0 for padding, which comes last and is not kept; None for no padding.
    """
    slots = old.shape[1]
    count = num_tokens(new, segment_ids)[:, None]
    place = jnp.arange(new.shape[1])
    slot = (before.tokens[:, None] + place) % slots
    # Of more tokens than there are slots, only the last ones have one.
    is_kept = (place < count) & (place >= count - slots)
    # A slot that does not exist: dropped.
    slot = jnp.where(is_kept, slot, slots)

    @jax.vmap
    def write(
        old: Array,
        new: Array,
        slot: Array,
    ) -> Array:
        return old.at[slot].set(new.astype(old.dtype), mode="drop")

    return write(old, new, slot)


def distances_of_slots(
    slots: int,
    before: History,
    segment_ids: Int[Array, "B 1"] | None,
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """How far back the token of each slot is from the one that was just added, and if it is seen.

    Args:
      slots: S.
      before: what the cache held before that token.
      segment_ids: of that token; None if it goes on with the row's document.
    """
    in_document = before.in_document
    if segment_ids is not None:
        in_document = jnp.where(segment_ids[:, 0] == 1, in_document, 0)
    # Slot s holds the newest token that is s modulo S; before the ring has gone round once, some
    # slots hold nothing. They are further back than the document is long.
    distances = (before.tokens[:, None] - jnp.arange(slots)) % slots
    return distances, distances <= in_document[:, None]


def in_time_order(
    cache: KVCache,
    before: History,
) -> tuple[KVCache, Bool[Array, "B S"]]:
    """Keys and values with the newest token last, and which of them the row's document has.

    What is not of that document is zero: a slot that was never written may hold anything.
    """
    k, is_held = slots_in_time_order(cache.k, before)
    v, _ = slots_in_time_order(cache.v, before)
    return KVCache(k, v), is_held


def slots_in_time_order(
    x: Float[Array, "B S ..."],
    before: History,
) -> tuple[Float[Array, "B S ..."], Bool[Array, "B S"]]:
    """`in_time_order` of what a ring of S slots holds."""
    slots = x.shape[1]
    # The row's tokens tokens - S .. tokens - 1; negative ones were never there.
    index = before.tokens[:, None] - slots + jnp.arange(slots)
    is_held = index >= (before.tokens - before.in_document)[:, None]
    channels = (1,) * (x.ndim - 2)
    slot = (index % slots).reshape(*index.shape, *channels)
    by_time = jnp.take_along_axis(x, slot, axis=1)
    return jnp.where(is_held.reshape(slot.shape), by_time, 0), is_held


def num_tokens(
    x: Float[Array, "B T ..."],
    segment_ids: Int[Array, "B T"] | None,
) -> Int[Array, " B"]:
    """The tokens of each row, without padding."""
    if segment_ids is None:
        return jnp.full(x.shape[0], x.shape[1], jnp.int32)
    return jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
