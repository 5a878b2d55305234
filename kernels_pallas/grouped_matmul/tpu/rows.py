"""Rows times the matrix of their group, on TPU: the forward pass and the input's gradient, with any elementwise ends.

One walk over the tiles of the rows for each tile of columns. A group's matrix stays in VMEM while its rows pass; the
matrices of the next groups are fetched meanwhile, several ahead, so that small groups (bound by their matrix) and large
ones (bound by the matrix unit) share the time. Every input and output moves once a tile of columns.

Two groups may share `ROWS` rows of a register. Such rows are written once, by the last of the groups in them: the ones
before leave their part in VMEM.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import like
from kernels_pallas.grouped_matmul.tpu import per_row as tpu_per_row
from kernels_pallas.grouped_matmul.tpu import visits as tpu_visits
from kernels_pallas.grouped_matmul.tpu.per_row import LANES
from kernels_pallas.grouped_matmul.tpu.visits import ROWS, Count, Visit, Walk


class Schedule(NamedTuple):
    """How a kernel is cut. Only its time depends on this."""

    tile: int  # rows at a time
    columns: int  # of the output, whose part of a matrix is in VMEM at a time
    ahead: int  # matrices, tiles of rows and of results in VMEM; a power of two
    step: int  # columns of one matmul
    parts: tuple[
        int, ...
    ]  # sizes of a tile, ascending: a group's last rows take the least that holds them
    cores: int  # that share the program: each takes its part of the rows
    vmem: int  # bytes that the compiler may take


class Call(NamedTuple):
    """What of a call is static."""

    schedule: Schedule
    transposed: bool  # matrices are [G, O, I]
    # (product(input, matrix), part of each tiled array, each scale [size, 1] unless the operand took them) -> each
    # output: parts [size, step], float32
    body: Callable
    out_dtypes: tuple[jnp.dtype, ...]
    interpret: object
    name: str
    # (part of each input, each scale) -> what is multiplied instead, elementwise
    operand: Callable | None = None
    in_place: bool = False  # outputs take the place of the tiled arrays
    row_sums: bool = False  # the body's last value is not written, but the sum over its columns is


def rows_times_groups(
    call: Call,
    xs: tuple[Float[Array, "R I"], ...],
    matrices: tuple[Float[Array, "G I O"], ...],
    sizes: Int[Array, "G"],
    tiled: tuple[Float[Array, "R O"], ...] = (),
    scales: tuple[Float[Array, "L 128"], ...] = (),
) -> tuple[Float[Array, "R O"], ...]:
    """Rows sorted by group; R a multiple of `ROWS`, I and O of 128. Rows beyond the groups' are zeros.

    Scales are a number for each row, `per_row.in_lines`; so are the row sums, the last output, of each core.
    """
    (R, I), G = xs[0].shape, len(sizes)
    O = matrices[0].shape[1 if call.transposed else 2]
    s = call.schedule
    matrix = (s.columns, I) if call.transposed else (I, s.columns)
    scratch = dict(
        x=[pltpu.VMEM((s.ahead, s.tile, I), x.dtype) for x in xs],
        tiled=[pltpu.VMEM((s.ahead, s.tile, s.columns), z.dtype) for z in tiled],
        operand=[pltpu.VMEM((s.tile, I), xs[0].dtype)] if call.operand else [],
        matrix=[pltpu.VMEM((s.ahead, *matrix), m.dtype) for m in matrices],
        out=[pltpu.VMEM((s.ahead, s.tile, s.columns), d) for d in call.out_dtypes],
        shared=[pltpu.VMEM((ROWS, s.columns), d) for d in call.out_dtypes],
        walk=Walk.scratch(R, s.tile, G),
        x_sem=pltpu.SemaphoreType.DMA((len(xs) + len(tiled), s.ahead)),
        matrix_sem=pltpu.SemaphoreType.DMA((len(matrices), s.ahead)),
        out_sem=pltpu.SemaphoreType.DMA((len(call.out_dtypes), s.ahead)),
    )
    leaves, tree = jax.tree.flatten(scratch)

    ends = np.cumsum(
        [len(xs), len(tiled), len(matrices), len(scales), len(call.out_dtypes), call.row_sums]
    )

    def kernel(sizes, *refs):
        part = -(-R // (s.cores * ROWS)) * ROWS
        low = pl.program_id(0) * part
        rows = low, jnp.minimum(low + part, R)
        columns = pl.ds(pl.multiple_of(pl.program_id(1) * s.columns, LANES), s.columns)
        hbm = [refs[start:end] for start, end in zip([0, *ends], ends)]
        _kernel(
            _Refs(call, rows, columns, sizes, *hbm, **jax.tree.unflatten(tree, refs[ends[-1] :]))
        )

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    lines = -(-R // LANES)
    sums = like(xs[0], (s.cores, lines, LANES), jnp.float32)
    sums_spec = pl.BlockSpec((None, lines, LANES), lambda core, *_: (core, 0, 0))
    moved = sum(x.size * x.dtype.itemsize for x in xs) * (O // s.columns)
    moved += sum(m.size * m.dtype.itemsize for m in (*matrices, *tiled))
    moved += sum(R * O * d.itemsize for d in call.out_dtypes)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(s.cores, O // s.columns),
            in_specs=[anywhere] * (len(xs) + len(tiled) + len(matrices))
            + [pl.BlockSpec((lines, LANES), lambda *_: (0, 0))] * len(scales),
            out_specs=[anywhere] * len(call.out_dtypes) + [sums_spec] * call.row_sums,
            scratch_shapes=leaves,
        ),
        out_shape=[like(xs[0], (R, O), d) for d in call.out_dtypes] + [sums] * call.row_sums,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=s.vmem,
            disable_bounds_checks=True,  # of every copy: a tenth of the time; rows and groups are clamped to the arrays
        ),
        cost_estimate=pl.CostEstimate(2 * R * I * O * len(matrices), 0, moved),
        input_output_aliases={1 + len(xs) + i: i for i in range(len(tiled))}
        if call.in_place
        else {},
        interpret=call.interpret,
        name=call.name,
    )(sizes, *xs, *tiled, *matrices, *scales)


class _Refs(NamedTuple):
    """Everything that the kernel can reach."""

    call: Call
    rows: tuple  # first and last + 1 of those that this walk is over
    columns: object  # those of the outputs that this walk makes
    sizes: object
    xs: tuple  # HBM [R, I]
    tileds: tuple  # HBM [R, O]
    matrices: tuple  # HBM
    scales: tuple  # VMEM [L, 128]
    outs: tuple  # HBM [R, O]
    sums: tuple  # VMEM [L, 128], at most one
    x: list  # VMEM [ahead, tile, I]
    tiled: list  # VMEM [ahead, tile, columns]
    operand: list  # VMEM [tile, I], at most one
    matrix: list  # VMEM [ahead, I, columns]
    out: list  # VMEM [ahead, tile, columns]
    shared: list  # VMEM [ROWS, columns]: rows that the next group has a part in
    walk: Walk
    x_sem: object
    matrix_sem: object
    out_sem: object

    @property
    def schedule(self) -> Schedule:
        return self.call.schedule

    # copies: each is begun and waited for by the same words

    def move_x(self, v: Visit, do: str) -> None:
        slot, tile = v.index % self.schedule.ahead, self.schedule.tile
        whole = [(source, to, slice(None)) for source, to in zip(self.xs, self.x)]
        cut = [(source, to, self.columns) for source, to in zip(self.tileds, self.tiled)]
        for i, (source, to, columns) in enumerate(whole + cut):

            def copy(first, size, i=i, source=source, to=to, columns=columns):
                rows = source.at[pl.ds(pl.multiple_of(v.row + first, ROWS), size), columns]
                at = to.at[slot, pl.ds(first, size)]
                getattr(pltpu.make_async_copy(rows, at, self.x_sem.at[i, slot]), do)()

            tpu_visits.copy_rows(
                copy, tpu_visits.aligned(v.used(tile) + ROWS - 1), tile, source.shape[0]
            )

    def move_matrix(self, place, do: str) -> None:
        slot, columns = place % self.schedule.ahead, self.columns
        for i, (source, to) in enumerate(zip(self.matrices, self.matrix)):
            part = (columns, slice(None)) if self.call.transposed else (slice(None), columns)
            matrix = source.at[(self.walk.group[place], *part)]
            getattr(pltpu.make_async_copy(matrix, to.at[slot], self.matrix_sem.at[i, slot]), do)()

    def move_out(self, v: Visit, do: str) -> None:
        slot, tile = v.index % self.schedule.ahead, self.schedule.tile
        # The rows of the last register are left to the next group, if it has some of them.
        count = jnp.minimum(tpu_visits.aligned(v.end) - v.row, tile)
        for i, (source, to) in enumerate(zip(self.out, self.outs)):

            def copy(first, size, i=i, source=source, to=to):
                row = pl.multiple_of(v.row + first, ROWS)
                at = to.at[pl.ds(row, size), self.columns]
                getattr(
                    pltpu.make_async_copy(
                        source.at[slot, pl.ds(first, size)], at, self.out_sem.at[i, slot]
                    ),
                    do,
                )()

            tpu_visits.copy_rows(copy, count, tile, to.shape[0])


def _kernel(refs: _Refs) -> None:
    s, walk = refs.schedule, refs.walk
    at = lambda index: tpu_visits.visit(walk, index)

    def begin(before: Count, after: Count) -> None:
        @pl.when(before.groups < s.ahead - 1)
        def _():
            for i in range(s.ahead - 1):

                @pl.when((before.tiles <= i) & (i < after.tiles))
                def _(i=i):
                    refs.move_x(at(i), "start")

                @pl.when((before.groups == i) & (i < after.groups))
                def _(i=i):
                    refs.move_matrix(i, "start")

    groups = tpu_visits.plan(
        walk, refs.sizes, refs.sizes.shape[0], refs.rows, s.tile, empty=False, found=begin
    )
    real = groups.tiles  # what comes after them belongs to no group
    tiles = tpu_visits.append(walk, groups, 0, refs.rows[1], s.tile, empty=False).tiles

    if refs.sums:

        @pl.when(pl.program_id(1) == 0)
        def _():
            refs.sums[0][...] = jnp.zeros(refs.sums[0].shape, jnp.float32)

    @pl.loop(0, tiles)
    def _(index):
        v = at(index)

        @pl.when(index + s.ahead - 1 < real)
        def _():
            refs.move_x(at(index + s.ahead - 1), "start")

        @pl.when(v.first & (v.place + s.ahead - 1 < groups.groups))
        def _():
            refs.move_matrix(v.place + s.ahead - 1, "start")

        @pl.when(index >= s.ahead)
        def _():
            refs.move_out(at(index - s.ahead), "wait")

        @pl.when(index < real)
        def _():
            refs.move_x(v, "wait")

            @pl.when(v.first)
            def _():
                refs.move_matrix(v.place, "wait")

            tpu_visits.cases(v.used(s.tile), s.parts, lambda size: _multiply(refs, v, size))

        @pl.when(index >= real)
        def _():
            for out in refs.out:
                out[index % s.ahead] = jnp.zeros(out.shape[1:], out.dtype)

        _share(refs, v)
        refs.move_out(v, "start")

    for back in range(s.ahead, 0, -1):

        @pl.when(tiles >= back)
        def _(back=back):
            refs.move_out(at(tiles - back), "wait")


def _multiply(refs: _Refs, v: Visit, size: int) -> None:
    """The first `size` rows of the tile, a step of columns after another."""
    s = refs.schedule
    slot, matrix_slot = v.index % s.ahead, v.place % s.ahead
    xs = [x.at[slot, pl.ds(0, size)] for x in refs.x]
    scales = lambda first, count: [
        tpu_per_row.column(lines, v.row + first, count) for lines in refs.scales
    ]
    if refs.operand:

        @pl.loop(0, size, step=ROWS)
        def _(first):
            rows = pl.ds(pl.multiple_of(first, ROWS), ROWS)
            operand = refs.call.operand(*(x[rows] for x in xs), *scales(first, ROWS))
            refs.operand[0][rows] = operand.astype(refs.operand[0].dtype)

        xs = [refs.operand[0].at[pl.ds(0, size)]]

    @pl.loop(0, s.columns // s.step)
    def _(i):
        columns = pl.ds(pl.multiple_of(i * s.step, LANES), s.step)

        def product(x: int, matrix: int) -> Array:
            part = (columns, slice(None)) if refs.call.transposed else (slice(None), columns)
            return matmul(
                xs[x][...],
                refs.matrix[matrix][(matrix_slot, *part)],
                ((1,), (int(refs.call.transposed),)),
            )

        at = (slot, pl.ds(0, size), columns)
        scaled = [] if refs.operand else scales(0, size)
        values = refs.call.body(product, *(z[at] for z in refs.tiled), *scaled)
        for out, value in zip(refs.out, values):
            out[at] = value.astype(out.dtype)
        for lines in refs.sums:
            tpu_per_row.add_sums(lines, v.row, values[-1], v.start, v.end)


def _share(refs: _Refs, v: Visit) -> None:
    """Takes rows of earlier groups into the tile's first register, and leaves its last to the next group."""
    slot, tile = v.index % refs.schedule.ahead, refs.schedule.tile
    first, end = pl.ds(0, ROWS), pl.multiple_of(tpu_visits.aligned(v.end) - v.row, ROWS)

    @pl.when(v.first & (v.row < v.start))
    def _():
        mine = tpu_visits.rows_of(ROWS, v.row) >= v.start
        for out, shared in zip(refs.out, refs.shared):
            wide = lambda x: x.astype(jnp.float32)
            out[slot, first] = jnp.where(mine, wide(out[slot, first]), wide(shared[...])).astype(
                out.dtype
            )

    @pl.when(v.last(tile) & (v.end % ROWS > 0))
    def _():
        for out, shared in zip(refs.out, refs.shared):
            shared[...] = out[slot, pl.ds(end, ROWS)]


def matmul(x: Array, y: Array, contract) -> Array:
    """Accumulated in float32; float32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
