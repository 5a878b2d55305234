"""`grouped_matmul` without Pallas: each group in tiles of its own rows, as many as its size asks for.

A `lax.scan` goes over the groups, a loop inside it over the group's tiles: its length is a value of the run,
ceil(size / block). So the forward pass and both gradients cost 2 M K N FLOPs each, plus at most block - 1 rows a group.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque


class Plan(NamedTuple):
    """What of a call is static."""

    out_dtype: jnp.dtype
    block: int


def block_rows(M: int, G: int) -> int:
    """Rows in a tile: about those of an average group, within 8 and 128. A larger tile pads more."""
    return min(128, max(8, 1 << (M // G).bit_length() - 1)) if M >= G else 8


def grouped_matmul(lhs, rhs, group_sizes, *, out_dtype: jnp.dtype) -> Array:
    """As `api.grouped_matmul`, with every default filled in."""
    return _grouped_matmul(
        Plan(out_dtype, block_rows(lhs.shape[0], rhs.shape[0])), lhs, rhs, group_sizes
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    lhs, rhs = opaque((lhs, rhs))
    return _times_groups(plan, "mk,kn->mn", lhs, rhs, group_sizes)


def _forward_saving(plan: Plan, lhs, rhs, group_sizes):
    return _grouped_matmul(plan, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(plan: Plan, residuals, dout):
    lhs, rhs, group_sizes = residuals
    lhs, rhs, dout = opaque((lhs, rhs, dout))
    dout = dout.astype(lhs.dtype)
    dlhs = _times_groups(plan._replace(out_dtype=lhs.dtype), "mn,kn->mk", dout, rhs, group_sizes)
    return dlhs, _outer_by_group(plan, lhs, dout, group_sizes).astype(rhs.dtype), None


_grouped_matmul.defvjp(_forward_saving, _backward)


def _times_groups(
    plan: Plan, product: str, x: Float[Array, "M K"], rhs: Float[Array, "G K N"], group_sizes: Array
):
    """Each row of x times its group's matrix, or the matrix transposed, as `product` says."""
    M, width = x.shape[0], rhs.shape[2 if product == "mk,kn->mn" else 1]
    x = _padded(x, plan.block)

    def group(out, group):
        weight, start, end = group

        def visit(i, out):
            first = start + i * plan.block
            rows = _rows(x, first, end, plan.block)
            # Masked rows are written as zeros over rows of later groups, which are written after this one.
            tile = _matmul(product, rows, weight).astype(plan.out_dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, tile, first, 0)

        return jax.lax.fori_loop(0, tiles(end - start, plan.block), visit, out), None

    out = varying_like(jnp.zeros((x.shape[0], width), plan.out_dtype), x)
    return jax.lax.scan(group, out, (rhs, *bounds(group_sizes, M)))[0][:M]


def _outer_by_group(
    plan: Plan, lhs: Float[Array, "M K"], dout: Float[Array, "M N"], group_sizes: Array
):
    """[G, K, N]: lhs^T dout over the rows of each group."""
    M, (K, N) = lhs.shape[0], (lhs.shape[1], dout.shape[1])
    lhs, dout = _padded(lhs, plan.block), _padded(dout, plan.block)
    zeros = varying_like(jnp.zeros((K, N), _accumulator(lhs)), lhs)

    def group(_, bounds):
        start, end = bounds

        def visit(i, total):
            first = start + i * plan.block
            rows = (_rows(x, first, end, plan.block) for x in (lhs, dout))
            return total + _matmul("mk,mn->kn", *rows)

        return None, jax.lax.fori_loop(0, tiles(end - start, plan.block), visit, zeros)

    return jax.lax.scan(group, None, bounds(group_sizes, M))[1]


def bounds(group_sizes: Int[Array, "G"], M: int) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """The first row of each group, and the one after its last; never beyond M."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), M)
    return jnp.pad(ends[:-1], (1, 0)), ends


def tiles(size: Array, block: int) -> Array:
    return (size + block - 1) // block


def _padded(x: Array, block: int) -> Array:
    """A tile that begins in the last row must not be moved back by dynamic_slice."""
    return jnp.pad(x, ((0, block), (0, 0)))


def _rows(x: Array, first: Array, end: Array, block: int) -> Array:
    """Rows first .. first + block - 1 of x, zero from `end` on: they belong to another group."""
    rows = jax.lax.dynamic_slice_in_dim(x, first, block)
    return jnp.where(jnp.arange(block)[:, None] < end - first, rows, 0)


def _matmul(subscripts: str, x: Array, y: Array) -> Array:
    """One tile's product, accumulated in float32 or float64."""
    precision = "highest" if x.dtype.itemsize > 2 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=_accumulator(x))


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, x.dtype)
