"""Rows times the matrix of their group, on TPU, with any elementwise work before and after.

The forward pass, and with the matrices read transposed the gradient of the rows. The grid is
(cores, tiles of columns): each core computes its part of the rows, and for each tile of columns a
program loops over the tiles of those rows, as `tiles.py` lists them.

In VMEM are, for each of `buffers` tiles: the rows of the inputs, the tile's part of the tiled
arrays and of the outputs; and for each of `buffers` groups its matrix, of which only this program's
columns. A group's matrix stays while its rows pass. The rows and the matrices that come next are
fetched meanwhile, several ahead, so that small groups (bound by their matrix) and large ones (bound
by the matrix unit) share the time. Every input and output moves once for a tile of columns; nothing
is recomputed.

Two groups may have rows in one register of `ROWS` rows. Such rows are written to HBM once, by the
last of the groups in them: the ones before leave their part in VMEM (`boundary`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import round_up
from kernels_pallas.common.tpu import Interpret, Ref
from kernels_pallas.grouped_matmul.tpu import per_row, tiles
from kernels_pallas.grouped_matmul.tpu.tiles import LANES, ROWS, Count, Tile, TileList


class Schedule(NamedTuple):
    """How a kernel is split into tiles. Only its time depends on this."""

    tile_rows: int  # a power of two
    columns: int  # of the output, whose part of a matrix is in VMEM at a time
    buffers: int  # matrices, tiles of rows and of results in VMEM; a power of two
    step: int  # columns of one matmul
    # Row counts of a matmul, ascending: a group's last rows take the least that holds them.
    row_counts: tuple[int, ...]
    cores: int  # that share the program: each takes its part of the rows
    vmem: int  # bytes that the compiler may take


# product(i, j): [size, step], float32: the i-th input times the j-th matrix.
Product = Callable[[int, int], Array]


def plain_product(
    product: Product,
    tiled: Sequence[Array],
    scale: Array | None,
) -> tuple[Array, ...]:
    """The body of a kernel that only multiplies."""
    return (product(0, 0),)


class RowsOptions(NamedTuple):
    """The static arguments of `rows_times_groups`."""

    name: str
    interpret: Interpret
    out_dtypes: tuple[jnp.dtype, ...]
    # (product, the tile's part of each tiled array, scale [size, 1]) -> each output's part
    # [size, step]. The scale is None where there is none, or where `operand` takes it.
    body: Callable[..., tuple[Array, ...]] = plain_product
    transposed: bool = False  # the matrices are [G, O, I]
    # (part of each input, scale) -> what is multiplied in their place, elementwise
    operand: Callable[..., Array] | None = None
    # The body's last value is not written; its sum over the columns is, as a number for each row.
    row_sums: bool = False


class RowsInputs(NamedTuple):
    """The arrays of `rows_times_groups`: R rows of width I, sorted by group; results of width O."""

    xs: Sequence[Float[Array, "R I"]]
    matrices: Sequence[Float[Array, "G I O"] | Float[Array, "G O I"]]
    group_sizes: Int[Array, "G"]
    tiled: Sequence[Float[Array, "R O"]] = ()  # outputs take the place of these
    scale: Float[Array, "R"] | Float[Array, "L 128"] | None = None  # one number for each row


def rows_times_groups(
    options: RowsOptions,
    schedule: Schedule,
    inputs: RowsInputs,
) -> tuple[list[Float[Array, "R O"]], Float[Array, "cores L 128"] | None]:
    """The kernel's call.

    Args:
      options: static.
      schedule: static; see `tuning.rows_schedule`.
      inputs: R a multiple of `ROWS`, I and O of 128; the scale as `per_row.in_lines` has it.

    Returns:
      The outputs, zeros in rows beyond the groups; and the row sums of each core, if any.
    """
    xs, matrices, group_sizes, tiled, scale = inputs
    x = xs[0]
    R, I = x.shape
    O = matrices[0].shape[1 if options.transposed else 2]
    outs = [like(x, (R, O), dtype) for dtype in options.out_dtypes]
    lines = pl.cdiv(R, LANES)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    sums = sums_spec = scale_spec = None
    if options.row_sums:
        sums_of_cores = (schedule.cores, lines, LANES)
        sums = like(x, sums_of_cores, jnp.float32)
        # The index is the core: the numbers stay in VMEM over all tiles of columns.
        sums_of_core = (None, lines, LANES)
        sums_spec = pl.BlockSpec(sums_of_core, lambda core, *_: (core, 0, 0))
    if scale is not None:
        scale_spec = pl.BlockSpec((lines, LANES), lambda *_: (0, 0))
    column_tiles = O // schedule.columns
    # The rows are read once for each tile of columns, everything else moves once.
    bytes_of_xs = moved(xs) * column_tiles
    bytes_of_others = moved([*matrices, *tiled, *outs])
    # Counted over all arrays, tiled array i is this input: the group sizes are input 0.
    first_tiled = 1 + len(xs)
    aliases = {first_tiled + i: i for i in range(len(tiled))}
    call = pl.pallas_call(
        partial(_kernel, options, schedule),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(schedule.cores, column_tiles),
            in_specs=[
                [in_hbm] * len(xs),
                [in_hbm] * len(tiled),
                [in_hbm] * len(matrices),
                scale_spec,
            ],
            out_specs=[[in_hbm] * len(outs), sums_spec],
            scratch_shapes=[_scratch(options, schedule, inputs, outs)],
        ),
        out_shape=[outs, sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=schedule.vmem,
            # Of every copy: a tenth of the time. Rows and groups are clamped to the arrays.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * I * O * len(matrices),
            transcendentals=0,
            bytes_accessed=bytes_of_xs + bytes_of_others,
        ),
        input_output_aliases=aliases,
        interpret=options.interpret,
        name=options.name,
    )
    return call(
        group_sizes,
        list(xs),
        list(tiled),
        list(matrices),
        scale,
    )


class _Scratch(NamedTuple):
    """VMEM, SMEM and semaphores of the kernel."""

    x: list[Ref]  # VMEM [buffers, tile_rows, I], for each input
    tiled: list[Ref]  # VMEM [buffers, tile_rows, columns]
    operand: Ref | None  # VMEM [tile_rows, I]
    matrix: list[Ref]  # VMEM [buffers, I, columns]
    out: list[Ref]  # VMEM [buffers, tile_rows, columns]
    boundary: list[Ref]  # VMEM [ROWS, columns]: rows of a register that the next group writes
    tile_list: TileList  # SMEM
    x_sem: Ref
    matrix_sem: Ref
    out_sem: Ref


def _scratch(
    options: RowsOptions,
    schedule: Schedule,
    inputs: RowsInputs,
    outs: Sequence[jax.ShapeDtypeStruct],
) -> _Scratch:
    """The shapes of the scratch memory."""
    xs, matrices, group_sizes, tiled, _ = inputs
    R, I = xs[0].shape
    buffers = schedule.buffers
    tile_rows = schedule.tile_rows
    columns = schedule.columns
    matrix_part = (columns, I) if options.transposed else (I, columns)
    operand = None
    if options.operand is not None:
        operand = pltpu.VMEM((tile_rows, I), xs[0].dtype)
    return _Scratch(
        x=tiles.vmem_like(xs, buffers, tile_rows, I),
        tiled=tiles.vmem_like(tiled, buffers, tile_rows, columns),
        operand=operand,
        matrix=tiles.vmem_like(matrices, buffers, *matrix_part),
        out=tiles.vmem_like(outs, buffers, tile_rows, columns),
        boundary=tiles.vmem_like(outs, ROWS, columns),
        tile_list=TileList.scratch(R, tile_rows, len(group_sizes)),
        # One semaphore for each copy that may be under way.
        x_sem=pltpu.SemaphoreType.DMA((len(xs) + len(tiled), buffers)),
        matrix_sem=pltpu.SemaphoreType.DMA((len(matrices), buffers)),
        out_sem=pltpu.SemaphoreType.DMA((len(outs), buffers)),
    )


class _Refs(NamedTuple):
    """Everything that a program of the kernel can reach, and how its copies are described."""

    options: RowsOptions
    schedule: Schedule
    first_row: Array  # of the program's rows
    end_row: Array  # the row after its last
    columns: pl.Slice  # of the outputs, that the program computes
    group_sizes: Ref  # SMEM [G]
    xs: list[Ref]  # HBM [R, I]
    tiled: list[Ref]  # HBM [R, O]
    matrices: list[Ref]  # HBM [G, I, O] or [G, O, I]
    scale: Ref | None  # VMEM [L, 128]
    outs: list[Ref]  # HBM [R, O]
    sums: Ref | None  # VMEM [L, 128]
    scratch: _Scratch

    def tile(self, index: tiles.Scalar) -> Tile:
        """A tile of the list."""
        return tiles.read_tile(self.scratch.tile_list, index)

    def tile_slot(self, tile: Tile) -> tiles.Scalar:
        """Which of the buffers a tile has: they are taken in turn."""
        return tile.index % self.schedule.buffers

    def matrix_part(self, columns: pl.Slice) -> tuple[slice | pl.Slice, ...]:
        """The part of a matrix that gives these columns of the output."""
        everything = slice(None)
        if self.options.transposed:
            return (columns, everything)
        return (everything, columns)

    def copy_x(
        self,
        tile: Tile,
        action: tiles.CopyAction,
    ) -> None:
        """HBM to VMEM: the tile's rows of the inputs, and its part of the tiled arrays."""
        scratch = self.scratch
        everything = slice(None)
        semaphore = 0
        for source, to in zip(self.xs, scratch.x):
            self._copy_in(tile, action, source, to, everything, semaphore)
            semaphore += 1
        for source, to in zip(self.tiled, scratch.tiled):
            self._copy_in(tile, action, source, to, self.columns, semaphore)
            semaphore += 1

    def _copy_in(
        self,
        tile: Tile,
        action: tiles.CopyAction,
        source: Ref,
        to: Ref,
        columns: slice | pl.Slice,
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
                    self.scratch.x_sem.at[semaphore, slot],
                )
            )

        count = tiles.align_up(tile.used_rows(tile_rows))
        tiles.copy_rows(
            copy,
            count,
            tile_rows,
            source.shape[0],
        )

    def copy_matrix(
        self,
        place: tiles.Scalar,
        action: tiles.CopyAction,
    ) -> None:
        """HBM to VMEM: this program's part of the matrices of the group at a place of the list."""
        slot = place % self.schedule.buffers
        group = self.scratch.tile_list.group[place]
        part = self.matrix_part(self.columns)
        for i, (source, to) in enumerate(zip(self.matrices, self.scratch.matrix)):
            action(
                pltpu.make_async_copy(
                    source.at[(group, *part)],
                    to.at[slot],
                    self.scratch.matrix_sem.at[i, slot],
                )
            )

    def copy_out(
        self,
        tile: Tile,
        action: tiles.CopyAction,
    ) -> None:
        """VMEM to HBM: the tile's part of the outputs."""
        for i, (source, to) in enumerate(zip(self.scratch.out, self.outs)):
            self._copy_out(tile, action, source, to, i)

    def _copy_out(
        self,
        tile: Tile,
        action: tiles.CopyAction,
        source: Ref,
        to: Ref,
        semaphore: int,
    ) -> None:
        slot = self.tile_slot(tile)
        tile_rows = self.schedule.tile_rows

        def copy(first: Array, size: int) -> None:
            rows_in_array = tiles.row_slice(tile.row + first, size)
            rows_in_tile = tiles.row_slice(first, size)
            action(
                pltpu.make_async_copy(
                    source.at[slot, rows_in_tile],
                    to.at[rows_in_array, self.columns],
                    self.scratch.out_sem.at[semaphore, slot],
                )
            )

        # The rows of a last register that is not full are left to the next group.
        full_registers_end = tiles.align_down(tile.group_end)
        count = jnp.minimum(full_registers_end - tile.row, tile_rows)
        tiles.copy_rows(
            copy,
            count,
            tile_rows,
            to.shape[0],
        )


def _kernel(
    options: RowsOptions,
    schedule: Schedule,
    group_sizes: Ref,
    xs: list[Ref],
    tiled: list[Ref],
    matrices: list[Ref],
    scale: Ref | None,
    outs: list[Ref],
    sums: Ref | None,
    scratch: _Scratch,
) -> None:
    """One program: a core's rows, a tile of columns."""
    R = outs[0].shape[0]
    # A multiple of ROWS, so that no two cores have rows in one register.
    rows_of_core = round_up(R, schedule.cores * ROWS) // schedule.cores
    first_row = pl.program_id(0) * rows_of_core
    refs = _Refs(
        options,
        schedule,
        first_row,
        jnp.minimum(first_row + rows_of_core, R),
        tiles.column_slice(pl.program_id(1), schedule.columns),
        group_sizes,
        xs,
        tiled,
        matrices,
        scale,
        outs,
        sums,
        scratch,
    )
    groups, all_tiles = _list_and_start(refs)
    if sums is not None:
        # Over all tiles of columns the sums are one block, which the first program begins.
        @pl.when(pl.program_id(1) == 0)
        def _():
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    _loop_over_tiles(refs, groups, all_tiles)


def _list_and_start(refs: _Refs) -> tuple[Count, Array]:
    """Lists the tiles, and starts the copies of the first ones on the way.

    Returns:
      How many tiles and groups have rows of a group; and the number of all tiles: after them come
      those of rows beyond the groups, which are zeros.
    """
    schedule = refs.schedule
    tile_list = refs.scratch.tile_list
    ahead = schedule.buffers - 1

    def start_copies(before: Count, after: Count, i: int) -> None:
        @pl.when((before.tiles <= i) & (i < after.tiles))
        def _():
            refs.copy_x(refs.tile(i), tiles.start)

        @pl.when((before.groups == i) & (i < after.groups))
        def _():
            refs.copy_matrix(i, tiles.start)

    def after_group(before: Count, after: Count) -> None:
        # A group has a tile at least, so later groups have none of the first tiles.
        @pl.when(before.groups < ahead)
        def _():
            for i in range(ahead):
                start_copies(before, after, i)

    groups = tiles.list_tiles(
        tile_list,
        refs.group_sizes,
        refs.first_row,
        refs.end_row,
        schedule.tile_rows,
        list_empty=False,
        after_group=after_group,
    )
    everything = tiles.append_group(
        tile_list,
        groups,
        0,
        refs.end_row,
        schedule.tile_rows,
        list_empty=False,
    )
    return groups, everything.tiles


def _loop_over_tiles(
    refs: _Refs,
    groups: Count,
    all_tiles: Array,
) -> None:
    """Computes and writes every tile of the list, with copies of later and earlier ones under way.

    The order of a step: start what later steps need, wait until the tile's output buffer is free
    again, wait for the tile's inputs, compute, start the copy of the result. A buffer of rows or
    matrices is overwritten in the step after the last that reads it.
    """
    buffers = refs.schedule.buffers
    tile_rows = refs.schedule.tile_rows
    ahead = buffers - 1
    scratch = refs.scratch

    @pl.loop(0, all_tiles)
    def _(index):
        tile = refs.tile(index)

        @pl.when(index + ahead < groups.tiles)
        def _():
            refs.copy_x(refs.tile(index + ahead), tiles.start)

        # The buffer of that matrix is the previous group's, whose tiles are done.
        @pl.when(tile.is_first & (tile.place + ahead < groups.groups))
        def _():
            refs.copy_matrix(tile.place + ahead, tiles.start)

        @pl.when(index >= buffers)
        def _():
            refs.copy_out(refs.tile(index - buffers), tiles.wait)

        @pl.when(index < groups.tiles)
        def _():
            refs.copy_x(tile, tiles.wait)

            @pl.when(tile.is_first)
            def _():
                refs.copy_matrix(tile.place, tiles.wait)

            tiles.run_smallest_case(
                tile.used_rows(tile_rows),
                refs.schedule.row_counts,
                partial(_multiply, refs, tile),
            )

        @pl.when(index >= groups.tiles)
        def _():
            slot = index % buffers
            for out in scratch.out:
                out[slot] = jnp.zeros(out.shape[1:], out.dtype)

        _join_boundary(refs, tile)
        refs.copy_out(tile, tiles.start)

    # What is still under way: at most one copy for each buffer, the oldest first.
    def wait_for(back: int) -> None:
        @pl.when(all_tiles >= back)
        def _():
            refs.copy_out(refs.tile(all_tiles - back), tiles.wait)

    for back in range(buffers, 0, -1):
        wait_for(back)


def _multiply(
    refs: _Refs,
    tile: Tile,
    size: int,
) -> None:
    """Computes the first `size` rows of the tile, `step` columns at a time."""
    options = refs.options
    schedule = refs.schedule
    scratch = refs.scratch
    slot = refs.tile_slot(tile)
    matrix_slot = tile.place % schedule.buffers
    rows = pl.ds(0, size)
    xs = [x.at[slot, rows] for x in scratch.x]
    makes_operand = options.operand is not None
    if makes_operand:
        xs = [_make_operand(refs, tile, xs, size)]
    # The matrices are [G, I, O], or [G, O, I]: the axis that is summed over, less G.
    summed_axis = 1 if options.transposed else 0

    @pl.loop(0, schedule.columns // schedule.step)
    def _(i):
        columns = tiles.column_slice(i, schedule.step)
        matrix_part = (matrix_slot, *refs.matrix_part(columns))

        def product(x: int, matrix: int) -> Array:
            weight = scratch.matrix[matrix][matrix_part]
            return tiles.matmul(
                xs[x][...],
                weight,
                1,
                summed_axis,
            )

        part = (slot, rows, columns)
        tiled = [x[part] for x in scratch.tiled]
        scale = None
        if not makes_operand:
            scale = _scale_column(refs, tile, 0, size)
        values = options.body(product, tiled, scale)
        for out, value in zip(scratch.out, values):
            out[part] = value.astype(out.dtype)
        if refs.sums is not None:
            # Rows of other groups are in the tile too: only the group's own are added.
            per_row.add_sums(
                refs.sums,
                tile.row,
                values[-1],
                tile.group_start,
                tile.group_end,
            )


def _make_operand(
    refs: _Refs,
    tile: Tile,
    xs: list[Ref],
    size: int,
) -> Ref:
    """Makes what is multiplied of all inputs, a register's rows at a time; returns where it is."""
    make = refs.options.operand
    operand = refs.scratch.operand
    assert make is not None
    assert operand is not None

    @pl.loop(0, size, step=ROWS)
    def _(first):
        rows = tiles.row_slice(first, ROWS)
        parts = [x[rows] for x in xs]
        scale = _scale_column(refs, tile, first, ROWS)
        operand[rows] = make(*parts, scale).astype(operand.dtype)

    return operand.at[pl.ds(0, size)]


def _scale_column(
    refs: _Refs,
    tile: Tile,
    first: tiles.Scalar,
    size: int,
) -> Array | None:
    """The scale of `size` rows from the tile's row `first` on: [size, 1]."""
    if refs.scale is None:
        return None
    return per_row.column(refs.scale, tile.row + first, size)


def _join_boundary(refs: _Refs, tile: Tile) -> None:
    """Takes earlier groups' rows into the tile's first register, leaves its last to the next group.

    Between two groups that have rows in one register, `boundary` holds what is known of it.
    """
    tile_rows = refs.schedule.tile_rows
    scratch = refs.scratch
    slot = refs.tile_slot(tile)
    first_register = pl.ds(0, ROWS)
    last_register_row = tiles.align_down(tile.group_end)
    last_register = tiles.row_slice(last_register_row - tile.row, ROWS)

    begins_within_register = tile.row < tile.group_start

    @pl.when(tile.is_first & begins_within_register)
    def _():
        is_own = tiles.row_numbers(ROWS, tile.row) >= tile.group_start
        for out, boundary in zip(scratch.out, scratch.boundary):
            # Packed 16-bit rows cannot be masked one by one: select in float32.
            own = out[slot, first_register].astype(jnp.float32)
            earlier = boundary[...].astype(jnp.float32)
            joined = jnp.where(is_own, own, earlier)
            out[slot, first_register] = joined.astype(out.dtype)

    ends_within_register = tile.group_end % ROWS > 0

    @pl.when(tile.is_last(tile_rows) & ends_within_register)
    def _():
        for out, boundary in zip(scratch.out, scratch.boundary):
            boundary[...] = out[slot, last_register]
