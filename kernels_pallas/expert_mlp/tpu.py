"""`expert_mlp` on TPU: the kernels of `grouped_matmul` with the gate between them.

forward    a, b = rows gate, rows up        rows are read once; without a derivative only activation(a) * b is written
           y = (activation(a) * b) down     the product is made tile by tile, in VMEM
backward   ddown = (activation(a) * b)^T dy
           da, db = cotangents of a, b      from dy down^T, which is never written; in the place of a, b
           drows = da gate^T + db up^T      one sum
           dgate, dup = rows^T da, rows^T db
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import partition
from kernels_pallas.expert_mlp.gate import gated_product, gated_product_cotangents
from kernels_pallas.grouped_matmul import tpu as one
from kernels_pallas.grouped_matmul import tpu_outer, tpu_rows, tpu_tuning
from kernels_pallas.grouped_matmul.tpu import padded
from kernels_pallas.grouped_matmul.tpu_rows import LANES
from kernels_pallas.grouped_matmul.tpu_visits import ROWS

PRE_ACTIVATIONS_NAME = "expert_mlp_pre_activations"


class Plan(NamedTuple):
    """What of a call is static."""

    activation: str
    interpret: bool


def unsupported(rows: Array, gate: Array) -> str | None:
    """Why this room cannot take a call, or None when it can."""
    return one.unsupported(rows, gate)


def expert_mlp(rows, gate, up, down, group_sizes, *, activation: str, interpret: bool) -> Array:
    """As `api.expert_mlp`, with every default filled in."""
    dtype = rows.dtype
    if dtype == jnp.float16:  # Mosaic does not convert to or from float16
        rows, gate, up, down = (x.astype(jnp.float32) for x in (rows, gate, up, down))
    return _expert_mlp(Plan(activation, interpret), rows, gate, up, down, group_sizes.astype(jnp.int32)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(plan: Plan, rows, gate, up, down, sizes) -> Array:
    def product(a, b):
        # Rounded as the saved ones of the differentiated pass are.
        rounded = (x.astype(rows.dtype) for x in (a, b))
        return (gated_product(plan.activation, *rounded),)

    body = lambda product_of: product(product_of(0, 0), product_of(0, 1))
    (h,) = _rows(plan, "hidden", body, 1, (rows,), (gate, up), sizes)
    return _rows(plan, "down", _matmul, 1, (h,), (down,), sizes)[0]


def _forward_saving(plan: Plan, rows, gate, up, down, sizes):
    both = lambda product: (product(0, 0), product(0, 1))
    pre = tuple(_rows(plan, "pre_activations", both, 2, (rows,), (gate, up), sizes))
    pre = tuple(checkpoint_name(x, PRE_ACTIVATIONS_NAME) for x in pre)
    (y,) = _rows(plan, "down", _matmul, 1, pre, (down,), sizes, operand=partial(gated_product, plan.activation))
    return y, (rows, gate, up, down, sizes, pre)


def _backward(plan: Plan, residuals, dy):
    rows, gate, up, down, sizes, pre = residuals
    dy = dy.astype(rows.dtype)
    ddown = _outer(plan, "ddown", pre, dy, sizes, partial(gated_product, plan.activation))
    # Nobody needs a and b after ddown has been made: their cotangents may take their place.
    *pre, ddown = jax.lax.optimization_barrier((*pre, ddown))
    cotangents = lambda product, a, b: gated_product_cotangents(plan.activation, a, b, product(0, 0))
    dpre = _rows(plan, "dpre_activations", cotangents, 2, (dy,), (down,), sizes, transposed=True, tiled=tuple(pre))
    add = lambda product: (product(0, 0) + product(1, 1),)
    (drows,) = _rows(plan, "drows", add, 1, tuple(dpre), (gate, up), sizes, transposed=True)
    dgate, dup = (_outer(plan, name, (rows,), d, sizes) for name, d in zip(("dgate", "dup"), dpre))
    return drows, dgate, dup, ddown, None


_expert_mlp.defvjp(_forward_saving, _backward)


def _matmul(product) -> tuple[Array]:
    return (product(0, 0),)


def _rows(
    plan: Plan, name: str, body, outputs: int, xs, matrices, sizes, transposed=False, tiled=(), operand=None
) -> list[Array]:
    """`tpu_rows.rows_times_groups` of arrays of any size, on any mesh."""
    O = matrices[0].shape[1 if transposed else 2]

    def on_device(*arrays):
        *arrays, sizes = arrays
        R, dtype = arrays[0].shape[0], arrays[0].dtype
        n = len(xs) + len(tiled)
        arrays = [padded(x, ROWS, LANES) for x in arrays[:n]] + [padded(x, 1, LANES, LANES) for x in arrays[n:]]
        shape = arrays[0].shape[0], arrays[0].shape[1], arrays[n].shape[1 if transposed else 2]
        counts = dict(inputs=len(xs), matrices=len(matrices), tiled=len(tiled), outputs=outputs)
        call = tpu_rows.Call(
            tpu_tuning.rows_schedule(*shape, dtype.itemsize, **counts),
            transposed, body, (dtype,) * outputs, one.interpret_mode(plan.interpret, arrays[0]), f"expert_mlp_{name}",
            operand, in_place=bool(tiled),
        )  # fmt: skip
        outs = tpu_rows.rows_times_groups(call, arrays[: len(xs)], arrays[n:], sizes, arrays[len(xs) : n])
        return [out[:R, :O] for out in outs]

    return partition.by_sorted_rows(on_device, (*xs, *tiled), tuple(matrices), sizes)


def _outer(plan: Plan, name: str, lefts, dout, sizes, operand=None) -> Array:
    """`tpu_outer.outer_by_group` of arrays of any size, on any mesh."""
    K, N = lefts[0].shape[1], dout.shape[1]

    def on_device(*arrays):
        *arrays, sizes = arrays
        *lefts, dout = (padded(x, ROWS, LANES) for x in arrays)
        shape = lefts[0].shape[0], lefts[0].shape[1], dout.shape[1]
        schedule = tpu_tuning.outer_schedule(*shape, dout.dtype.itemsize, len(lefts))
        mode = one.interpret_mode(plan.interpret, dout)
        call = tpu_outer.Call(schedule, dout.dtype, mode, f"expert_mlp_{name}", operand)
        return tpu_outer.outer_by_group(call, lefts, dout, sizes)[:, :K, :N]

    return partition.by_sorted_rows(on_device, (*lefts, dout), (), sizes, summed=True)
