"""`grouped_matmul` on GPU (Pallas, Triton), forward and backward.

Rows times the matrix of their group: one program for each tile of rows and columns. Tiles are those
of a group, so that a group of n rows is ceil(n / tile) of them; there are programs for as many
tiles as group sizes can ever ask for, and those that a run has no use for end at once. The gradient
of the matrices: one program for each block of each group's, which goes over the group's rows.

float32 products are made of three of TF32, which is off by about 1e-6.
"""

from functools import partial
from typing import NamedTuple

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
    """Sizes of a program's tile; powers of two. Only its time depends on this."""

    rows: int
    inner: int
    columns: int
    warps: int
    stages: int


ROWS_BLOCKS = Blocks(rows=128, inner=64, columns=128, warps=8, stages=3)
ROWS_BLOCKS_32 = Blocks(rows=64, inner=32, columns=64, warps=4, stages=2)
OUTER_BLOCKS = Blocks(rows=64, inner=128, columns=128, warps=8, stages=3)
OUTER_BLOCKS_32 = Blocks(rows=32, inner=64, columns=64, warps=4, stages=2)


class Plan(NamedTuple):
    """What of a call is static."""

    out_dtype: jnp.dtype
    interpret: bool


def unsupported(lhs: Array) -> str | None:
    """Why this room cannot take a call, or None when it can."""
    return "does not compute in float64" if lhs.dtype == jnp.float64 else None


def grouped_matmul(lhs, rhs, group_sizes, *, out_dtype: jnp.dtype, interpret: bool) -> Array:
    """As `api.grouped_matmul`, with every default filled in."""
    return _grouped_matmul(Plan(out_dtype, interpret), lhs, rhs, group_sizes.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    call = partial(rows_times_groups, plan, transposed=False)
    return by_sorted_rows(call, (lhs,), (rhs,), group_sizes)


def _forward_saving(plan: Plan, lhs, rhs, group_sizes):
    return _grouped_matmul(plan, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(plan: Plan, residuals, dout):
    lhs, rhs, group_sizes = residuals
    dout, plan = dout.astype(lhs.dtype), plan._replace(out_dtype=lhs.dtype)
    back = partial(rows_times_groups, plan, transposed=True)
    dlhs = by_sorted_rows(back, (dout,), (rhs,), group_sizes)
    drhs = by_sorted_rows(partial(outer_by_group, plan), (lhs, dout), (), group_sizes, summed=True)
    return dlhs, drhs, None


_grouped_matmul.defvjp(_forward_saving, _backward)


def rows_times_groups(
    plan: Plan,
    x: Float[Array, "M I"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    transposed: bool,
) -> Array:
    """Each row of x times its group's matrix, or the matrix transposed."""
    M, O = x.shape[0], rhs.shape[1 if transposed else 2]
    b = ROWS_BLOCKS if x.dtype.itemsize == 2 else ROWS_BLOCKS_32
    x = padded_to_multiples(x, 1, b.inner)
    rhs = (
        padded_to_multiples(rhs, 1, b.columns, b.inner)
        if transposed
        else padded_to_multiples(rhs, 1, b.inner, b.columns)
    )
    group, first, end = _tiles(group_sizes, M, b.rows)
    out_rows = (
        M + b.rows if plan.interpret else M
    )  # the interpreter knows no rows that a mask leaves out
    out = pl.pallas_call(
        partial(_rows_kernel, b, M, len(group_sizes), transposed, plan.interpret),
        grid=(len(group), rhs.shape[1 if transposed else 2] // b.columns),
        out_shape=like(x, (out_rows, rhs.shape[1 if transposed else 2]), plan.out_dtype),
        compiler_params=pltriton.CompilerParams(num_warps=b.warps, num_stages=b.stages),
        cost_estimate=_cost(2 * M * x.shape[1] * O, x, rhs, M * O * plan.out_dtype.itemsize),
        interpret=plan.interpret,
        name=f"grouped_matmul_{'dlhs' if transposed else 'forward'}",
    )(group, first, end, x, rhs)
    return out[:M, :O]


def _tiles(group_sizes: Int[Array, "G"], M: int, tile: int) -> tuple[Array, Array, Array]:
    """(group, first row, row after the group's last) of every tile; group G for rows beyond the
    groups, G + 1: none.
    """
    starts, ends = bounds(group_sizes, M)
    starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, M)
    last = jnp.cumsum((ends - starts + tile - 1) // tile)  # the tile after the last of each group
    index = jnp.arange(-(-M // tile) + len(starts))
    group = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    within = jnp.minimum(group, len(starts) - 1)
    before = jnp.where(within > 0, last[within - 1], 0)
    return (
        group,
        (starts[within] + (index - before) * tile).astype(jnp.int32),
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
    tile = pl.program_id(0)
    group, end = group_ref[tile], end_ref[tile]
    rows = first_ref[tile] + jnp.arange(b.rows)
    column = pl.program_id(1) * b.columns

    @pl.when(group <= G)
    def _():
        mine = (rows < end) & (group < G)  # rows of no group are multiplied as zeros
        safe = jnp.where(rows < M, rows, M - 1)
        matrix = jnp.minimum(group, G - 1)

        def step(i, total):
            inner = i * b.inner + jnp.arange(b.inner)
            part = pltriton.load(
                x_ref.at[safe[:, None], inner[None, :]], mask=mine[:, None], other=0.0
            )
            inner, columns = pl.ds(i * b.inner, b.inner), pl.ds(column, b.columns)
            weight = rhs_ref[(matrix, columns, inner) if transposed else (matrix, inner, columns)]
            return total + _dot(interpret, part, weight, trans_b=transposed)

        total = jnp.zeros((b.rows, b.columns), jnp.float32)
        total = jax.lax.fori_loop(0, x_ref.shape[1] // b.inner, step, total)
        to = out_ref.at[rows[:, None], (column + jnp.arange(b.columns))[None, :]]
        pltriton.store(to, total.astype(out_ref.dtype), mask=(rows < end)[:, None])


def outer_by_group(
    plan: Plan, lhs: Float[Array, "M K"], dout: Float[Array, "M N"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G K N"]:
    """lhs^T dout over the rows of each group."""
    (M, K), N = lhs.shape, dout.shape[1]
    b = OUTER_BLOCKS if lhs.dtype.itemsize == 2 else OUTER_BLOCKS_32
    lhs, dout = padded_to_multiples(lhs, 1, b.inner), padded_to_multiples(dout, 1, b.columns)
    starts, ends = bounds(group_sizes, M)
    shape = len(group_sizes), lhs.shape[1], dout.shape[1]
    out = pl.pallas_call(
        partial(_outer_kernel, b, M, plan.interpret),
        grid=(shape[1] // b.inner, shape[2] // b.columns, shape[0]),
        out_specs=pl.BlockSpec((None, b.inner, b.columns), lambda i, j, g: (g, i, j)),
        out_shape=like(lhs, shape, plan.out_dtype),
        compiler_params=pltriton.CompilerParams(num_warps=b.warps, num_stages=b.stages),
        cost_estimate=_cost(
            2 * M * K * N, lhs, dout, len(group_sizes) * K * N * plan.out_dtype.itemsize
        ),
        interpret=plan.interpret,
        name="grouped_matmul_drhs",
    )(starts.astype(jnp.int32), ends.astype(jnp.int32), lhs, dout)
    return out[:, :K, :N]


def _outer_kernel(
    b: Blocks, M: int, interpret: bool, start_ref, end_ref, lhs_ref, dout_ref, out_ref
):
    group = pl.program_id(2)
    start, end = start_ref[group], end_ref[group]
    inner = pl.program_id(0) * b.inner + jnp.arange(b.inner)
    columns = pl.program_id(1) * b.columns + jnp.arange(b.columns)

    def step(i, total):
        rows = start + i * b.rows + jnp.arange(b.rows)
        mine, safe = (rows < end)[:, None], jnp.where(rows < M, rows, M - 1)[:, None]
        lhs = pltriton.load(lhs_ref.at[safe, inner[None, :]], mask=mine, other=0.0)
        dout = pltriton.load(dout_ref.at[safe, columns[None, :]], mask=mine, other=0.0)
        return total + _dot(interpret, lhs, dout, trans_a=True)

    total = jnp.zeros((b.inner, b.columns), jnp.float32)
    out_ref[...] = jax.lax.fori_loop(0, (end - start + b.rows - 1) // b.rows, step, total).astype(
        out_ref.dtype
    )


def _dot(
    interpret: bool, x: Array, y: Array, trans_a: bool = False, trans_b: bool = False
) -> Array:
    """float32 sums. A float32 product is made of three of TF32, which a CPU does not have."""
    precision = None
    if x.dtype == jnp.float32:
        precision = (
            jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        )
    return pltriton.dot(x, y, trans_a=trans_a, trans_b=trans_b, precision=precision)


def _cost(flops: int, x: Array, y: Array, out_bytes: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops, 0, moved((x, y)) + out_bytes)
