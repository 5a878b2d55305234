"""lhs^T dout over the rows of each group, on TPU: the gradient of the matrices.

The grid is the blocks of one group's [K, N] result, `inner` x `columns`; the cores share its first
axis, the blocks of K or, where those do not divide, the blocks of N. For its block a program loops
over the tiles of all rows, as `tiles.py` lists them, and so over the groups.

In VMEM are, for each of `buffers` tiles, the rows of the left operands and of dout, of which only
the block's columns; the float32 sum of one group; and for each of `buffers` groups its finished
block, on its way to HBM. A group's sum stays while its rows pass; a group whose rows fit into one
tile is one matmul with nothing added up. The rows are read once for each block; nothing is
recomputed.

Rows of neighboring groups are in a group's first and last registers. They are zeroed in VMEM, at
the ends of a group only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Interpret, Ref
from kernels_pallas.grouped_matmul.tpu import per_row, tiles
from kernels_pallas.grouped_matmul.tpu.tiles import ROWS, Count, Tile, TileList


class Schedule(NamedTuple):
    """How the kernel is split into blocks. Only its time depends on this."""

    tile_rows: int  # a power of two
    inner: int  # rows of the result at a time
    columns: int  # columns of the result at a time
    buffers: int  # tiles of rows and results in VMEM; a power of two
    columns_first: bool  # in the grid: the cores share the blocks of columns
    step: tuple[int, int]  # rows and columns of the result of one matmul
    # Row counts of a matmul, ascending: a group's last rows take the least that holds them.
    row_counts: tuple[int, ...]
    vmem: int  # bytes that the compiler may take


class OuterOptions(NamedTuple):
    """The static arguments of `outer_by_group`."""

    name: str
    interpret: Interpret
    # (part of each left operand, scale) -> what is multiplied in their place, elementwise
    operand: Callable[..., Array] | None = None


class OuterInputs(NamedTuple):
    """The arrays of `outer_by_group`: R rows, sorted by group."""

    lefts: Sequence[Float[Array, "R K"]]  # one, or several that `operand` makes one of
    dout: Float[Array, "R N"]
    group_sizes: Int[Array, "G"]
    scale: Float[Array, "R"] | Float[Array, "L 128"] | None = None  # one number for each row


def outer_by_group(
    options: OuterOptions,
    schedule: Schedule,
    inputs: OuterInputs,
) -> Float[Array, "G K N"]:
    """The kernel's call.

    Args:
      options: static.
      schedule: static; see `tuning.outer_schedule`.
      inputs: R a multiple of `ROWS`, K and N of 128; the scale as `per_row.in_lines` has it.

    Returns:
      lhs^T dout for each group, in dout's dtype; zeros for groups without rows.
    """
    lefts, dout, group_sizes, scale = inputs
    R, K = lefts[0].shape
    N = dout.shape[1]
    inner_blocks = K // schedule.inner
    column_blocks = N // schedule.columns
    grid = (inner_blocks, column_blocks)
    if schedule.columns_first:
        grid = (column_blocks, inner_blocks)
    G = len(group_sizes)
    out = like(dout, (G, K, N), dout.dtype)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    scale_spec = None
    if scale is not None:
        scale_spec = pl.BlockSpec(scale.shape, lambda *_: (0, 0))
    # Every block reads all rows, but of each operand its own columns only.
    bytes_of_lefts = moved(lefts) * column_blocks
    bytes_of_dout = moved([dout]) * inner_blocks
    call = pl.pallas_call(
        partial(_kernel, options, schedule),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[[in_hbm] * len(lefts), in_hbm, scale_spec],
            out_specs=in_hbm,
            scratch_shapes=[_scratch(schedule, inputs)],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=schedule.vmem,
            # As in `rows.py`: rows and groups are clamped to the arrays.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * K * N,
            transcendentals=0,
            bytes_accessed=bytes_of_lefts + bytes_of_dout + moved([out]),
        ),
        interpret=options.interpret,
        name=options.name,
    )
    return call(
        group_sizes,
        list(lefts),
        dout,
        scale,
    )


class _Scratch(NamedTuple):
    """VMEM, SMEM and semaphores of the kernel."""

    lefts: list[Ref]  # VMEM [buffers, tile_rows, inner]; the first becomes what is multiplied
    dout: Ref  # VMEM [buffers, tile_rows, columns]
    total: Ref  # VMEM [inner, columns], float32
    out: Ref  # VMEM [buffers, inner, columns]
    tile_list: TileList  # SMEM
    in_sem: Ref
    out_sem: Ref

    @property
    def operands(self) -> tuple[Ref, Ref]:
        """Both operands of the matmul."""
        return self.lefts[0], self.dout


def _scratch(schedule: Schedule, inputs: OuterInputs) -> _Scratch:
    """The shapes of the scratch memory."""
    buffers = schedule.buffers
    tile_rows = schedule.tile_rows
    inner = schedule.inner
    columns = schedule.columns
    dout = inputs.dout
    num_rows = dout.shape[0]
    num_groups = len(inputs.group_sizes)
    return _Scratch(
        lefts=tiles.vmem_like(inputs.lefts, buffers, tile_rows, inner),
        dout=pltpu.VMEM((buffers, tile_rows, columns), dout.dtype),
        total=pltpu.VMEM((inner, columns), jnp.float32),
        out=pltpu.VMEM((buffers, inner, columns), dout.dtype),
        tile_list=TileList.scratch(num_rows, tile_rows, num_groups),
        # One semaphore for each copy that may be under way.
        in_sem=pltpu.SemaphoreType.DMA((len(inputs.lefts) + 1, buffers)),
        out_sem=pltpu.SemaphoreType.DMA((buffers,)),
    )


class _Refs(NamedTuple):
    """Everything that a program of the kernel can reach, and how its copies are described."""

    options: OuterOptions
    schedule: Schedule
    inner: pl.Slice  # rows of the result that the program computes
    columns: pl.Slice  # columns of the result that it computes
    group_sizes: Ref  # SMEM [G]
    lefts: list[Ref]  # HBM [R, K]
    dout: Ref  # HBM [R, N]
    scale: Ref | None  # VMEM [L, 128]
    out: Ref  # HBM [G, K, N]
    scratch: _Scratch

    def tile(self, index: tiles.Scalar) -> Tile:
        """A tile of the list."""
        return tiles.read_tile(self.scratch.tile_list, index)

    def tile_slot(self, tile: Tile) -> tiles.Scalar:
        """Which of the buffers of rows a tile has: they are taken in turn."""
        return tile.index % self.schedule.buffers

    def copy_in(
        self,
        tile: Tile,
        action: tiles.CopyAction,
    ) -> None:
        """HBM to VMEM: the tile's rows of the left operands and of dout."""
        scratch = self.scratch
        for i, (source, to) in enumerate(zip(self.lefts, scratch.lefts)):
            self._copy_in(tile, action, source, to, self.inner, i)
        self._copy_in(
            tile,
            action,
            self.dout,
            scratch.dout,
            self.columns,
            len(self.lefts),
        )

    def _copy_in(
        self,
        tile: Tile,
        action: tiles.CopyAction,
        source: Ref,
        to: Ref,
        columns: pl.Slice,
        semaphore: int,
    ) -> None:
        slot = self.tile_slot(tile)
        tile_rows = self.schedule.tile_rows

        def copy(first: Array, size: int) -> None:
            rows_in_array = tiles.row_slice(tile.row + first, size)
            rows_in_tile = tiles.row_slice(first, size)
            action(
                pltpu.make_async_copy(
                    source.at[rows_in_array, columns],
                    to.at[slot, rows_in_tile],
                    self.scratch.in_sem.at[semaphore, slot],
                )
            )

        count = tiles.align_up(tile.used_rows(tile_rows))
        tiles.copy_rows(
            copy,
            count,
            tile_rows,
            source.shape[0],
        )

    def copy_out(
        self,
        place: Array,
        action: tiles.CopyAction,
    ) -> None:
        """VMEM to HBM: the block of the result of the group at a place of the list."""
        slot = place % self.schedule.buffers
        group = self.scratch.tile_list.group[place]
        action(
            pltpu.make_async_copy(
                self.scratch.out.at[slot],
                self.out.at[group, self.inner, self.columns],
                self.scratch.out_sem.at[slot],
            )
        )


def _kernel(
    options: OuterOptions,
    schedule: Schedule,
    group_sizes: Ref,
    lefts: list[Ref],
    dout: Ref,
    scale: Ref | None,
    out: Ref,
    scratch: _Scratch,
) -> None:
    """One program: a block of every group's result."""
    block_of_inner = pl.program_id(1 if schedule.columns_first else 0)
    block_of_columns = pl.program_id(0 if schedule.columns_first else 1)
    refs = _Refs(
        options,
        schedule,
        tiles.column_slice(block_of_inner, schedule.inner),
        tiles.column_slice(block_of_columns, schedule.columns),
        group_sizes,
        lefts,
        dout,
        scale,
        out,
        scratch,
    )
    _loop_over_tiles(refs, _list_and_start(refs))


def _list_and_start(refs: _Refs) -> Count:
    """Lists the tiles, and starts the copies of the first ones on the way.

    A group without rows is a tile too: its result must be written, as zeros.
    """
    schedule = refs.schedule
    ahead = schedule.buffers - 1

    def start_copies(before: Count, after: Count, i: int) -> None:
        @pl.when((before.tiles <= i) & (i < after.tiles))
        def _():
            refs.copy_in(refs.tile(i), tiles.start)

    def after_group(before: Count, after: Count) -> None:
        @pl.when(before.tiles < ahead)
        def _():
            for i in range(ahead):
                start_copies(before, after, i)

    return tiles.list_tiles(
        refs.scratch.tile_list,
        refs.group_sizes,
        0,
        refs.dout.shape[0],
        schedule.tile_rows,
        list_empty=True,
        after_group=after_group,
    )


def _loop_over_tiles(refs: _Refs, count: Count) -> None:
    """Sums over every tile of the list, with copies of later tiles and earlier results under way.

    The order of a step: start what a later step needs, wait until the group's result buffer is free
    again, wait for the tile's rows, compute, start the copy of a finished result. A buffer of rows
    is overwritten in the step after the one that reads it.
    """
    buffers = refs.schedule.buffers
    tile_rows = refs.schedule.tile_rows
    ahead = buffers - 1
    out = refs.scratch.out

    @pl.loop(0, count.tiles)
    def _(index):
        tile = refs.tile(index)

        @pl.when(index + ahead < count.tiles)
        def _():
            refs.copy_in(refs.tile(index + ahead), tiles.start)

        @pl.when(tile.is_last(tile_rows) & (tile.place >= buffers))
        def _():
            refs.copy_out(tile.place - buffers, tiles.wait)

        refs.copy_in(tile, tiles.wait)
        _make_operand(refs, tile)
        used = _fold_last_rows(refs, tile)

        @pl.when(used <= 0)
        def _():
            slot = tile.place % buffers
            out[slot] = jnp.zeros(out.shape[1:], out.dtype)

        tiles.run_smallest_case(
            used,
            refs.schedule.row_counts,
            partial(_multiply, refs, tile, used),
        )

        @pl.when(tile.is_last(tile_rows))
        def _():
            refs.copy_out(tile.place, tiles.start)

    # What is still under way: at most one copy for each buffer, the oldest first.
    def wait_for(back: int) -> None:
        @pl.when(count.groups >= back)
        def _():
            refs.copy_out(count.groups - back, tiles.wait)

    for back in range(buffers, 0, -1):
        wait_for(back)


def _make_operand(refs: _Refs, tile: Tile) -> None:
    """Makes one left operand of all, in the place of the first, a register's rows at a time."""
    make = refs.options.operand
    if make is None:
        return
    lefts = refs.scratch.lefts
    slot = refs.tile_slot(tile)

    used = tile.used_rows(refs.schedule.tile_rows)

    @pl.loop(0, jnp.maximum(used, 0), step=ROWS)
    def _(first):
        part = (slot, tiles.row_slice(first, ROWS))
        scale = None
        if refs.scale is not None:
            scale = per_row.column(refs.scale, tile.row + first, ROWS)
        operand = make(*(x[part] for x in lefts), scale)
        lefts[0][part] = operand.astype(lefts[0].dtype)


def _fold_last_rows(refs: _Refs, tile: Tile) -> Array:
    """Moves a group's last rows to the places of its neighbor's in front, where they fit.

    The order of rows does not matter to a sum, and a matrix unit sums over 128 rows at a time. A
    group whose rows in its first and last registers fit into one would often need a pass of the
    unit more for them.

    Returns:
      How many rows of the tile are summed over.
    """
    tile_rows = refs.schedule.tile_rows
    used = tile.used_rows(tile_rows)
    rows_in_front = tile.group_start - tile.row  # the neighbor's, in the first register
    last_rows = tile.group_end % ROWS  # the group's, in its last register
    is_only_tile = tile.is_first & tile.is_last(tile_rows)
    fits = (used > ROWS) & (last_rows > 0) & (last_rows <= rows_in_front)
    folded = is_only_tile & fits
    slot = refs.tile_slot(tile)
    last_register = tiles.align_down(jnp.maximum(used, 0))

    @pl.when(folded)
    def _():
        row = tiles.row_numbers(ROWS, 0)
        head = pl.ds(0, ROWS)
        tail = tiles.row_slice(last_register, ROWS)
        for x in refs.scratch.operands:
            # Packed 16-bit rows cannot be masked one by one: select in float32.
            first_rows = x[slot, head].astype(jnp.float32)
            moved_rows = x[slot, tail].astype(jnp.float32)
            moved_rows = jnp.where(row < last_rows, moved_rows, 0.0)
            both = jnp.where(row >= rows_in_front, first_rows, moved_rows)
            x[slot, head] = both.astype(x.dtype)

    return jnp.where(folded, last_register, used)


def _multiply(
    refs: _Refs,
    tile: Tile,
    used: Array,
    size: int,
) -> None:
    """Adds the first `size` rows of the tile to the group's sum.

    The group's last tile leaves the sum in its result's buffer, any other one in `total`. `used` is
    what `_fold_last_rows` returned.
    """
    schedule = refs.schedule
    scratch = refs.scratch
    slot = refs.tile_slot(tile)
    rows = pl.ds(0, size)
    inner_step, column_step = schedule.step
    _zero_neighbors(refs, tile, used, size)

    def accumulate(store: Callable[[pl.Slice, pl.Slice, Array], None]) -> None:
        @pl.loop(0, schedule.inner // inner_step)
        def _(i):
            inner = tiles.column_slice(i, inner_step)
            lhs = scratch.lefts[0][slot, rows, inner]

            @pl.loop(0, schedule.columns // column_step)
            def _(j):
                columns = tiles.column_slice(j, column_step)
                dout = scratch.dout[slot, rows, columns]
                product = tiles.matmul(lhs, dout, 0, 0)
                # At a group's first tile, `total` still holds another group's sum.
                total = scratch.total[inner, columns]
                before = jnp.where(tile.is_first, 0.0, total)
                store(inner, columns, product + before)

    @pl.when(tile.is_last(schedule.tile_rows))
    def _():
        def store(inner: pl.Slice, columns: pl.Slice, value: Array) -> None:
            out = scratch.out
            slot = tile.place % schedule.buffers
            out[slot, inner, columns] = value.astype(out.dtype)

        accumulate(store)

    @pl.when(jnp.logical_not(tile.is_last(schedule.tile_rows)))
    def _():
        def store(inner: pl.Slice, columns: pl.Slice, value: Array) -> None:
            scratch.total[inner, columns] = value

        accumulate(store)


def _zero_neighbors(
    refs: _Refs,
    tile: Tile,
    used: Array,
    size: int,
) -> None:
    """Zeroes rows of other groups among the first `size` of the tile, in both operands.

    In both, as what is there may be anything, NaN too. The group's end lies `used` rows into the
    tile. Rows in front of the group are its neighbor's only if none were folded into their places.
    """
    operands = refs.scratch.operands
    slot = refs.tile_slot(tile)

    def keep_rows(
        first: tiles.Scalar, is_kept: Callable[[Int[Array, "16 1"]], Bool[Array, "16 1"]]
    ) -> None:
        register = pl.ds(first, ROWS)
        row = tiles.row_numbers(ROWS, first)
        for x in operands:
            values = x[slot, register].astype(jnp.float32)
            kept = jnp.where(is_kept(row), values, 0.0)
            x[slot, register] = kept.astype(x.dtype)

    nothing_folded = used == tile.used_rows(refs.schedule.tile_rows)

    @pl.when(tile.is_first & (tile.row < tile.group_start) & nothing_folded)
    def _():
        keep_rows(0, lambda row: row >= tile.group_start - tile.row)

    @pl.when(used < size)
    def _():
        # The group's last register, of which it has some rows or none.
        edge = pl.multiple_of(tiles.align_down(used), ROWS)
        keep_rows(edge, lambda row: row < used)

        # Whole registers after the group's last one.
        @pl.loop(edge + ROWS, size, step=ROWS)
        def _(first):
            register = tiles.row_slice(first, ROWS)
            for x in operands:
                zeros = jnp.zeros((ROWS, x.shape[2]), x.dtype)
                x[slot, register] = zeros
