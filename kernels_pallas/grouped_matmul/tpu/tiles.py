"""What both TPU kernels of `grouped_matmul` share: the list of tiles, copies of rows, the matmul.

The group sizes are values of the run, so the grid cannot depend on them. A kernel begins with a
loop over the sizes, on the scalar unit, that lists in SMEM which groups have rows and where their
tiles begin; its main loop then goes over that list.

Tiles are those of a group, not of the array. A group's first tile begins at the last multiple of
`ROWS` at or before the group's first row, so a group of n rows has at most ceil((n + 15) / tile)
tiles, wherever it begins, and only the first `ROWS` rows of its first tile and those after its last
row can be another group's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int

from kernels_pallas.common.tpu import Ref

# Rows of a packed register of 16-bit numbers: copies of rows begin and end at multiples of it.
ROWS = 16
# Columns of a register, whatever its dtype.
LANES = 128

# A scalar of the kernel: a traced int32, or a number that is known while tracing.
Scalar = Array | int


class TileList(NamedTuple):
    """The tiles of a run, as references to SMEM.

    Groups are numbered by their place in the list: in the order of their rows, those without rows
    left out or listed where they lie.
    """

    group: Ref  # [G + 1] by place: the group's matrix
    group_start: Ref  # [G + 1] by place: the group's first row
    group_end: Ref  # [G + 1] by place: the row after its last
    row: Ref  # [tiles] by tile: its first row
    place: Ref  # [tiles] by tile: the place of its group

    @staticmethod
    def scratch(
        num_rows: int,
        tile_rows: int,
        num_groups: int,
    ) -> "TileList":
        """The scratch shapes of a list that holds the tiles of any group sizes."""
        # One entry more than groups: the rows beyond the last group are listed as one, too.
        places = num_groups + 1
        # Wherever they begin, groups add at most two tiles each to those of the whole array: a last
        # one that is not full, and one because the first begins up to ROWS - 1 rows early.
        tiles = pl.cdiv(num_rows, tile_rows) + 2 * places
        return TileList(
            group=pltpu.SMEM((places,), jnp.int32),
            group_start=pltpu.SMEM((places,), jnp.int32),
            group_end=pltpu.SMEM((places,), jnp.int32),
            row=pltpu.SMEM((tiles,), jnp.int32),
            place=pltpu.SMEM((tiles,), jnp.int32),
        )


class Count(NamedTuple):
    """How much has been listed."""

    row: Array  # the row after the last listed one
    groups: Array
    tiles: Array


def list_tiles(
    tile_list: TileList,
    group_sizes: Ref,
    first_row: Scalar,
    end_row: Scalar,
    tile_rows: int,
    *,
    list_empty: bool,
    after_group: Callable[[Count, Count], None],
) -> Count:
    """Lists the tiles of the rows from `first_row` up to before `end_row`.

    Args:
      tile_list: where to write them.
      group_sizes: [G] in SMEM.
      first_row: the first row to list.
      end_row: the row after the last one to list; groups beyond it have no rows.
      tile_rows: rows of a tile.
      list_empty: a group without rows is listed as one tile, which has none.
      after_group: called with the counts before and after each group, so that the first copies can
        be started before the whole list is made.

    Returns:
      How much has been listed.
    """

    def add_group(group: Array, carry: tuple[Array, Count]) -> tuple[Array, Count]:
        end, before = carry
        # Sizes may count rows that the array does not have.
        end += jnp.minimum(group_sizes[group], end_row - end)
        after = append_group(
            tile_list,
            before,
            group,
            jnp.maximum(end, first_row),
            tile_rows,
            list_empty=list_empty,
        )
        after_group(before, after)
        return end, after

    zero = jnp.int32(0)
    nothing = Count(row=zero + first_row, groups=zero, tiles=zero)
    num_groups = group_sizes.shape[0]
    _, count = jax.lax.fori_loop(0, num_groups, add_group, (zero, nothing))
    return count


def append_group(
    tile_list: TileList,
    count: Count,
    group: Scalar,
    end: Array,
    tile_rows: int,
    *,
    list_empty: bool,
) -> Count:
    """Lists the rows from `count.row` up to before `end` as one more group.

    Args:
      tile_list: where to write its tiles.
      count: how much has been listed.
      group: the number of its matrix.
      end: the row after its last.
      tile_rows: rows of a tile.
      list_empty: whether a group without rows is one tile, or none.

    Returns:
      How much has been listed now.
    """
    first = align_down(count.row)
    tiles_with_rows = (end - first + tile_rows - 1) // tile_rows
    tiles = jnp.where(end > count.row, tiles_with_rows, int(list_empty))

    @pl.when(tiles > 0)
    def _():
        tile_list.group[count.groups] = group
        tile_list.group_start[count.groups] = count.row
        tile_list.group_end[count.groups] = end

    @pl.loop(0, tiles)
    def _(i):
        tile_list.row[count.tiles + i] = first + i * tile_rows
        tile_list.place[count.tiles + i] = count.groups

    return Count(
        row=end,
        groups=count.groups + (tiles > 0).astype(jnp.int32),
        tiles=count.tiles + tiles,
    )


class Tile(NamedTuple):
    """One tile of the list."""

    index: Scalar  # of the tile
    place: Array  # of its group
    group: Array  # its group's matrix
    row: Array  # the tile's first row
    group_start: Array  # the group's first row
    group_end: Array  # the row after the group's last

    @property
    def is_first(self) -> Array:
        """Whether it is its group's first tile."""
        return self.row == align_down(self.group_start)

    def is_last(self, tile_rows: int) -> Array:
        """Whether it is its group's last tile."""
        return self.group_end <= self.row + tile_rows

    def used_rows(self, tile_rows: int) -> Array:
        """Rows of the tile up to the group's last, the neighbor's in front of it included."""
        return jnp.minimum(self.group_end - self.row, tile_rows)


def read_tile(tile_list: TileList, index: Scalar) -> Tile:
    """The tile of that number."""
    place = tile_list.place[index]
    return Tile(
        index=index,
        place=place,
        group=tile_list.group[place],
        row=tile_list.row[index],
        group_start=tile_list.group_start[place],
        group_end=tile_list.group_end[place],
    )


# --- rows


def align_down(row: Array) -> Array:
    """The last multiple of `ROWS` at or before `row`."""
    # In two's complement, -ROWS has all bits set except those below ROWS.
    return row & -ROWS


def align_up(row: Array) -> Array:
    """The first multiple of `ROWS` at or after `row`."""
    return align_down(row + ROWS - 1)


def row_numbers(size: int, first: Scalar) -> Int[Array, "{size} 1"]:
    """first, first + 1, ... as a column."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def row_slice(first: Array, size: int) -> pl.Slice:
    """`size` rows from `first` on, which is a multiple of `ROWS`: the compiler must know that."""
    return pl.ds(pl.multiple_of(first, ROWS), size)


def column_slice(block: Array, size: int) -> pl.Slice:
    """The columns of a block of `size`, a multiple of `LANES`."""
    return pl.ds(pl.multiple_of(block * size, LANES), size)


def vmem_like(arrays: Sequence[Array | jax.ShapeDtypeStruct], *shape: int) -> list[Any]:
    """VMEM of this shape for each array, of its dtype."""
    return [pltpu.VMEM(shape, x.dtype) for x in arrays]


def copy_rows(
    copy: Callable[[Array, int], None],
    count: Array,
    tile_rows: int,
    array_rows: int,
) -> None:
    """Calls `copy(first, size)` for the first `count` rows of a tile, in pieces of static size.

    A copy's size must be known to the compiler, `count` is not: so there is a piece for each binary
    digit of `count` that is 1, the largest one first.

    Args:
      copy: begins a copy, or waits for it. Its `first` is a multiple of `ROWS`.
      count: a multiple of `ROWS`, at most `tile_rows`.
      tile_rows: rows of a tile, a power of two; a full tile is one piece.
      array_rows: rows of the whole array; no piece is larger.
    """
    size = tile_rows
    while size >= ROWS:
        if size <= array_rows:
            _copy_piece(copy, count, size)
        size //= 2


def _copy_piece(
    copy: Callable[[Array, int], None],
    count: Array,
    size: int,
) -> None:
    @pl.when(count & size > 0)
    def _():
        # The digits above this one: the rows that larger pieces have copied.
        copy(count & (-2 * size), size)


# What `pltpu.make_async_copy` returns; its type is not public.
AsyncCopy = Any
# What to do with a copy: `start` or `wait`. So each copy is described in one place for both.
CopyAction = Callable[[AsyncCopy], None]


def start(copy: AsyncCopy) -> None:
    """Starts a copy."""
    copy.start()


def wait(copy: AsyncCopy) -> None:
    """Waits until a copy that was started has arrived."""
    copy.wait()


# --- arithmetic


def run_smallest_case(
    count: Array,
    sizes: tuple[int, ...],
    body: Callable[[int], None],
) -> None:
    """Runs `body(size)` for the least of `sizes` that holds `count` rows; nothing if `count` <= 0.

    The body is compiled once for each size, as shapes must be known to the compiler.
    """
    below = 0
    for size in sizes:
        _run_case((below < count) & (count <= size), size, body)
        below = size


def _run_case(
    condition: Array,
    size: int,
    body: Callable[[int], None],
) -> None:
    @pl.when(condition)
    def _():
        body(size)


def matmul(
    x: Array,
    y: Array,
    x_axis: int,
    y_axis: int,
) -> Array:
    """The product summed over these axes, in float32; float32 operands keep all their bits."""
    exact = x.dtype == jnp.float32
    contracted = ((x_axis,), (y_axis,))
    no_batch = ((), ())
    return jax.lax.dot_general(
        x,
        y,
        (contracted, no_batch),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
