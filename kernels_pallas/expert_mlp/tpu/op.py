"""`expert_mlp` on TPU: the kernels of `grouped_matmul` with the gate between them.

forward    a, b = rows gate, rows up        rows are read once; without a derivative only activation(a) * b is written
           y = (w activation(a) * b) down   the product is made tile by tile, in VMEM; w are the rows' weights
backward   ddown = (w activation(a) * b)^T dy
           da, db = cotangents of a, b      from dy down^T, which is never written; in the place of a, b
           dw = sum_F of activation(a) * b * (dy down^T)    in the same kernel: y is not needed, and not saved
           drows = da gate^T + db up^T      one sum
           dgate, dup = rows^T da, rows^T db
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.expert_mlp.gate import gated_product, gated_product_cotangents
from kernels_pallas.grouped_matmul.tpu import op as tpu
from kernels_pallas.grouped_matmul.tpu.op import Rows, outer_by_group, rows_times_groups
from kernels_pallas.grouped_matmul.tpu.per_row import MOST_ROWS

PRE_ACTIVATIONS_NAME = "expert_mlp_pre_activations"


class Plan(NamedTuple):
    """What of a call is static."""

    activation: str
    interpret: bool


def unsupported(rows: Array, gate: Array, weights: Array | None) -> str | None:
    """Why this room cannot take a call, or None when it can."""
    if weights is not None and len(rows) > MOST_ROWS:
        return f"takes weights of up to {MOST_ROWS} rows, not {len(rows)}"
    return tpu.unsupported(rows, gate)


def expert_mlp(
    rows, gate, up, down, group_sizes, weights, *, activation: str, interpret: bool
) -> Array:
    """As `api.expert_mlp`, with every default filled in."""
    dtype = rows.dtype
    if dtype == jnp.float16:  # Mosaic does not convert to or from float16
        rows, gate, up, down = (x.astype(jnp.float32) for x in (rows, gate, up, down))
    scales = () if weights is None else (weights.astype(jnp.float32),)
    plan = Plan(activation, interpret)
    return _expert_mlp(plan, rows, gate, up, down, group_sizes.astype(jnp.int32), scales).astype(
        dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(plan: Plan, rows, gate, up, down, sizes, scales) -> Array:
    def hidden(product, *scales):
        # Rounded as the saved ones of the differentiated pass are.
        rounded = (product(0, i).astype(rows.dtype) for i in range(2))
        return (_product(plan)(*rounded, *scales),)

    name = partial(Rows, interpret=plan.interpret, out_dtypes=(rows.dtype,))
    h = rows_times_groups(
        name("expert_mlp_hidden", body=hidden), (rows,), (gate, up), sizes, scales=scales
    )
    return rows_times_groups(name("expert_mlp_down"), h, (down,), sizes)[0]


def _product(plan: Plan) -> Callable:
    """(a, b, scale if there is one) -> what the last matmul takes."""
    return lambda a, b, *scale: math.prod(scale, start=gated_product(plan.activation, a, b))


def _forward_saving(plan: Plan, rows, gate, up, down, sizes, scales):
    both = lambda product: (product(0, 0), product(0, 1))
    first = Rows("expert_mlp_pre_activations", plan.interpret, (rows.dtype,) * 2, both)
    pre = [
        checkpoint_name(x, PRE_ACTIVATIONS_NAME)
        for x in rows_times_groups(first, (rows,), (gate, up), sizes)
    ]
    second = Rows("expert_mlp_down", plan.interpret, (rows.dtype,), operand=_product(plan))
    (y,) = rows_times_groups(second, pre, (down,), sizes, scales=scales)
    return y, (rows, gate, up, down, sizes, scales, pre)


def _backward(plan: Plan, residuals, dy):
    rows, gate, up, down, sizes, scales, pre = residuals
    dy, interpret = dy.astype(rows.dtype), plan.interpret
    ddown = outer_by_group("expert_mlp_ddown", interpret, pre, dy, sizes, _product(plan), scales)
    # Nobody needs a and b after ddown has been made: their cotangents may take their place.
    *pre, ddown = jax.lax.optimization_barrier((*pre, ddown))

    def cotangents(product, a, b, *scale):
        dh = product(0, 0)
        through = gated_product_cotangents(plan.activation, a, b, math.prod(scale, start=dh))
        return (*through, gated_product(plan.activation, a, b) * dh) if scale else through

    work = Rows(
        "expert_mlp_dpre_activations",
        interpret,
        (rows.dtype,) * 2,
        cotangents,
        True,
        row_sums=bool(scales),
    )
    *dpre, dscales = (
        *rows_times_groups(work, (dy,), (down,), sizes, pre, scales),
        *[()] * (not scales),
    )
    total = lambda product: (product(0, 0) + product(1, 1),)
    back = Rows("expert_mlp_drows", interpret, (rows.dtype,), total, transposed=True)
    (drows,) = rows_times_groups(back, dpre, (gate, up), sizes)
    names = "expert_mlp_dgate", "expert_mlp_dup"
    dgate, dup = (
        outer_by_group(name, interpret, (rows,), d, sizes) for name, d in zip(names, dpre)
    )
    return drows, dgate, dup, ddown, None, (dscales,) if scales else ()


_expert_mlp.defvjp(_forward_saving, _backward)
