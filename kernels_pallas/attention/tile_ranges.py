"""Which tiles a program of a kernel computes.

A program has one block of tokens of its own, and loops over the blocks of the other kind that they
see, or that see them. Tiles that the mask hides entirely are in no range, and only those that it
cuts have to compare positions.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax


class MaskPlan(Protocol):
    """What ranges depend on: static arguments of a call, which every kernel's plan has."""

    @property
    def causal(self) -> bool: ...

    @property
    def window(self) -> int | None: ...

    # The true number of tokens, and that of whole blocks.
    @property
    def T(self) -> int: ...

    @property
    def length(self) -> int: ...


class Reach(NamedTuple):
    """How far a token sees along the sequence, or is seen from, in tokens."""

    # Toward the start of the sequence, and toward its end.
    before: int
    after: int

    def transposed(self) -> "Reach":
        """The reach of keys: how far away the queries are that see a key."""
        return Reach(before=self.after, after=self.before)


def reach_of_queries(plan: MaskPlan) -> Reach:
    """How far a query sees."""
    far = plan.length
    if plan.window is not None:
        # |i - j| < window
        far = min(plan.window - 1, plan.length)
    return Reach(before=far, after=0 if plan.causal else far)


class TileRange(NamedTuple):
    """Consecutive blocks of a loop."""

    first: Array
    # One after the last.
    end: Array
    # Whether positions can hide anything in these tiles.
    by_position: bool


def tile_ranges(
    plan: MaskPlan,
    reach: Reach,
    n: Array,
    block: int,
    other_block: int,
    limits: tuple[Array, Array] | None,
) -> list[TileRange]:
    """The blocks that a program loops over; no range is of tiles that the mask hides entirely.

    Args:
      plan: the static arguments.
      reach: of the tokens of the program's block.
      n: the number of the program's block.
      block: tokens in the program's block.
      other_block: tokens in a block of the loop.
      limits: (first, end) of the blocks that share a segment with the program's, or None.

    Returns:
      The ranges, in the order of the loop.
    """

    def block_of(position: Array) -> Array:
        # Not //, which rounds down and so costs a comparison: positions are never negative.
        return lax.div(jnp.int32(position), jnp.int32(other_block))

    first_token = n * block
    last_token = n * block + block - 1
    # What any token of this block sees: from the first one's reach backward to the last one's
    # forward. `end` is rounded up to whole blocks.
    first = block_of(jnp.maximum(first_token - reach.before, 0))
    end = block_of(jnp.minimum(last_token + reach.after + 1, plan.T) + other_block - 1)
    if limits is not None:
        # Blocks of other segments are left out, of which no mask would leave anything.
        first_of_segments, end_of_segments = limits
        first = jnp.maximum(first, first_of_segments)
        end = jnp.minimum(end, end_of_segments)
    # Of padding alone there may be nothing to see; a count is never negative.
    end = jnp.maximum(first, end)

    # In between are the blocks that every token of this block sees entirely: from the last token's
    # reach backward, rounded up, to the first one's forward, rounded down.
    full_first = block_of(jnp.maximum(last_token - reach.before, 0) + other_block - 1)
    full_end = block_of(jnp.minimum(first_token + reach.after + 1, plan.T))
    full_first = jnp.clip(full_first, first, end)
    full_end = jnp.clip(full_end, full_first, end)

    ranges = [
        TileRange(full_first, full_end, by_position=False),
        TileRange(full_end, end, by_position=True),
    ]
    if reach.before >= plan.length:
        # Nothing is cut before the full blocks.
        return ranges
    return [TileRange(first, full_first, by_position=True), *ranges]
