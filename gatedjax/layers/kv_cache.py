"""The decoding cache of attention: a ring of keys and values."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig


@struct.dataclass
class KVCache:
    """Keys (after rotation) and values of past tokens.

    Position p is in slot p mod S: a ring for windows.
    """

    # Leading axes: the model stacks the caches of a layer over periods.
    k: Float[Array, "... B S Hk D"]
    v: Float[Array, "... B S Hk D"]


def empty_cache(
    config: GatedAttentionConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
) -> KVCache:
    """An empty cache for `length` tokens; a window needs no more than its own slots.

    Args:
      config: of the attention layer.
      batch: rows.
      length: the most tokens that a row will have.
      dtype: of keys and values.

    Returns:
      A cache of zeros.
    """
    slots = length if config.window is None else min(config.window, length)
    shape = (batch, slots, config.kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def fill(
    cache: KVCache,
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
) -> KVCache:
    """The cache after a prompt of T tokens, at positions from 0 on.

    It holds the last S of them, each in slot position mod S.
    """
    slots = cache.k.shape[1]
    length = k.shape[1]
    # A prompt longer than the ring: only its last tokens have a slot.
    first_kept = length - min(slots, length)
    slot_of_token = jnp.arange(first_kept, length) % slots

    def write(old: Array, new: Array) -> Array:
        return old.at[:, slot_of_token].set(new[:, first_kept:].astype(old.dtype))

    return KVCache(write(cache.k, k), write(cache.v, v))


def append_token(
    cache: KVCache,
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hk D"],
    position: Int[Array, " B"],
) -> tuple[KVCache, Int[Array, "B S"]]:
    """The cache with one more token, and how far back the token of each slot is.

    Args:
      cache: keys and values of the tokens before.
      k: the token's key.
      v: the token's value.
      position: where the token is in its document.

    Returns:
      The new cache, and the distances. Slots that hold nothing yet are further back than the
      document is long.
    """
    slots = cache.k.shape[1]
    slot = position % slots

    @jax.vmap
    def write(
        old: Array,
        new: Array,
        slot: Array,
    ) -> Array:
        return jax.lax.dynamic_update_index_in_dim(
            old,
            new.astype(old.dtype),
            slot,
            axis=0,
        )

    # Slot s holds the newest position <= p that is s modulo S; before the ring has gone round once,
    # some slots hold nothing.
    distances = (position[:, None] - jnp.arange(slots)) % slots
    return KVCache(write(cache.k, k, slot), write(cache.v, v, slot)), distances
