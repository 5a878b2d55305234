"""Sequences in groups of chunks: what the XLA paths of the scans share.

A `lax.scan` runs over groups of a few chunks; inside a group the chunks are computed together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.padding import padded, power_of_two, round_up

DEFAULT_CHUNK = 64
MAX_CHUNKS_IN_GROUP = 4


class Grouping(NamedTuple):
    """How a sequence is divided.

    Attributes:
      chunk: tokens in a chunk.
      chunks: chunks in a group.
    """

    chunk: int
    chunks: int

    @property
    def length(self) -> int:
        """Tokens in a group."""
        return self.chunk * self.chunks


def grouping(T: int, chunk_size: int | None) -> Grouping:
    """How T tokens are divided.

    For every rank of a log decay within 10 to 20 % of the fastest on CPU: groups of one chunk cost
    up to 1.6 x, groups of sixteen up to 1.8 x. Groups are made equal, so that there is less than
    one chunk of padding per group.
    """
    chunk = min(chunk_size or DEFAULT_CHUNK, power_of_two(T))
    num_chunks = -(-T // chunk)
    num_groups = -(-num_chunks // MAX_CHUNKS_IN_GROUP)
    chunks_in_group = -(-num_chunks // num_groups)
    return Grouping(chunk, chunks_in_group)


def split_into_groups(groups: Grouping, arrays):
    """[B, T, ...] -> [N, B, L, ...] for a tree of arrays, with L tokens in each of N groups.

    Zeros at the end: tokens that change no state.
    """

    def split(x: Array) -> Array:
        B, T, *rest = x.shape
        x = padded(x, 1, round_up(T, groups.length))
        # Groups first: `lax.scan` runs over axis 0.
        split_x = x.reshape(B, -1, groups.length, *rest)
        return jnp.moveaxis(split_x, 1, 0)

    return jax.tree.map(split, arrays)


def join_groups(x: Array, T: int) -> Array:
    """[N, B, L, ...] -> [B, T, ...]."""
    _, B, _, *rest = x.shape
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(B, -1, *rest)[:, :T]


def split_into_chunks(
    groups: Grouping,
    x: Array,
    num_heads: int,
) -> Array:
    """[B, L, heads, D] -> [B, num_heads, n, C, D].

    Heads are repeated over one group only, never over T.
    """
    B, _, heads, D = x.shape
    x = x.reshape(B, groups.chunks, groups.chunk, heads, D)
    # [B, n, C, heads, D] -> [B, heads, n, C, D]
    x = jnp.moveaxis(x, 3, 1)
    return jnp.repeat(x, num_heads // heads, axis=1)
