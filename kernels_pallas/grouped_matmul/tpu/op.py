"""`grouped_matmul` on TPU (Pallas, Mosaic), forward and backward: what the kernels cover, padding, derivative, meshes.

Two kernels. Rows times the matrix of their group (`rows.py`) is the forward pass, and with the matrices read the
other way round the gradient of the rows; `outer.py` is the gradient of the matrices. Each reads the group sizes
when it runs, and does the FLOPs of the rows that there are, plus those that fill up a group's last registers.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in several passes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.common.mesh import by_sorted_rows, varying_axes
from kernels_pallas.common.padding import padded_to_multiples
from kernels_pallas.grouped_matmul.tpu import (
    outer as tpu_outer,
)
from kernels_pallas.grouped_matmul.tpu import (
    per_row as tpu_per_row,
)
from kernels_pallas.grouped_matmul.tpu import (
    rows as tpu_rows,
)
from kernels_pallas.grouped_matmul.tpu import (
    tuning as tpu_tuning,
)
from kernels_pallas.grouped_matmul.tpu.per_row import LANES
from kernels_pallas.grouped_matmul.tpu.visits import ROWS


def unsupported(lhs: Array, rhs: Array) -> str | None:
    """Why this room cannot take a call, or None when it can."""
    if lhs.dtype == jnp.float64:
        return "does not compute in float64"
    item = 2 if lhs.dtype == jnp.bfloat16 else 4
    if max(rhs.shape[1:]) > tpu_tuning.largest_inner(item):
        return tpu_tuning.too_large(max(rhs.shape[1:]), item)
    return None


class Plan(NamedTuple):
    """What of a call is static."""

    out_dtype: jnp.dtype
    interpret: object  # as pallas_call takes it


def grouped_matmul(lhs, rhs, group_sizes, *, out_dtype: jnp.dtype, interpret: bool) -> Array:
    """As `api.grouped_matmul`, with every default filled in."""
    if lhs.dtype == jnp.float16:  # Mosaic does not convert to or from float16
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    kernels = jnp.dtype(jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32)
    return _grouped_matmul(
        Plan(kernels, interpret), lhs, rhs, group_sizes.astype(jnp.int32)
    ).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    work = Rows("grouped_matmul_forward", plan.interpret, (plan.out_dtype,))
    return rows_times_groups(work, (lhs,), (rhs,), group_sizes)[0]


def _forward_saving(plan: Plan, lhs, rhs, group_sizes):
    return _grouped_matmul(plan, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(plan: Plan, residuals, dout):
    lhs, rhs, group_sizes = residuals
    dout = dout.astype(lhs.dtype)
    work = Rows("grouped_matmul_dlhs", plan.interpret, (lhs.dtype,), transposed=True)
    (dlhs,) = rows_times_groups(work, (dout,), (rhs,), group_sizes)
    return (
        dlhs,
        outer_by_group("grouped_matmul_drhs", plan.interpret, (lhs,), dout, group_sizes),
        None,
    )


_grouped_matmul.defvjp(_forward_saving, _backward)


class Rows(NamedTuple):
    """What of a call of `rows_times_groups` is static; see `rows.Call`."""

    name: str
    interpret: bool
    out_dtypes: tuple[jnp.dtype, ...]
    body: Callable = lambda product: (product(0, 0),)
    transposed: bool = False
    operand: Callable | None = None
    row_sums: bool = False


def rows_times_groups(
    work: Rows,
    xs: Sequence[Array],
    matrices: Sequence[Array],
    group_sizes: Array,
    tiled: Sequence[Array] = (),
    scales: Sequence[Float[Array, "R"]] = (),
) -> list[Array]:
    """`rows.rows_times_groups` of arrays of any size, on any mesh. Outputs take the place of the tiled arrays.

    Row sums are [R], float32.
    """
    O = matrices[0].shape[1 if work.transposed else 2]
    ends = np.cumsum([len(xs), len(tiled), len(scales)])

    def on_device(*arrays):
        *arrays, sizes = arrays
        xs, tiled, scales, matrices = (arrays[i:j] for i, j in zip((0, *ends), (*ends, None)))
        R = xs[0].shape[0]
        xs, tiled = ([padded_to_multiples(x, ROWS, LANES) for x in group] for group in (xs, tiled))
        matrices = [padded_to_multiples(m, 1, LANES, LANES) for m in matrices]
        schedule = tpu_tuning.rows_schedule(
            *xs[0].shape,
            matrices[0].shape[1 if work.transposed else 2],
            xs[0].dtype.itemsize,
            inputs=len(xs),
            matrices=len(matrices),
            tiled=len(tiled),
            outputs=len(work.out_dtypes),
            per_row=len(scales) + work.row_sums,
        )
        call = tpu_rows.Call(
            schedule,
            work.transposed,
            work.body,
            work.out_dtypes,
            _interpret(work.interpret, xs[0]),
            work.name,
            work.operand,
            in_place=bool(tiled),
            row_sums=work.row_sums,
        )
        outs = tpu_rows.rows_times_groups(
            call, xs, matrices, sizes, tiled, [_lines(x) for x in scales]
        )
        sums = [
            jnp.sum(out, axis=0).reshape(-1)[:R] for out in outs[len(work.out_dtypes) :]
        ]  # over the cores
        return [out[:R, :O] for out in outs[: len(work.out_dtypes)]] + sums

    return by_sorted_rows(on_device, (*xs, *tiled, *scales), matrices, group_sizes)


def outer_by_group(
    name: str,
    interpret: bool,
    lefts: Sequence[Array],
    dout: Array,
    group_sizes: Array,
    operand: Callable | None = None,
    scales: Sequence[Float[Array, "R"]] = (),
) -> Float[Array, "G K N"]:
    """`outer.outer_by_group` of arrays of any size, on any mesh; in dout's dtype."""
    K, N = lefts[0].shape[1], dout.shape[1]

    def on_device(*arrays):
        *arrays, sizes = arrays
        *lefts, dout = (
            padded_to_multiples(x, ROWS, LANES) for x in arrays[: len(arrays) - len(scales)]
        )
        lines = [_lines(x) for x in arrays[len(lefts) + 1 :]]
        schedule = tpu_tuning.outer_schedule(
            *lefts[0].shape, dout.shape[1], dout.dtype.itemsize, len(lefts), len(scales)
        )
        call = tpu_outer.Call(schedule, dout.dtype, _interpret(interpret, dout), name, operand)
        return tpu_outer.outer_by_group(call, lefts, dout, sizes, lines)[:, :K, :N]

    return by_sorted_rows(on_device, (*lefts, dout, *scales), (), group_sizes, summed=True)


def _lines(x: Float[Array, "R"]) -> Float[Array, "L 128"]:
    return tpu_per_row.in_lines(padded_to_multiples(x, ROWS))


def _interpret(interpret: bool, x: Array):
    """The plain interpreter is the quicker one, but knows nothing of varying axes."""
    return pltpu.InterpretParams() if interpret is True and varying_axes(x) else interpret
