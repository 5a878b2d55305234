"""`grouped_matmul` on GPU (Pallas, Triton), forward and backward.

Rows times the matrix of their group: a program for each tile of rows and block of columns. Tiles
are those of a group, so that a group of n rows has ceil(n / tile) of them. Group sizes are values
of the run, while a grid is static: there are programs for as many tiles as group sizes can ever ask
for, and those that a run has no use for end at once. Programs of the same rows follow each other,
so that the rows come from memory once, and the matrices of a group stay in the cache.

A program takes one array of rows and several matrices a group (`spread`: an expert's gate and up
read their rows once), or several arrays of rows, a matrix each, and sums the products (`gathered`,
its derivative).

The gradient of the matrices: a program for each block of each group's matrix, which goes over the
group's rows.

A float32 product is made of three of TF32, which is off by about 1e-6.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.common.gpu import moved
from kernels_pallas.common.mesh import by_sorted_rows, like
from kernels_pallas.common.padding import padded_to_multiples, power_of_two, round_up
from kernels_pallas.grouped_matmul.gpu.tuning import Blocks, schedule

# Pairs of tile and group that a program of the table of tiles compares.
TABLE_ELEMENTS = 8192


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
    (out,) = _spread(plan, False, lhs, (rhs,), group_sizes)
    return out


def grouped_matmuls(
    lhs: Float[Array, "M K"],
    matrices: Sequence[Float[Array, "G K N"]],
    group_sizes: Int[Array, "G"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "M N"], ...]:
    """`grouped_matmul` of the same rows with several matrices of one shape a group.

    Args:
      lhs: read once for all of them.
      matrices: the results have lhs's dtype.
      group_sizes: as bounded by the caller.
      interpret: whether the kernels run in interpret mode.

    Returns:
      A result for each.
    """
    plan = Plan(lhs.dtype, interpret)
    return _spread(plan, False, lhs, tuple(matrices), group_sizes)


# --- the derivative. The products are derivatives of each other, so each has those of any order


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(
    plan: Plan,
    transposed: bool,
    x: Array,
    matrices: tuple[Array, ...],
    group_sizes: Array,
) -> tuple[Array, ...]:
    """Rows times each of the matrices of their groups, or these transposed."""
    return _on_mesh(plan, transposed, (x,), matrices, group_sizes)


def _spread_saving(
    plan: Plan,
    transposed: bool,
    x: Array,
    matrices: tuple[Array, ...],
    group_sizes: Array,
):
    return _spread(plan, transposed, x, matrices, group_sizes), (x, matrices, group_sizes)


def _spread_backward(
    plan: Plan,
    transposed: bool,
    residuals,
    douts: tuple[Array, ...],
):
    x, matrices, group_sizes = residuals
    back = plan._replace(out_dtype=x.dtype)
    # Both operands of a product have one dtype.
    cotangents = tuple(dout.astype(x.dtype) for dout in douts)
    dx = _gathered(back, not transposed, cotangents, matrices, group_sizes)
    dmatrices = [_outer(back, transposed, x, dout, group_sizes) for dout in cotangents]
    return dx, tuple(dmatrices), None


_spread.defvjp(_spread_saving, _spread_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(
    plan: Plan,
    transposed: bool,
    xs: tuple[Array, ...],
    matrices: tuple[Array, ...],
    group_sizes: Array,
) -> Array:
    """The sum of the products of several arrays of rows, each with its matrices."""
    (out,) = _on_mesh(plan, transposed, xs, matrices, group_sizes)
    return out


def _gathered_saving(
    plan: Plan,
    transposed: bool,
    xs: tuple[Array, ...],
    matrices: tuple[Array, ...],
    group_sizes: Array,
):
    return _gathered(plan, transposed, xs, matrices, group_sizes), (xs, matrices, group_sizes)


def _gathered_backward(
    plan: Plan,
    transposed: bool,
    residuals,
    dout: Array,
):
    xs, matrices, group_sizes = residuals
    back = plan._replace(out_dtype=xs[0].dtype)
    dout = dout.astype(back.out_dtype)
    dxs = _spread(back, not transposed, dout, matrices, group_sizes)
    dmatrices = [_outer(back, transposed, x, dout, group_sizes) for x in xs]
    return dxs, tuple(dmatrices), None


_gathered.defvjp(_gathered_saving, _gathered_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _outer(
    plan: Plan,
    transposed: bool,
    x: Array,
    dout: Array,
    group_sizes: Array,
) -> Array:
    """x^T dout over the rows of each group; dout^T x where the matrices were transposed."""
    left, right = (dout, x) if transposed else (x, dout)
    outer = partial(outer_by_group, plan)
    # Rows of one group can lie on several devices: each holds a part of the group's sum.
    return by_sorted_rows(outer, (left, right), (), group_sizes, summed=True)


def _outer_saving(
    plan: Plan,
    transposed: bool,
    x: Array,
    dout: Array,
    group_sizes: Array,
):
    return _outer(plan, transposed, x, dout, group_sizes), (x, dout, group_sizes)


def _outer_backward(
    plan: Plan,
    transposed: bool,
    residuals,
    dmatrices: Array,
):
    x, dout, group_sizes = residuals
    back = plan._replace(out_dtype=x.dtype)
    matrices = (dmatrices.astype(x.dtype),)
    dx = _gathered(back, not transposed, (dout,), matrices, group_sizes)
    ddout = _gathered(back, transposed, (x,), matrices, group_sizes)
    return dx, ddout, None


_outer.defvjp(_outer_saving, _outer_backward)


# --- rows times groups


def _on_mesh(
    plan: Plan,
    transposed: bool,
    xs: tuple[Array, ...],
    matrices: tuple[Array, ...],
    group_sizes: Array,
) -> tuple[Array, ...]:
    call = partial(rows_times_groups, plan, transposed=transposed)
    return by_sorted_rows(call, (xs,), (matrices,), group_sizes)


def rows_times_groups(
    plan: Plan,
    xs: Sequence[Float[Array, "M I"]],
    matrices: Sequence[Float[Array, "G K N"]],
    group_sizes: Int[Array, "G"],
    *,
    transposed: bool,
) -> tuple[Float[Array, "M O"], ...]:
    """Each row times its group's matrices.

    Args:
      plan: static.
      xs: one array, which is multiplied with every one of `matrices`; or one for each, whose
        products are summed.
      matrices: of one shape.
      group_sizes: how many rows each group has.
      transposed: whether the matrices are.

    Returns:
      One array, or one for each of `matrices`. Rows beyond the groups are zeros.
    """
    M, inner = xs[0].shape
    G = group_sizes.shape[0]
    out_axis = 1 if transposed else 2
    out_width = matrices[0].shape[out_axis]
    num_outs = len(matrices) if len(xs) == 1 else 1
    row = schedule(xs[0].dtype.itemsize)
    b = row.rows if len(xs) == 1 else row.gathered
    # Sums of several results fit into the registers of one.
    b = b._replace(columns=b.columns // power_of_two(num_outs))
    multiples = (1, b.columns, b.inner) if transposed else (1, b.inner, b.columns)
    xs = [padded_to_multiples(x, 1, b.inner) for x in xs]
    matrices = [padded_to_multiples(matrix, *multiples) for matrix in matrices]
    padded_width = matrices[0].shape[out_axis]
    tiles = _tiles(plan, group_sizes, M, b.rows)
    # The interpreter knows no rows that a mask leaves out: a last tile needs room.
    out_rows = M + b.rows if plan.interpret else M
    out = like(xs[0], (out_rows, padded_width), plan.out_dtype)
    out_bytes = num_outs * M * out_width * plan.out_dtype.itemsize
    moved_bytes = moved([*xs, *matrices]) + out_bytes
    column_blocks = padded_width // b.columns
    name = "dlhs" if transposed else "forward"
    outs = pl.pallas_call(
        partial(_rows_kernel, plan, b, M, G, transposed, len(xs), len(matrices)),
        # The blocks of columns of a tile follow each other.
        grid=(tiles.group.shape[0] * column_blocks,),
        out_shape=[out] * num_outs,
        compiler_params=_compiler_params(b),
        cost_estimate=pl.CostEstimate(
            2 * M * inner * out_width * len(matrices),
            0,
            moved_bytes,
        ),
        interpret=plan.interpret,
        name=f"grouped_matmul_{name}",
    )(*tiles, *xs, *matrices)
    return tuple(x[:M, :out_width] for x in outs)


def _tiles(
    plan: Plan,
    group_sizes: Int[Array, "G"],
    M: int,
    tile: int,
) -> Tiles:
    """The tiles of all groups in order, then those of rows beyond the groups, then unused ones.

    One kernel, where XLA would need five, each of which takes longer to start than to run.
    """
    G = group_sizes.shape[0]
    # Every group can end in a tile that is not full, and so can the rows beyond them.
    most_tiles = -(-M // tile) + G + 1
    padded_groups = power_of_two(G + 1)
    per_program = max(1, min(power_of_two(most_tiles), TABLE_ELEMENTS // padded_groups))
    num_tiles = round_up(most_tiles, per_program)
    column = like(group_sizes, (num_tiles,), jnp.int32)
    found = pl.pallas_call(
        partial(_tiles_kernel, M, tile, G),
        grid=(num_tiles // per_program,),
        in_specs=[pl.BlockSpec((G,), lambda i: (0,))],
        out_specs=[pl.BlockSpec((per_program,), lambda i: (i,))] * 3,
        out_shape=[column] * 3,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=plan.interpret,
        name="grouped_matmul_tiles",
    )(group_sizes)
    return Tiles(*[x[:most_tiles] for x in found])


def _tiles_kernel(
    M: int,
    tile: int,
    G: int,
    sizes_ref,
    group_ref,
    first_ref,
    end_ref,
) -> None:
    """Some tiles of the table. Every program sums all group sizes, which are few."""
    group = _iota(power_of_two(G + 1))
    starts, ends = _bounds(sizes_ref, group, M)
    # The rows beyond the groups, as one more group.
    ends = jnp.where(group == G, jnp.int32(M), ends)
    tiles_of_group = lax.div(ends - starts + np.int32(tile - 1), np.int32(tile))
    # The tile after the last one of each group.
    last = lax.cumsum(tiles_of_group)

    num_tiles = group_ref.shape[0]
    index = pl.program_id(0) * np.int32(num_tiles) + _iota(num_tiles)
    is_past = last[None, :] <= index[:, None]
    group_of_tile = jnp.sum(is_past.astype(jnp.int32), axis=1, dtype=jnp.int32)
    is_own = group[None, :] == group_of_tile[:, None]
    before = _sum_where(is_past, tiles_of_group)
    # Of an unused tile, numbers that nothing reads.
    group_ref[...] = jnp.minimum(group_of_tile, np.int32(G + 1))
    first_ref[...] = _sum_where(is_own, starts) + (index - before) * np.int32(tile)
    end_ref[...] = _sum_where(is_own, ends)


def _bounds(
    sizes_ref,
    group: Int[Array, "P"],
    M: int,
) -> tuple[Int[Array, "P"], Int[Array, "P"]]:
    """The first row of each group, and the one after its last; never beyond M."""
    G = sizes_ref.shape[0]
    sizes = pltriton.load(
        sizes_ref.at[jnp.minimum(group, np.int32(G - 1))],
        mask=group < G,
        other=0,
    )
    ends = lax.cumsum(sizes)
    rows = np.int32(M)
    # Sizes may count rows that do not exist.
    return jnp.minimum(ends - sizes, rows), jnp.minimum(ends, rows)


def _sum_where(
    which: Array,
    numbers: Int[Array, "P"],
) -> Int[Array, "tiles"]:
    """Of each tile the sum of the groups' numbers that are meant."""
    chosen = jnp.where(which, numbers[None, :], jnp.int32(0))
    return jnp.sum(chosen, axis=1, dtype=jnp.int32)


def _rows_kernel(
    plan: Plan,
    b: Blocks,
    M: int,
    G: int,
    transposed: bool,
    num_xs: int,
    num_matrices: int,
    group_ref,
    first_ref,
    end_ref,
    *refs,
) -> None:
    """One tile of rows times a block of columns of its group's matrices.

    The sums over the inner axis stay in registers, block by block. Rows of a tile that belong to
    the next group are neither read (a mask makes them zeros) nor written.
    """
    x_refs = refs[:num_xs]
    matrix_refs = refs[num_xs : num_xs + num_matrices]
    out_refs = refs[num_xs + num_matrices :]
    column_blocks = np.int32(out_refs[0].shape[1] // b.columns)
    tile = lax.div(pl.program_id(0), column_blocks)
    column = (pl.program_id(0) - tile * column_blocks) * np.int32(b.columns)
    group = group_ref[tile]
    end = end_ref[tile]
    rows = first_ref[tile] + _iota(b.rows)

    # Unused tiles have group G + 1.
    @pl.when(group <= G)
    def _():
        is_read = rows < end
        # An address that is there, for rows that the mask leaves out.
        safe_rows = jnp.where(rows < M, rows, np.int32(M - 1))
        matrix = jnp.minimum(group, np.int32(G - 1))
        columns = pl.ds(column, b.columns)

        def step(i, totals):
            at = i * np.int32(b.inner)
            inner_rows = at + _iota(b.inner)
            inner = pl.ds(at, b.inner)
            index = (matrix, columns, inner) if transposed else (matrix, inner, columns)
            parts = []
            for x_ref in x_refs:
                part = pltriton.load(
                    x_ref.at[safe_rows[:, None], inner_rows[None, :]],
                    mask=is_read[:, None],
                    other=0.0,
                )
                parts.append(part)
            totals = list(totals)
            for number, matrix_ref in enumerate(matrix_refs):
                part = parts[min(number, num_xs - 1)]
                out = min(number, len(totals) - 1)
                product = _dot(plan.interpret, part, matrix_ref[index], trans_b=transposed)
                totals[out] = totals[out] + product
            return tuple(totals)

        zeros = jnp.zeros((b.rows, b.columns), jnp.float32)
        # Rows of no group (group G) are zeros: with 0 in their place, a matrix that is not finite
        # would make NaN. Selected behind the loop, ptxas would serialize its matrix products.
        inner_blocks = np.int32(x_refs[0].shape[1] // b.inner)
        steps = jnp.where(group < G, inner_blocks, np.int32(0))
        totals = lax.fori_loop(np.int32(0), steps, step, (zeros,) * len(out_refs))
        out_columns = column + _iota(b.columns)
        for total, out_ref in zip(totals, out_refs):
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
    b = schedule(lhs.dtype.itemsize).outer
    lhs = padded_to_multiples(lhs, 1, b.inner)
    dout = padded_to_multiples(dout, 1, b.columns)
    padded_K = lhs.shape[1]
    padded_N = dout.shape[1]
    out_bytes = G * K * N * plan.out_dtype.itemsize
    out = pl.pallas_call(
        partial(_outer_kernel, b, M, plan.interpret),
        grid=(padded_K // b.inner, padded_N // b.columns, G),
        out_specs=pl.BlockSpec((None, b.inner, b.columns), lambda i, j, g: (g, i, j)),
        out_shape=like(lhs, (G, padded_K, padded_N), plan.out_dtype),
        compiler_params=_compiler_params(b),
        cost_estimate=pl.CostEstimate(2 * M * K * N, 0, moved((lhs, dout)) + out_bytes),
        interpret=plan.interpret,
        name="grouped_matmul_drhs",
    )(group_sizes, lhs, dout)
    return out[:, :K, :N]


def _outer_kernel(
    b: Blocks,
    M: int,
    interpret: bool,
    sizes_ref,
    lhs_ref,
    dout_ref,
    out_ref,
) -> None:
    """A block [inner, columns] of one group's gradient, accumulated in registers over its rows.

    The loop's length is a value of the run: an empty group writes zeros at once.
    """
    # Summed here: a kernel for it would take longer to start than to run.
    group = _iota(power_of_two(sizes_ref.shape[0]))
    starts, ends = _bounds(sizes_ref, group, M)
    is_own = group == pl.program_id(2)
    start = jnp.sum(jnp.where(is_own, starts, jnp.int32(0)), dtype=jnp.int32)
    end = jnp.sum(jnp.where(is_own, ends, jnp.int32(0)), dtype=jnp.int32)
    inner = pl.program_id(0) * np.int32(b.inner) + _iota(b.inner)
    columns = pl.program_id(1) * np.int32(b.columns) + _iota(b.columns)

    def step(i, total):
        rows = start + i * np.int32(b.rows) + _iota(b.rows)
        is_read = (rows < end)[:, None]
        # An address that is there, for rows that the mask leaves out.
        safe_rows = jnp.where(rows < M, rows, np.int32(M - 1))[:, None]
        lhs = pltriton.load(lhs_ref.at[safe_rows, inner[None, :]], mask=is_read, other=0.0)
        dout = pltriton.load(dout_ref.at[safe_rows, columns[None, :]], mask=is_read, other=0.0)
        return total + _dot(interpret, lhs, dout, trans_a=True)

    num_tiles = lax.div(end - start + np.int32(b.rows - 1), np.int32(b.rows))
    zeros = jnp.zeros((b.inner, b.columns), jnp.float32)
    total = lax.fori_loop(np.int32(0), num_tiles, step, zeros)
    out_ref[...] = total.astype(out_ref.dtype)


# --- both


def _iota(size: int) -> Int[Array, "{size}"]:
    # 32 bits also under x64.
    return lax.iota(jnp.int32, size)


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
