"""What decoding holds of the tokens before, and what each new token reads of it, in bytes."""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax

from gatedjax.config import BlockConfig, ModelConfig
from gatedjax.config.sources import GatedMemoryConfig, takes_keys
from gatedjax.layers.block import init_block_cache


class CacheBytes(NamedTuple):
    """Bytes of all rows and layers.

    Attributes:
      held: by the caches.
      with_own_keys: they would hold if each attention layer had keys and values of its own.
      read: of the caches by each new token; a cache that layers share once for each of them.
      read_with_attention: it would read if units on a scan's memory were attention on the cache
        that the layers beside them share.
    """

    held: int
    with_own_keys: int
    read: int
    read_with_attention: int


def cache_bytes(config: ModelConfig, rows: int, tokens: int) -> CacheBytes:
    """Of caches with room for so many tokens a row, all of them there.

    Args:
      config: of the model.
      rows: how many are decoded together.
      tokens: of each row.
    """
    held = 0
    shared = 0
    saved_by_unit = 0
    for block in config.blocks:
        layers = len(block.layers)
        held += layers * _bytes_of(config, block, rows, tokens)
        mixer = block.mixer
        if takes_keys(mixer):
            own = dataclasses.replace(mixer, shares_cache=False)
            keys = _bytes_of(config, dataclasses.replace(block, mixer=own), rows, tokens)
            shared += layers * keys
            saved_by_unit = keys
    units = 0
    for block in config.blocks:
        if isinstance(block.mixer, GatedMemoryConfig):
            units += len(block.layers)
    read = held + shared
    found = CacheBytes(held, held + shared, read, read + units * saved_by_unit)
    if config.router_model is not None:
        of_router = cache_bytes(config.router_model, rows, tokens)
        found = CacheBytes(*map(operator.add, found, of_router))
    if config.first_pass is None:
        return found
    # Each pass has caches of its own.
    return CacheBytes(*(2 * count for count in found))


def _bytes_of(config: ModelConfig, block: BlockConfig, rows: int, tokens: int) -> int:
    """Of the cache of one of the block's layers."""
    make: Any = functools.partial(init_block_cache, config, block, rows, tokens)
    cache = jax.eval_shape(make)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def as_text(found: CacheBytes, tokens: int) -> str:
    """One line for a person, of one row with so many tokens."""
    text = f"{_size(found.held)} after {tokens:,} tokens"
    if found.with_own_keys > found.held:
        saved = _size(found.with_own_keys - found.held)
        text += f", {saved} less than with own keys and values in all attention layers"
    if found.read_with_attention > found.read:
        saved = _size(found.read_with_attention - found.read)
        text += f"; a token reads {_size(found.read)}, {saved} less than without memory units"
    return text


def _size(count: int) -> str:
    """Bytes, as a person reads them."""
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:,.2f} MiB"
    return f"{count / 2**10:,.1f} KiB"
