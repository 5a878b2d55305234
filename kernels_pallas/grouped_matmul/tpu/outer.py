"""lhs^T dout over the rows of each group, on TPU: the gradient of the matrices.

One walk over the tiles of the rows for each block of the result. A group's sum stays in VMEM, float32, while its rows
pass: a group whose rows fit into a tile is one matmul with nothing added up. Rows of the neighbors are zeroed in VMEM,
at the ends of a group only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import like
from kernels_pallas.grouped_matmul.tpu import per_row as tpu_per_row
from kernels_pallas.grouped_matmul.tpu import visits as tpu_visits
from kernels_pallas.grouped_matmul.tpu.per_row import LANES
from kernels_pallas.grouped_matmul.tpu.rows import matmul
from kernels_pallas.grouped_matmul.tpu.visits import ROWS, Count, Visit, Walk


class Schedule(NamedTuple):
    """How the kernel is cut. Only its time depends on this."""

    tile: int  # rows at a time
    inner: int  # rows of the result at a time
    columns: int  # columns of the result at a time
    ahead: int  # tiles of rows and results in VMEM; a power of two
    step: tuple[int, int]  # rows and columns of one matmul
    parts: tuple[
        int, ...
    ]  # sizes of a tile, ascending: a group's last rows take the least that holds them
    vmem: int  # bytes that the compiler may take


class Call(NamedTuple):
    """What of a call is static."""

    schedule: Schedule
    out_dtype: jnp.dtype
    interpret: object
    name: str
    # (part of each left operand, each scale) -> what is multiplied, elementwise
    operand: Callable | None = None


def outer_by_group(
    call: Call,
    lefts: tuple[Float[Array, "R K"], ...],
    dout: Float[Array, "R N"],
    sizes: Int[Array, "G"],
    scales: tuple[Float[Array, "L 128"], ...] = (),
) -> Float[Array, "G K N"]:
    """Rows sorted by group; R a multiple of `ROWS`, K and N of 128. Zeros for groups of no rows.

    One left operand, or several that `call.operand` makes one of; it may take scales, `per_row.in_lines`.
    """
    lhs = lefts[0]
    (R, K), N, G = lhs.shape, dout.shape[1], len(sizes)
    s = call.schedule
    scratch = dict(
        lhs=[pltpu.VMEM((s.ahead, s.tile, s.inner), x.dtype) for x in lefts],
        dout=pltpu.VMEM((s.ahead, s.tile, s.columns), dout.dtype),
        total=pltpu.VMEM((s.inner, s.columns), jnp.float32),
        out=pltpu.VMEM((s.ahead, s.inner, s.columns), call.out_dtype),
        walk=Walk.scratch(R, s.tile, G),
        in_sem=pltpu.SemaphoreType.DMA((len(lefts) + 1, s.ahead)),
        out_sem=pltpu.SemaphoreType.DMA((s.ahead,)),
    )
    leaves, tree = jax.tree.flatten(scratch)

    def kernel(sizes, *refs):
        (*arrays, out), rest = refs[: (n := len(lefts) + len(scales) + 2)], refs[n:]
        (*left, dout), lines = arrays[: len(lefts) + 1], arrays[len(lefts) + 1 :]
        block = [
            pl.ds(pl.multiple_of(pl.program_id(i) * n, LANES), n)
            for i, n in enumerate((s.inner, s.columns))
        ]
        _kernel(
            _Refs(call, *block, sizes, left, dout, lines, out, **jax.tree.unflatten(tree, rest))
        )

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    item = lhs.dtype.itemsize
    moved = (
        R * (len(lefts) * K * (N // s.columns) + N * (K // s.inner)) * item
        + G * K * N * call.out_dtype.itemsize
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(K // s.inner, N // s.columns),
            in_specs=[anywhere] * (len(lefts) + 1)
            + [pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in scales],
            out_specs=anywhere,
            scratch_shapes=leaves,
        ),
        out_shape=like(lhs, (G, K, N), call.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=s.vmem,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(2 * R * K * N, 0, moved),
        interpret=call.interpret,
        name=call.name,
    )(sizes, *lefts, dout, *scales)


class _Refs(NamedTuple):
    """Everything that the kernel can reach."""

    call: Call
    inner: object  # the block of the result that this walk makes: its rows ...
    columns: object  # ... and its columns
    sizes: object
    lefts_hbm: list
    dout_hbm: object
    scales: list  # VMEM [L, 128]
    out_hbm: object
    lhs: list  # [ahead, tile, inner] each; the first becomes what is multiplied
    dout: object  # [ahead, tile, columns]
    total: object  # [inner, columns] float32
    out: object  # [ahead, inner, columns]
    walk: Walk
    in_sem: object
    out_sem: object

    def move_in(self, v: Visit, do: str) -> None:
        slot, tile = v.index % self.call.schedule.ahead, self.call.schedule.tile
        pairs = [(source, to, self.inner) for source, to in zip(self.lefts_hbm, self.lhs)]
        pairs.append((self.dout_hbm, self.dout, self.columns))
        for i, (source, to, columns) in enumerate(pairs):

            def copy(first, size, i=i, source=source, to=to, columns=columns):
                rows = source.at[pl.ds(pl.multiple_of(v.row + first, ROWS), size), columns]
                at = to.at[slot, pl.ds(first, size)]
                getattr(pltpu.make_async_copy(rows, at, self.in_sem.at[i, slot]), do)()

            tpu_visits.copy_rows(
                copy, tpu_visits.aligned(v.used(tile) + ROWS - 1), tile, source.shape[0]
            )

    def move_out(self, place, do: str) -> None:
        slot = place % self.call.schedule.ahead
        to = self.out_hbm.at[self.walk.group[place], self.inner, self.columns]
        getattr(pltpu.make_async_copy(self.out.at[slot], to, self.out_sem.at[slot]), do)()


def _kernel(refs: _Refs) -> None:
    s, walk = refs.call.schedule, refs.walk
    rows = 0, refs.dout_hbm.shape[0]
    at = lambda index: tpu_visits.visit(walk, index)

    def begin(before: Count, after: Count) -> None:
        @pl.when(before.tiles < s.ahead - 1)
        def _():
            for i in range(s.ahead - 1):

                @pl.when((before.tiles <= i) & (i < after.tiles))
                def _(i=i):
                    refs.move_in(at(i), "start")

    groups = tpu_visits.plan(
        walk, refs.sizes, refs.sizes.shape[0], rows, s.tile, empty=True, found=begin
    )

    @pl.loop(0, groups.tiles)
    def _(index):
        v = at(index)

        @pl.when(index + s.ahead - 1 < groups.tiles)
        def _():
            refs.move_in(at(index + s.ahead - 1), "start")

        @pl.when(v.last(s.tile) & (v.place >= s.ahead))
        def _():
            refs.move_out(v.place - s.ahead, "wait")

        refs.move_in(v, "wait")
        _operand(refs, v)
        used = _fold(refs, v)

        @pl.when(used <= 0)
        def _():
            refs.out[v.place % s.ahead] = jnp.zeros(refs.out.shape[1:], refs.out.dtype)

        tpu_visits.cases(used, s.parts, lambda size: _multiply(refs, v, used, size))

        @pl.when(v.last(s.tile))
        def _():
            refs.move_out(v.place, "start")

    for back in range(s.ahead, 0, -1):

        @pl.when(groups.groups >= back)
        def _(back=back):
            refs.move_out(groups.groups - back, "wait")


def _operand(refs: _Refs, v: Visit) -> None:
    """Makes one left operand of all."""
    if refs.call.operand:

        @pl.loop(0, jnp.maximum(v.used(refs.call.schedule.tile), 0), step=ROWS)
        def _(first):
            first = pl.multiple_of(first, ROWS)
            at = (v.index % refs.call.schedule.ahead, pl.ds(first, ROWS))
            scales = [tpu_per_row.column(lines, v.row + first, ROWS) for lines in refs.scales]
            refs.lhs[0][at] = refs.call.operand(*(x[at] for x in refs.lhs), *scales).astype(
                refs.lhs[0].dtype
            )


def _fold(refs: _Refs, v: Visit) -> Array:
    """Rows of the tile that are summed over; a group's last rows may take the places of its neighbor's in front.

    The order of rows does not matter to a sum, and a matrix unit sums over 128 at a time: a group whose rows in its
    first and last registers fit into one would often need a unit's pass more for them.
    """
    tile = refs.call.schedule.tile
    used, before = v.used(tile), v.start - v.row
    last = v.end % ROWS
    folded = v.first & v.last(tile) & (used > ROWS) & (last > 0) & (last <= before)
    slot, at = v.index % refs.call.schedule.ahead, tpu_visits.aligned(jnp.maximum(used, 0))

    @pl.when(folded)
    def _():
        rows = tpu_visits.rows_of(ROWS, 0)
        for x in (refs.lhs[0], refs.dout):
            head, tail = (x[slot, pl.ds(first, ROWS)] for first in (0, pl.multiple_of(at, ROWS)))
            tail = jnp.where(rows < last, tail.astype(jnp.float32), 0.0)
            x[slot, pl.ds(0, ROWS)] = jnp.where(
                rows >= before, head.astype(jnp.float32), tail
            ).astype(x.dtype)

    return jnp.where(folded, at, used)


def _multiply(refs: _Refs, v: Visit, used: Array, size: int) -> None:
    """Adds the first `size` rows of the tile to the group's sum; the group's last tile leaves it in `out`."""
    s = refs.call.schedule
    slot = v.index % s.ahead
    _zero_neighbors(refs, v, used, size)
    rows, (inner_step, column_step) = pl.ds(0, size), s.step

    def walk(store):
        @pl.loop(0, s.inner // inner_step)
        def _(i):
            inner = pl.ds(pl.multiple_of(i * inner_step, LANES), inner_step)
            lhs = refs.lhs[0][slot, rows, inner]

            @pl.loop(0, s.columns // column_step)
            def _(j):
                columns = pl.ds(pl.multiple_of(j * column_step, LANES), column_step)
                product = matmul(lhs, refs.dout[slot, rows, columns], ((0,), (0,)))
                before = jnp.where(v.first, 0.0, refs.total[inner, columns])
                store(inner, columns, product + before)

    @pl.when(v.last(s.tile))
    def _():
        def store(inner, columns, value):
            refs.out[v.place % s.ahead, inner, columns] = value.astype(refs.out.dtype)

        walk(store)

    @pl.when(jnp.logical_not(v.last(s.tile)))
    def _():
        def store(inner, columns, value):
            refs.total[inner, columns] = value

        walk(store)


def _zero_neighbors(refs: _Refs, v: Visit, used: Array, size: int) -> None:
    """Rows of other groups among the first `size` of the tile, in both operands: what is there may be anything.

    The group's end lies `used` rows into the tile. Rows in front of it are its neighbor's only if none were folded.
    """
    slot = v.index % refs.call.schedule.ahead

    def select(first, keep):
        rows = tpu_visits.rows_of(ROWS, first)
        for x in (refs.lhs[0], refs.dout):
            at = x[slot, pl.ds(first, ROWS)]
            x[slot, pl.ds(first, ROWS)] = jnp.where(keep(rows), at.astype(jnp.float32), 0.0).astype(
                x.dtype
            )

    @pl.when(v.first & (v.row < v.start) & (used == v.used(refs.call.schedule.tile)))
    def _():
        select(0, lambda rows: rows >= v.start - v.row)

    @pl.when(used < size)
    def _():
        edge = pl.multiple_of(tpu_visits.aligned(used), ROWS)
        select(edge, lambda rows: rows < used)

        @pl.loop(edge + ROWS, size, step=ROWS)
        def _(first):
            for x in (refs.lhs[0], refs.dout):
                x[slot, pl.ds(pl.multiple_of(first, ROWS), ROWS)] = jnp.zeros(
                    (ROWS, x.shape[2]), x.dtype
                )
