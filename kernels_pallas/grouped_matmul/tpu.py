"""`grouped_matmul` on TPU (Pallas, Mosaic), forward and backward: what the kernels cover, padding, derivative, meshes.

Two kernels. Rows times the matrix of their group (`tpu_rows.py`) is the forward pass, and with the matrices read the
other way round the gradient of the rows; `tpu_outer.py` is the gradient of the matrices. Each reads the group sizes
when it runs, and does the FLOPs of the rows that there are, plus those that fill up a group's last registers.

Matrix units multiply bfloat16. With float16 or float32 inputs every operand keeps all its bits, in several passes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

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
    plan = Plan(kernels, interpret)
    return _grouped_matmul(plan, lhs, rhs, group_sizes.astype(jnp.int32)).astype(out_dtype)


def interpret_mode(interpret: bool, x: Array):
    """The plain interpreter is the quicker one, but knows nothing of varying axes."""
    return pltpu.InterpretParams() if interpret is True and varying_axes(x) else interpret


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan: Plan, lhs: Array, rhs: Array, group_sizes: Array) -> Array:
    return rows_times_groups(plan, lhs, rhs, group_sizes, transposed=False)


def _forward_saving(plan: Plan, lhs, rhs, group_sizes):
    return _grouped_matmul(plan, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(plan: Plan, residuals, dout):
    lhs, rhs, group_sizes = residuals
    dout, plan = dout.astype(lhs.dtype), plan._replace(out_dtype=lhs.dtype)
    dlhs = rows_times_groups(plan, dout, rhs, group_sizes, transposed=True)
    return dlhs, outer_by_group(plan, lhs, dout, group_sizes), None


_grouped_matmul.defvjp(_forward_saving, _backward)


def rows_times_groups(
    plan: Plan, x: Float[Array, "M I"], rhs: Float[Array, "G K N"], group_sizes: Int[Array, "G"], transposed: bool
) -> Array:
    """Each row of x times its group's matrix, or the matrix transposed."""
    O = rhs.shape[1 if transposed else 2]

    def on_device(x, rhs, sizes):
        M, x, rhs = x.shape[0], padded(x, ROWS, LANES), padded(rhs, 1, LANES, LANES)
        shape = x.shape[0], x.shape[1], rhs.shape[1 if transposed else 2]
        schedule = tpu_tuning.rows_schedule(*shape, x.dtype.itemsize)
        call = tpu_rows.Call(
            schedule, transposed, lambda product: (product(0, 0),), (plan.out_dtype,), interpret_mode(plan.interpret, x),
            f"grouped_matmul_{'dlhs' if transposed else 'forward'}",
        )  # fmt: skip
        return tpu_rows.rows_times_groups(call, (x,), (rhs,), sizes)[0][:M, :O]

    return partition.by_sorted_rows(on_device, (x,), (rhs,), group_sizes)


def outer_by_group(
    plan: Plan, lhs: Float[Array, "M K"], dout: Float[Array, "M N"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G K N"]:
    """[G, K, N]: lhs^T dout over the rows of each group."""
    K, N = lhs.shape[1], dout.shape[1]

    def on_device(lhs, dout, sizes):
        lhs, dout = padded(lhs, ROWS, LANES), padded(dout, ROWS, LANES)
        shape = lhs.shape[0], lhs.shape[1], dout.shape[1]
        schedule = tpu_tuning.outer_schedule(*shape, lhs.dtype.itemsize)
        call = tpu_outer.Call(schedule, plan.out_dtype, interpret_mode(plan.interpret, lhs), "grouped_matmul_drhs")
        return tpu_outer.outer_by_group(call, (lhs,), dout, sizes)[:, :K, :N]

    return partition.by_sorted_rows(on_device, (lhs, dout), (), group_sizes, summed=True)


def padded(x: Array, *multiples: int) -> Array:
    """x with zeros up to multiples of these sizes."""
    return jnp.pad(x, [(0, -n % m) for n, m in zip(x.shape, multiples)])
