"""`grouped_matmul` on TPU (Pallas, Mosaic), forward and backward: what the kernels cover, padding, derivative, meshes.

Two kernels. Rows times the matrix of their group (`tpu_rows.py`) is the forward pass, and with the matrices read the
other way round the gradient of the rows; `tpu_outer.py` is the gradient of the matrices. Each reads the group sizes
when it runs, and does the FLOPs of the rows that there are, plus those that fill up a group's last registers.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in several passes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas import partition
from kernels_pallas.grouped_matmul import tpu_outer, tpu_rows, tpu_tuning
from kernels_pallas.grouped_matmul.tpu_rows import LANES
from kernels_pallas.grouped_matmul.tpu_visits import ROWS
from kernels_pallas.manual_axes import varying_axes


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
    return _grouped_matmul(Plan(kernels, interpret), lhs, rhs, group_sizes.astype(jnp.int32)).astype(out_dtype)


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
    return dlhs, outer_by_group("grouped_matmul_drhs", plan.interpret, (lhs,), dout, group_sizes), None


_grouped_matmul.defvjp(_forward_saving, _backward)


class Rows(NamedTuple):
    """What of a call of `rows_times_groups` is static; see `tpu_rows.Call`."""

    name: str
    interpret: bool
    out_dtypes: tuple[jnp.dtype, ...]
    body: Callable = lambda product: (product(0, 0),)
    transposed: bool = False
    operand: Callable | None = None


def rows_times_groups(
    work: Rows, xs: Sequence[Array], matrices: Sequence[Array], group_sizes: Array, tiled: Sequence[Array] = ()
) -> list[Array]:
    """`tpu_rows.rows_times_groups` of arrays of any size, on any mesh. Outputs take the place of the tiled arrays."""
    O, n = matrices[0].shape[1 if work.transposed else 2], len(xs) + len(tiled)

    def on_device(*arrays):
        *arrays, sizes = arrays
        R = arrays[0].shape[0]
        arrays = [*(_padded(x, ROWS, LANES) for x in arrays[:n]), *(_padded(m, 1, LANES, LANES) for m in arrays[n:])]
        x, matrix = arrays[0], arrays[n]
        schedule = tpu_tuning.rows_schedule(
            *x.shape, matrix.shape[1 if work.transposed else 2], x.dtype.itemsize,
            inputs=len(xs), matrices=len(matrices), tiled=len(tiled), outputs=len(work.out_dtypes),
        )  # fmt: skip
        call = tpu_rows.Call(
            schedule, work.transposed, work.body, work.out_dtypes, _interpret(work.interpret, x), work.name,
            work.operand, in_place=bool(tiled),
        )  # fmt: skip
        outs = tpu_rows.rows_times_groups(call, arrays[: len(xs)], arrays[n:], sizes, arrays[len(xs) : n])
        return [out[:R, :O] for out in outs]

    return partition.by_sorted_rows(on_device, (*xs, *tiled), matrices, group_sizes)


def outer_by_group(
    name: str, interpret: bool, lefts: Sequence[Array], dout: Array, group_sizes: Array, operand: Callable | None = None
) -> Float[Array, "G K N"]:
    """`tpu_outer.outer_by_group` of arrays of any size, on any mesh; in dout's dtype."""
    K, N = lefts[0].shape[1], dout.shape[1]

    def on_device(*arrays):
        *arrays, sizes = arrays
        *lefts, dout = (_padded(x, ROWS, LANES) for x in arrays)
        schedule = tpu_tuning.outer_schedule(*lefts[0].shape, dout.shape[1], dout.dtype.itemsize, len(lefts))
        call = tpu_outer.Call(schedule, dout.dtype, _interpret(interpret, dout), name, operand)
        return tpu_outer.outer_by_group(call, lefts, dout, sizes)[:, :K, :N]

    return partition.by_sorted_rows(on_device, (*lefts, dout), (), group_sizes, summed=True)


def _interpret(interpret: bool, x: Array):
    """The plain interpreter is the quicker one, but knows nothing of varying axes."""
    return pltpu.InterpretParams() if interpret is True and varying_axes(x) else interpret


def _padded(x: Array, *multiples: int) -> Array:
    """x with zeros up to multiples of these sizes."""
    return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, multiples)])
