"""`grouped_matmul` on TPU (Pallas, Mosaic), forward and backward.

What the kernels cover, padding, the derivative, meshes. There are two kernels. Rows times the
matrix of their group (`rows.py`) is the forward pass, and with the matrices read transposed the
gradient of the rows; `outer.py` is the gradient of the matrices. Each reads the group sizes when it
runs, and does the FLOPs of the rows that there are, plus those that fill up a group's last
registers.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in
several passes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.common.mesh import by_sorted_rows
from kernels_pallas.common.padding import padded_to_multiples
from kernels_pallas.common.tpu import Interpret, interpret_params
from kernels_pallas.grouped_matmul.tpu import outer, per_row, rows, tuning
from kernels_pallas.grouped_matmul.tpu.outer import OuterInputs, OuterOptions
from kernels_pallas.grouped_matmul.tpu.rows import RowsInputs, RowsOptions
from kernels_pallas.grouped_matmul.tpu.tiles import LANES, ROWS


def unsupported(lhs: Float[Array, "M K"], rhs: Float[Array, "G K N"]) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    if lhs.dtype == jnp.float64:
        return "does not compute in float64"
    item = 2 if lhs.dtype == jnp.bfloat16 else 4
    # The backward pass multiplies by the transposed matrices: both widths are an inner one.
    widest = max(rhs.shape[1:])
    if widest > tuning.largest_inner(item):
        return tuning.too_large(widest, item)
    return None


class Options(NamedTuple):
    """The static arguments of a call."""

    out_dtype: jnp.dtype
    interpret: Interpret


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G K N"],
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: jnp.dtype,
    interpret: Interpret,
) -> Float[Array, "M N"]:
    """As `api.grouped_matmul`, with every default filled in."""
    if lhs.dtype == jnp.float16:
        # Mosaic does not convert to or from float16.
        lhs = lhs.astype(jnp.float32)
        rhs = rhs.astype(jnp.float32)
    # The kernels write what Mosaic can; any other dtype is converted outside.
    kernel_dtype = jnp.dtype(jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32)
    options = Options(kernel_dtype, interpret)
    out = _product(
        options,
        False,
        lhs,
        rhs,
        group_sizes.astype(jnp.int32),
    )
    return out.astype(out_dtype)


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
    name = "grouped_matmul_dlhs" if transposed else "grouped_matmul_forward"
    rows_options = RowsOptions(
        name,
        options.interpret,
        (options.out_dtype,),
        transposed=transposed,
    )
    (out,), _ = rows_times_groups(rows_options, RowsInputs([x], [rhs], group_sizes))
    return out


def _product_saving(
    options: Options,
    transposed: bool,
    x: Array,
    rhs: Array,
    group_sizes: Array,
):
    return _product(options, transposed, x, rhs, group_sizes), (x, rhs, group_sizes)


def _product_backward(
    options: Options,
    transposed: bool,
    residuals: tuple[Array, Array, Array],
    dout: Array,
):
    x, rhs, group_sizes = residuals
    # Both operands of a matmul have one dtype.
    dout = dout.astype(x.dtype)
    back = options._replace(out_dtype=x.dtype)
    dx = _product(back, not transposed, dout, rhs, group_sizes)
    # Of a matrix [K, N]: its K side first.
    left, right = (dout, x) if transposed else (x, dout)
    return dx, _outer(back, left, right, group_sizes), None


_product.defvjp(_product_saving, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(
    options: Options,
    left: Array,
    right: Array,
    group_sizes: Array,
) -> Array:
    """left^T right over the rows of each group."""
    return outer_by_group(
        OuterOptions("grouped_matmul_drhs", options.interpret),
        OuterInputs([left], right, group_sizes),
    )


def _outer_saving(
    options: Options,
    left: Array,
    right: Array,
    group_sizes: Array,
):
    return _outer(options, left, right, group_sizes), (left, right, group_sizes)


def _outer_backward(
    options: Options,
    residuals: tuple[Array, Array, Array],
    dmatrices: Array,
):
    left, right, group_sizes = residuals
    dleft = _product(options, True, right, dmatrices, group_sizes)
    dright = _product(options, False, left, dmatrices, group_sizes)
    return dleft, dright, None


_outer.defvjp(_outer_saving, _outer_backward)


def rows_times_groups(
    options: RowsOptions,
    inputs: RowsInputs,
) -> tuple[list[Float[Array, "R O"]], Float[Array, "R"] | None]:
    """`rows.rows_times_groups` of arrays of any size, on any mesh.

    Args:
      options: static.
      inputs: as there; the scale is [R].

    Returns:
      The outputs, and the row sums, float32, if any.
    """
    O = inputs.matrices[0].shape[1 if options.transposed else 2]

    def on_device(
        xs,
        tiled,
        scale,
        matrices,
        group_sizes,
    ):
        R = xs[0].shape[0]
        padded = RowsInputs(
            xs=[padded_to_multiples(x, ROWS, LANES) for x in xs],
            matrices=[padded_to_multiples(x, 1, LANES, LANES) for x in matrices],
            group_sizes=group_sizes,
            tiled=[padded_to_multiples(x, ROWS, LANES) for x in tiled],
            scale=None if scale is None else _in_lines(scale),
        )
        outs, sums = rows.rows_times_groups(
            options._replace(interpret=interpret_params(options.interpret, xs[0])),
            tuning.rows_schedule(options, padded),
            padded,
        )
        if sums is not None:
            # Every core has the sums of its own rows, and zeros for the others.
            sums = jnp.sum(sums, axis=0).reshape(-1)[:R]
        # Without the padding.
        return [out[:R, :O] for out in outs], sums

    # Rows are split over the mesh, every device has all matrices.
    by_row = (list(inputs.xs), list(inputs.tiled), inputs.scale)
    return by_sorted_rows(
        on_device,
        by_row,
        [list(inputs.matrices)],
        inputs.group_sizes,
    )


def outer_by_group(options: OuterOptions, inputs: OuterInputs) -> Float[Array, "G K N"]:
    """`outer.outer_by_group` of arrays of any size, on any mesh; the scale is [R]."""
    K = inputs.lefts[0].shape[1]
    N = inputs.dout.shape[1]

    def on_device(
        lefts,
        dout,
        scale,
        group_sizes,
    ):
        padded = OuterInputs(
            lefts=[padded_to_multiples(x, ROWS, LANES) for x in lefts],
            dout=padded_to_multiples(dout, ROWS, LANES),
            group_sizes=group_sizes,
            scale=None if scale is None else _in_lines(scale),
        )
        out = outer.outer_by_group(
            options._replace(interpret=interpret_params(options.interpret, dout)),
            tuning.outer_schedule(padded),
            padded,
        )
        return out[:, :K, :N]

    # Every device sums over its own rows: the result is the sum over devices.
    by_row = (list(inputs.lefts), inputs.dout, inputs.scale)
    return by_sorted_rows(
        on_device,
        by_row,
        [],
        inputs.group_sizes,
        summed=True,
    )


def _in_lines(scale: Float[Array, "R"]) -> Float[Array, "L 128"]:
    return per_row.in_lines(padded_to_multiples(scale, ROWS))
