"""What both TPU kernels of `grouped_matmul` share: the list of tiles that a run's group sizes ask for, and row copies.

A kernel is steered by the group sizes alone. It begins with a walk over them, on the scalar unit, that leaves in SMEM
which groups have rows and where their tiles begin. Tiles are those of a group, not of the array: the first begins at
the last multiple of `ROWS` at or before the group's first row, so a group of n rows is ceil((n + 15) / tile) tiles at
most, wherever it begins, and only its first `ROWS` rows and its last ones can be another group's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 16  # of a packed register of 16-bit numbers: copies of rows begin and end at multiples


class Walk(NamedTuple):
    """References to SMEM. Groups are numbered in the order of their rows; those of no rows come where they stand."""

    group: Array  # [G + 1] the matrix of each group that is visited
    start: Array  # [G + 1] its first row
    end: Array  # [G + 1] the row after its last
    row: Array  # [tiles] where each tile begins
    of: Array  # [tiles] the place in the list of groups that it belongs to

    @staticmethod
    def scratch(rows: int, tile: int, num_groups: int) -> "Walk":
        tiles = -(-rows // tile) + 2 * (num_groups + 1)
        smem = lambda size: pltpu.SMEM((size,), jnp.int32)
        return Walk(*(smem(n) for n in (num_groups + 1,) * 3 + (tiles,) * 2))


class Count(NamedTuple):
    """How far a walk went."""

    row: Array  # the row after the last counted one
    groups: Array
    tiles: Array


def plan(
    walk: Walk, sizes, num_groups: int, rows: tuple, tile: int, empty: bool, found: Callable
) -> Count:
    """Fills the lists with the groups' rows from rows[0] up to before rows[1]; `empty`: a group of none is one tile.

    `found(before, after)` is called between one group and the next: the first copies need not wait for the whole walk.
    """
    low, high = rows

    def group(g, carry):
        end, before = carry
        end += jnp.minimum(sizes[g], high - end)
        after = append(walk, before, g, jnp.maximum(end, low), tile, empty)
        found(before, after)
        return end, after

    zero = jnp.int32(0)
    return jax.lax.fori_loop(0, num_groups, group, (zero, Count(zero + low, zero, zero)))[1]


def append(walk: Walk, count: Count, g, end, tile: int, empty: bool) -> Count:
    """The lists with the rows count.row .. end - 1 as one more group."""
    first = aligned(count.row)
    tiles = jnp.where(end > count.row, (end - first + tile - 1) // tile, int(empty))

    @pl.when(tiles > 0)
    def _():
        walk.group[count.groups], walk.start[count.groups], walk.end[count.groups] = (
            g,
            count.row,
            end,
        )

    @pl.loop(0, tiles)
    def _(i):
        walk.row[count.tiles + i], walk.of[count.tiles + i] = first + i * tile, count.groups

    return Count(end, count.groups + (tiles > 0), count.tiles + tiles)


def aligned(row):
    """The last multiple of `ROWS` at or before `row`."""
    return row & -ROWS


class Visit(NamedTuple):
    """One tile of the walk."""

    index: Array
    place: Array  # of its group in the list
    group: Array
    row: Array  # where it begins
    start: Array  # the group's first row
    end: Array  # the row after the group's last

    @property
    def first(self):
        """Whether it is its group's first tile."""
        return self.row == aligned(self.start)

    def used(self, tile: int):
        """Rows of the tile up to the group's last."""
        return jnp.minimum(self.end - self.row, tile)

    def last(self, tile: int):
        return self.end <= self.row + tile


def visit(walk: Walk, index) -> Visit:
    place = walk.of[index]
    return Visit(
        index, place, walk.group[place], walk.row[index], walk.start[place], walk.end[place]
    )


def copy_rows(copy: Callable, count, tile: int, rows: int) -> None:
    """Calls `copy(first, size)` for `count` rows of an array of `rows`, in pieces of static size: its binary digits.

    `count` and `first` are multiples of `ROWS`; a full tile is one piece.
    """
    size = tile
    while size >= ROWS:
        if size <= rows:

            @pl.when(count & size > 0)
            def _(size=size):
                copy(pl.multiple_of(count & -2 * size, ROWS), size)

        size //= 2


def cases(count, sizes: tuple[int, ...], body: Callable) -> None:
    """`body(size)` for the least of `sizes` that holds `count` rows: the code of each is compiled, one runs."""
    below = 0
    for size in sizes:

        @pl.when((below < count) & (count <= size))
        def _(size=size):
            body(size)

        below = size


def rows_of(size: int, first) -> Array:
    """int32 [size, 1]: first, first + 1, ..."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
