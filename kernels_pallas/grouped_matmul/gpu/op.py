"""`grouped_matmul` on GPU (Pallas, Triton), forward and backward.

Rows times the matrix of their group: a program for each tile of rows and block of columns. Tiles
are those of a group, so that a group of n rows has ceil(n / tile) of them. Group sizes are values
of the run, while a grid is static: there are programs for as many tiles as group sizes can ever ask
for, and those that a run has no use for end at once.

The gradient of the matrices: a program for each block of each group's matrix, which goes over the
group's rows.

A float32 product is made of three of TF32, which is off by about 1e-6.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.common.gpu import moved
from kernels_pallas.common.mesh import by_sorted_rows, like
from kernels_pallas.common.padding import padded_to_multiples
from kernels_pallas.grouped_matmul.xla import bounds


class Blocks(NamedTuple):
    """Sizes of a program's tile, powers of two. Only its time depends on them.

    Attributes:
      inner: of the axis that is summed (rows times groups), or of K (the matrices' gradient).
      columns: of the result.
    """

    rows: int
    inner: int
    columns: int
    warps: int
    stages: int


# Of 16-bit operands, and of 32-bit ones, which take twice the room.
ROWS_BLOCKS = Blocks(rows=128, inner=64, columns=128, warps=8, stages=3)
ROWS_BLOCKS_32 = Blocks(rows=64, inner=32, columns=64, warps=4, stages=2)
OUTER_BLOCKS = Blocks(rows=64, inner=128, columns=128, warps=8, stages=3)
OUTER_BLOCKS_32 = Blocks(rows=32, inner=64, columns=64, warps=4, stages=2)


class Plan(NamedTuple):
    """The static arguments of a call."""

    out_dtype: Any
    interpret: bool


class Tiles(NamedTuple):
    """Where each tile of rows lies. Tiles beyond the groups have group G, unused ones G + 1."""

    group: Int[Array, "tiles"]
    first: Int[Array, "tiles"]  # its first row
    end: Int[Array, "tiles"]  # the row after its group's last


def unsupported(lhs: Array) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    if lhs.dtype == jnp.float64:
        return "does not compute in float64"
    return None


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: Any,
    interpret: bool,
) -> Float[Array, "M N"]:
    """As `api.grouped_matmul`, with every default filled in."""
    plan = Plan(out_dtype, interpret)
    return _grouped_matmul(plan, lhs, rhs, group_sizes.astype(jnp.int32))


# --- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    call = partial(rows_times_groups, plan, transposed=False)
    return by_sorted_rows(call, (lhs,), (rhs,), group_sizes)


def _forward_saving(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array):
    out = _grouped_matmul(plan, lhs, rhs, group_sizes)
    return out, (lhs, rhs, group_sizes)


def _backward(plan: Plan, residuals, dout: Array):
    lhs, rhs, group_sizes = residuals
    dout = dout.astype(lhs.dtype)
    plan = plan._replace(out_dtype=lhs.dtype)
    times_transposed = partial(rows_times_groups, plan, transposed=True)
    dlhs = by_sorted_rows(times_transposed, (dout,), (rhs,), group_sizes)
    outer = partial(outer_by_group, plan)
    # Rows of one group can lie on several devices: each holds a part of the group's sum.
    drhs = by_sorted_rows(outer, (lhs, dout), (), group_sizes, summed=True)
    return dlhs, drhs, None


_grouped_matmul.defvjp(_forward_saving, _backward)


# --- rows times groups


def rows_times_groups(
    plan: Plan,
    x: Float[Array, "M I"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    transposed: bool,
) -> Float[Array, "M O"]:
    """Each row of x times its group's matrix, or the matrix transposed."""
    M = x.shape[0]
    G = group_sizes.shape[0]
    out_axis = 1 if transposed else 2
    out_width = rhs.shape[out_axis]
    b = ROWS_BLOCKS if x.dtype.itemsize == 2 else ROWS_BLOCKS_32
    x = padded_to_multiples(x, 1, b.inner)
    if transposed:
        rhs = padded_to_multiples(rhs, 1, b.columns, b.inner)
    else:
        rhs = padded_to_multiples(rhs, 1, b.inner, b.columns)
    padded_width = rhs.shape[out_axis]
    tiles = _tiles(group_sizes, M, b.rows)
    # The interpreter knows no rows that a mask leaves out: a last tile needs room.
    out_rows = M + b.rows if plan.interpret else M
    out_bytes = M * out_width * plan.out_dtype.itemsize
    out = pl.pallas_call(
        partial(_rows_kernel, b, M, G, transposed, plan.interpret),
        grid=(tiles.group.shape[0], padded_width // b.columns),
        out_shape=like(x, (out_rows, padded_width), plan.out_dtype),
        compiler_params=_compiler_params(b),
        cost_estimate=_cost(2 * M * x.shape[1] * out_width, x, rhs, out_bytes),
        interpret=plan.interpret,
        name="grouped_matmul_dlhs" if transposed else "grouped_matmul_forward",
    )(*tiles, x, rhs)
    return out[:M, :out_width]


def _tiles(group_sizes: Int[Array, "G"], M: int, tile: int) -> Tiles:
    """The tiles of all groups in order, then those of rows beyond the groups, then unused ones."""
    starts, ends = bounds(group_sizes, M)
    # The rows beyond the groups, as one more group.
    starts = jnp.append(starts, ends[-1])
    ends = jnp.append(ends, M)
    tiles_of_group = (ends - starts + tile - 1) // tile
    # The tile after the last one of each group.
    last = jnp.cumsum(tiles_of_group)
    # Every group can end in a tile that is not full.
    most_tiles = -(-M // tile) + starts.shape[0]
    index = jnp.arange(most_tiles)
    group = jnp.searchsorted(last, index, side="right", method="compare_all")
    # Unused tiles come after every group: any group does for their rows.
    within = jnp.minimum(group, starts.shape[0] - 1)
    before = jnp.where(within > 0, last[within - 1], 0)
    first = starts[within] + (index - before) * tile
    return Tiles(
        group.astype(jnp.int32),
        first.astype(jnp.int32),
        ends[within].astype(jnp.int32),
    )


def _rows_kernel(
    b: Blocks,
    M: int,
    G: int,
    transposed: bool,
    interpret: bool,
    group_ref,
    first_ref,
    end_ref,
    x_ref,
    rhs_ref,
    out_ref,
):
    """One tile of rows times a block of columns of its group's matrix.

    The sum over the inner axis stays in registers, block by block. Rows of a tile that belong to
    the next group are neither read (a mask makes them zeros) nor written.
    """
    tile = pl.program_id(0)
    group = group_ref[tile]
    end = end_ref[tile]
    rows = first_ref[tile] + jnp.arange(b.rows)
    column = pl.program_id(1) * b.columns

    # Unused tiles have group G + 1.
    @pl.when(group <= G)
    def _():
        # Rows of no group (group G) are multiplied as zeros, so that they are written as zeros.
        is_read = (rows < end) & (group < G)
        # An address that is there, for rows that the mask leaves out.
        safe_rows = jnp.where(rows < M, rows, M - 1)
        matrix = jnp.minimum(group, G - 1)
        columns = pl.ds(column, b.columns)

        def step(i, total):
            at = i * b.inner + jnp.arange(b.inner)
            part = pltriton.load(
                x_ref.at[safe_rows[:, None], at[None, :]],
                mask=is_read[:, None],
                other=0.0,
            )
            inner = pl.ds(i * b.inner, b.inner)
            if transposed:
                weight = rhs_ref[matrix, columns, inner]
            else:
                weight = rhs_ref[matrix, inner, columns]
            return total + _dot(interpret, part, weight, trans_b=transposed)

        zeros = jnp.zeros((b.rows, b.columns), jnp.float32)
        total = jax.lax.fori_loop(0, x_ref.shape[1] // b.inner, step, zeros)
        out_columns = column + jnp.arange(b.columns)
        pltriton.store(
            out_ref.at[rows[:, None], out_columns[None, :]],
            total.astype(out_ref.dtype),
            mask=(rows < end)[:, None],
        )


# --- the gradient of the matrices


def outer_by_group(
    plan: Plan,
    lhs: Float[Array, "M K"],
    dout: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
) -> Float[Array, "G K N"]:
    """lhs^T dout over the rows of each group."""
    M, K = lhs.shape
    N = dout.shape[1]
    G = group_sizes.shape[0]
    b = OUTER_BLOCKS if lhs.dtype.itemsize == 2 else OUTER_BLOCKS_32
    lhs = padded_to_multiples(lhs, 1, b.inner)
    dout = padded_to_multiples(dout, 1, b.columns)
    starts, ends = bounds(group_sizes, M)
    padded_K = lhs.shape[1]
    padded_N = dout.shape[1]
    out_bytes = G * K * N * plan.out_dtype.itemsize
    out = pl.pallas_call(
        partial(_outer_kernel, b, M, plan.interpret),
        grid=(padded_K // b.inner, padded_N // b.columns, G),
        out_specs=pl.BlockSpec((None, b.inner, b.columns), lambda i, j, g: (g, i, j)),
        out_shape=like(lhs, (G, padded_K, padded_N), plan.out_dtype),
        compiler_params=_compiler_params(b),
        cost_estimate=_cost(2 * M * K * N, lhs, dout, out_bytes),
        interpret=plan.interpret,
        name="grouped_matmul_drhs",
    )(starts.astype(jnp.int32), ends.astype(jnp.int32), lhs, dout)
    return out[:, :K, :N]


def _outer_kernel(
    b: Blocks,
    M: int,
    interpret: bool,
    start_ref,
    end_ref,
    lhs_ref,
    dout_ref,
    out_ref,
):
    """A block [inner, columns] of one group's gradient, accumulated in registers over its rows.

    The loop's length is a value of the run: an empty group writes zeros at once.
    """
    group = pl.program_id(2)
    start = start_ref[group]
    end = end_ref[group]
    inner = pl.program_id(0) * b.inner + jnp.arange(b.inner)
    columns = pl.program_id(1) * b.columns + jnp.arange(b.columns)

    def step(i, total):
        rows = start + i * b.rows + jnp.arange(b.rows)
        is_read = (rows < end)[:, None]
        # An address that is there, for rows that the mask leaves out.
        safe_rows = jnp.where(rows < M, rows, M - 1)[:, None]
        lhs = pltriton.load(lhs_ref.at[safe_rows, inner[None, :]], mask=is_read, other=0.0)
        dout = pltriton.load(dout_ref.at[safe_rows, columns[None, :]], mask=is_read, other=0.0)
        return total + _dot(interpret, lhs, dout, trans_a=True)

    num_tiles = (end - start + b.rows - 1) // b.rows
    zeros = jnp.zeros((b.inner, b.columns), jnp.float32)
    total = jax.lax.fori_loop(0, num_tiles, step, zeros)
    out_ref[...] = total.astype(out_ref.dtype)


# --- both


def _dot(
    interpret: bool,
    x: Array,
    y: Array,
    trans_a: bool = False,
    trans_b: bool = False,
) -> Array:
    """A product with float32 sums. Three products of TF32 make a float32 one."""
    precision = None
    if x.dtype == jnp.float32:
        # A CPU has no TF32.
        precise = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if interpret else precise
    return pltriton.dot(x, y, trans_a=trans_a, trans_b=trans_b, precision=precision)


def _compiler_params(b: Blocks) -> pltriton.CompilerParams:
    return pltriton.CompilerParams(num_warps=b.warps, num_stages=b.stages)


def _cost(flops: int, x: Array, y: Array, out_bytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops, 0, moved((x, y)) + out_bytes)
