"""`grouped_matmul` without Pallas: each group in tiles of its own rows, as many as it needs.

A `lax.scan` goes over the groups, and a loop inside it over the group's tiles, whose number is a
value of the run, ceil(size / block). So the forward pass and both gradients cost 2 M K N FLOPs
each, plus at most block - 1 rows a group.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque
from kernels_pallas.common.precision import accumulator_dtype
from kernels_pallas.common.second_order import kept


class Options(NamedTuple):
    """The static arguments of a call."""

    out_dtype: jnp.dtype
    block: int  # rows in a tile


def block_rows(M: int, G: int) -> int:
    """Rows in a tile: about those of an average group, from 8 to 128. A larger tile pads more."""
    # Most groups have a row or none.
    if M < G:
        return 8
    # Rounded down: so that a group of about the average size is full tiles for the most part.
    power_of_two = 1 << ((M // G).bit_length() - 1)
    return min(128, max(8, power_of_two))


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """As `api.grouped_matmul`, with every default filled in."""
    M = lhs.shape[0]
    G = rhs.shape[0]
    options = Options(out_dtype, block_rows(M, G))
    return _product(options, False, lhs, rhs, group_sizes)


# The products are derivatives of each other, so each has derivatives of any order.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    options: Options,
    transposed: bool,
    x: Array,
    rhs: Array,
    group_sizes: Array,
) -> Array:
    """Rows times the matrices of their groups, or these transposed."""
    # On CPUs, XLA's fusions read broadcast operands wrongly: see `opaque`.
    x, rhs = opaque((x, rhs))
    subscripts = "mn,kn->mk" if transposed else "mk,kn->mn"
    return _times_groups(options, subscripts, x, rhs, group_sizes)


def _product_saving(
    options: Options,
    transposed: bool,
    x: Array,
    rhs: Array,
    group_sizes: Array,
):
    return _inner_product(options, transposed, x, rhs, group_sizes), (x, rhs, group_sizes)


def _product_backward(
    options: Options,
    transposed: bool,
    residuals: tuple[Array, Array, Array],
    dout: Array,
):
    x, rhs, group_sizes = residuals
    dout = dout.astype(x.dtype)
    back = options._replace(out_dtype=x.dtype)
    dx = _inner_product(back, not transposed, dout, rhs, group_sizes)
    # Of a matrix [K, N]: its K side first.
    left, right = (dout, x) if transposed else (x, dout)
    drhs = _outer(options, left, right, group_sizes)
    return dx, drhs.astype(rhs.dtype), None


_product.defvjp(_product_saving, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _inner_product(
    options: Options,
    transposed: bool,
    x: Array,
    rhs: Array,
    group_sizes: Array,
) -> Array:
    """`_product` within a derivative: differentiated, it is a second one, which needs `kept`."""
    return _product(options, transposed, x, rhs, group_sizes)


def _inner_product_saving(
    options: Options,
    transposed: bool,
    x: Array,
    rhs: Array,
    group_sizes: Array,
):
    product = _inner_product(options, transposed, x, rhs, group_sizes)
    return product, kept((x, rhs, group_sizes))


_inner_product.defvjp(_inner_product_saving, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(
    options: Options,
    left: Array,
    right: Array,
    group_sizes: Array,
) -> Array:
    """left^T right over the rows of each group."""
    left, right = opaque((left, right))
    return _outer_by_group(options, left, right, group_sizes)


def _outer_saving(
    options: Options,
    left: Array,
    right: Array,
    group_sizes: Array,
):
    return _outer(options, left, right, group_sizes), kept((left, right, group_sizes))


def _outer_backward(
    options: Options,
    residuals: tuple[Array, Array, Array],
    dmatrices: Array,
):
    left, right, group_sizes = residuals
    dmatrices = dmatrices.astype(left.dtype)
    back = options._replace(out_dtype=left.dtype)
    dleft = _inner_product(back, True, right, dmatrices, group_sizes)
    dright = _inner_product(back, False, left, dmatrices, group_sizes)
    return dleft, dright, None


_outer.defvjp(_outer_saving, _outer_backward)


def _times_groups(
    options: Options,
    product: str,
    x: Float[Array, "M I"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
) -> Float[Array, "M O"]:
    """Each row of x times its group's matrix, or the matrix transposed.

    Args:
      options: static.
      product: of a tile of rows and a matrix: "mk,kn->mn", or "mn,kn->mk" with the matrix
        transposed.
      x: the rows, sorted by group.
      rhs: one matrix for each group.
      group_sizes: how many rows each group has.

    Returns:
      The products, zeros in rows beyond the groups.
    """
    M = x.shape[0]
    block = options.block
    width = rhs.shape[2] if product == "mk,kn->mn" else rhs.shape[1]
    x = _with_spare_rows(x, block)

    def add_group(out: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        weight, start, end = group

        def add_tile(i: Array, out: Array) -> Array:
            first = start + i * block
            rows = _rows_of_tile(x, first, end, block)
            # Masked rows are written as zeros over rows of later groups: those are written later.
            tile = _matmul(product, rows, weight).astype(options.out_dtype)
            # Rows beyond all groups are not, and 0 times a matrix that is not finite is NaN.
            tile = jnp.where(_is_own(first, end, block), tile, 0)
            return jax.lax.dynamic_update_slice_in_dim(out, tile, first, 0)

        # A value of the run: the loop's length is the group's own.
        num_tiles = _num_tiles(end - start, block)
        out = jax.lax.fori_loop(0, num_tiles, add_tile, out)
        return out, None

    # Rows beyond the groups are never written.
    zeros = jnp.zeros((x.shape[0], width), options.out_dtype)
    out = varying_like(zeros, x)
    starts, ends = bounds(group_sizes, M)
    out, _ = jax.lax.scan(add_group, out, (rhs, starts, ends))
    return out[:M]


def _outer_by_group(
    options: Options,
    lhs: Float[Array, "M K"],
    dout: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
) -> Float[Array, "G K N"]:
    """lhs^T dout over the rows of each group."""
    M, K = lhs.shape
    N = dout.shape[1]
    block = options.block
    lhs = _with_spare_rows(lhs, block)
    dout = _with_spare_rows(dout, block)
    # What the sum of a group begins with, and that of an empty one.
    zeros = jnp.zeros((K, N), _accumulator(lhs))
    zeros = varying_like(zeros, lhs)

    def sum_of_group(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        start, end = group

        def add_tile(i: Array, total: Array) -> Array:
            first = start + i * block
            lhs_rows = _rows_of_tile(lhs, first, end, block)
            dout_rows = _rows_of_tile(dout, first, end, block)
            return total + _matmul("mk,mn->kn", lhs_rows, dout_rows)

        num_tiles = _num_tiles(end - start, block)
        total = jax.lax.fori_loop(0, num_tiles, add_tile, zeros)
        return None, total

    _, sums = jax.lax.scan(sum_of_group, None, bounds(group_sizes, M))
    return sums


def bounds(group_sizes: Int[Array, "G"], M: int) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """The first row of each group, and the one after its last; never beyond M."""
    # Sizes may count rows that do not exist.
    ends = jnp.minimum(jnp.cumsum(group_sizes), M)
    starts = jnp.pad(ends[:-1], (1, 0))
    return starts, ends


def _num_tiles(size: Array, block: int) -> Array:
    return (size + block - 1) // block


def _with_spare_rows(x: Float[Array, "M K"], block: int) -> Float[Array, "M2 K"]:
    """x and `block` rows more: dynamic_slice would move a tile that begins in the last row back."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _rows_of_tile(
    x: Array,
    first: Array,
    end: Array,
    block: int,
) -> Array:
    """Rows first .. first + block - 1 of x, zero from `end` on: those belong to another group."""
    rows = jax.lax.dynamic_slice_in_dim(x, first, block)
    return jnp.where(_is_own(first, end, block), rows, 0)


def _is_own(
    first: Array,
    end: Array,
    block: int,
) -> Bool[Array, "{block} 1"]:
    """Which rows of a tile are its group's."""
    return jnp.arange(block)[:, None] < end - first


def _matmul(
    subscripts: str,
    x: Array,
    y: Array,
) -> Array:
    """One tile's product, accumulated in float32 or float64."""
    return jnp.einsum(
        subscripts,
        x,
        y,
        # At the default, a TPU would round wider operands to bfloat16.
        precision="highest" if x.dtype.itemsize > 2 else None,
        preferred_element_type=_accumulator(x),
    )


def _accumulator(x: Array) -> jnp.dtype:
    return accumulator_dtype(x.dtype)
