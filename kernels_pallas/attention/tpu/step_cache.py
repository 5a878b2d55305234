"""How the decoding kernel on TPU sees a cache: as it lies in HBM, cut into blocks of slots.

XLA lays an argument [B, S, Hk, D] out so that it is padded least. A view below has its axes in the
order in which they lie there, so that it costs nothing; another order would copy the whole cache at
every token.

    rows       Hk is 2, 4 or a multiple of 8, D of 128: [B, S * Hk, D], key heads side by side. With
               2 or 4 heads a register holds 128 channels of all of them, and a longer D is cut
               into panels: [B, S * (D / 128) * Hk, 128]. So is a single head of 256 channels in
               float32, whose slots lie one after the other
    heads      another Hk, D a multiple of 128: [B, Hk, S, D]
    channels   another D: [B, Hk, D, S], slots along lanes
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from kernels_pallas.attention.tpu.plan import LANES
from kernels_pallas.common.padding import padded

View = Literal["rows", "heads", "channels"]

# What a block of slots holds for the token: the lowest bits of an entry of the table of blocks.
NONE, SOME, ALL = range(3)
KIND_BITS = 3
KIND_WIDTH = 2


class Views(NamedTuple):
    """The views of both caches."""

    k: View
    v: View

    @property
    def interleaved(self) -> bool:
        """Whether the columns of a tile are (slot, key head) pairs, and not slots of one head."""
        return self.k == "rows"


def views(K: int, V: int, Hk: int, dtype: DTypeLike) -> Views:
    """The views of caches with K and V channels.

    Both or neither are of rows, because these decide what the columns of a tile are.
    """
    heads_fill_registers = Hk in (2, 4) or Hk % 8 == 0
    if Hk == 1 and jnp.dtype(dtype).itemsize == 4:
        # With 128 channels a slot's order is that of a head.
        heads_fill_registers = K > LANES
    # Panels of keys are columns as those of values, so there must be as many.
    same_panels = K == V or Hk % 8 == 0
    if K % LANES == 0 and V % LANES == 0 and heads_fill_registers and same_panels:
        return Views("rows", "rows")
    return Views(_by_head(K), _by_head(V))


def _by_head(D: int) -> View:
    return "heads" if D % LANES == 0 else "channels"


def panels(view: View, D: int, Hk: int) -> int:
    """Into how many panels of 128 channels a slot is cut."""
    return D // LANES if view == "rows" and Hk % 8 else 1


def viewed(cache: Array, view: View) -> Array:
    """A cache [B, S, Hk, D] in one of the orders above."""
    B, S, Hk, D = cache.shape
    if view == "rows":
        count = panels(view, D, Hk)
        by_panel = cache.reshape(B, S, Hk, count, D // count)
        return jnp.swapaxes(by_panel, 2, 3).reshape(B, S * count * Hk, D // count)
    # Key heads first; then slots, or channels.
    order = (0, 2, 1, 3) if view == "heads" else (0, 2, 3, 1)
    return jnp.transpose(cache, order)


def block_table(
    valid: Bool[Array, "B S"],
    slots: int,
    parts: int,
) -> Int[Array, "_"]:
    """Which blocks of slots each part of a row reads, in the order of the grid.

    A block without a valid slot is not read. The others are dealt out to the parts in turns, so
    that these are equally long however few there are. After its last block a part has entries that
    name it again, so that nothing is fetched, and say that there is nothing to compute.

    Args:
      valid: which slots the token may see.
      slots: of a block.
      parts: how many programs share a row.

    Returns:
      int32 [B * parts * entries]: the number of a block, then two bits, its kind.
    """
    B, S = valid.shape
    num_blocks = -(-S // slots)
    # As many entries for each part.
    entries = -(-num_blocks // parts)
    # What lies behind the last slot is not valid.
    by_block = padded(valid, 1, num_blocks * slots).reshape(B, num_blocks, slots)
    some = jnp.any(by_block, axis=2)
    kinds = jnp.where(some, jnp.where(jnp.all(by_block, axis=2), ALL, SOME), NONE)
    # The place of a block among those that are read. Comparisons and sums of few numbers: a sort
    # or a scan would be a program of its own.
    blocks = jnp.arange(num_blocks)
    is_before = (blocks[None, :] < blocks[:, None]).astype(jnp.int32)
    place = jnp.sum(some[:, None, :] * is_before, axis=2)
    count = jnp.sum(some, axis=1, dtype=jnp.int32)[:, None, None]

    # [1, parts, entries]: entry i of part p is block i * parts + p of those.
    turn = jnp.arange(entries)[None, None, :] * parts + jnp.arange(parts)[None, :, None]
    # The part's own last block, or the row's first one where it has none at all.
    last_turn = jnp.arange(parts)[None, :, None]
    last_turn = last_turn + jnp.maximum(count - 1 - last_turn, 0) // parts * parts
    read = jnp.minimum(turn, last_turn)
    # [B, parts, entries, blocks]: at most one block is at a place.
    is_it = some[:, None, None, :] & (place[:, None, None, :] == read[..., None])
    number = jnp.sum(is_it * blocks, axis=3)
    kind = jnp.sum(is_it * kinds[:, None, None, :], axis=3)
    kind = jnp.where(turn < count, kind, NONE)
    return (number * (1 << KIND_WIDTH) + kind).astype(jnp.int32).reshape(-1)
