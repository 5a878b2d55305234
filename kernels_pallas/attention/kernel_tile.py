"""A tile of logits as the TPU and GPU kernels have it: in either orientation, with its positions.

A tile is [queries, keys], or transposed, [keys, queries]. Nothing below has to know which: the
formulas are those of `attention/tile.py` that work element by element.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention import tile


class Positions(NamedTuple):
    """The positions in the sequence of a tile's queries and keys, int32.

    One of them runs down the rows, [R, 1], and the other along the columns, [1, C], so that they
    broadcast to the tile. Segment ids have the shapes of the positions; None without segments.
    """

    queries: Array
    keys: Array
    query_segments: Array | None = None
    key_segments: Array | None = None

    def distance(self) -> Array:
        """|i - j| of every query i and key j, for ALiBi."""
        return jnp.abs(self.queries - self.keys)

    def same_segment(self) -> Array | None:
        """The mask of segments alone; None without segments."""
        return tile.visible_pairs(
            self.queries,
            self.keys,
            query_segments=self.query_segments,
            key_segments=self.key_segments,
        )


class Logits(NamedTuple):
    """A tile of logits before the mask.

    Attributes:
      values: after the soft cap and the slopes, as the normalizer takes them.
      capped: before the slopes; the gradient of the soft cap is a function of these.
      distance: float32 |i - j|, for the gradient of the slopes; None without slopes.
    """

    values: Array
    capped: Array
    distance: Array | None


def with_slopes(capped: Array, slope: Array | None, distance: Array | None) -> Logits:
    """The logits less slope * distance; `slope` and `distance` are both None without slopes."""
    if slope is None or distance is None:
        return Logits(values=capped, capped=capped, distance=None)
    distance = distance.astype(jnp.float32)
    return Logits(
        values=capped - slope * distance,
        capped=capped,
        distance=distance,
    )
