"""`expert_mlp` on TPU: the kernels of `grouped_matmul`, with the gate between them.

x are the rows, w their weights, act the activation; matrices are those of a row's group.

Forward:
  a, b = x gate, x up         x is read once; without a derivative only act(a) * b is written
  y = (w act(a) * b) down     the product is made tile by tile, in VMEM

Backward:
  ddown = (w act(a) * b)^T dy
  da, db = their cotangents   from dy down^T, which is never written; in the place of a and b
  dw = sum over F of act(a) * b * (dy down^T)     in the same kernel: y is not needed, nor saved
  dx = da gate^T + db up^T    one sum
  dgate, dup = x^T da, x^T db
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from kernels_pallas.common.derivative import once
from kernels_pallas.common.tpu import Interpret
from kernels_pallas.expert_mlp.gate import gated_product, gated_product_cotangents
from kernels_pallas.expert_mlp.inputs import ExpertMlpInputs
from kernels_pallas.grouped_matmul.tpu import op as grouped
from kernels_pallas.grouped_matmul.tpu.outer import OuterInputs, OuterOptions
from kernels_pallas.grouped_matmul.tpu.per_row import MOST_ROWS
from kernels_pallas.grouped_matmul.tpu.rows import Product, RowsInputs, RowsOptions

PRE_ACTIVATIONS_NAME = "expert_mlp_pre_activations"


class Options(NamedTuple):
    """The static arguments of a call."""

    activation: str  # a name of `ACTIVATIONS`
    interpret: Interpret  # as `pallas_call` takes it


def unsupported(inputs: ExpertMlpInputs) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    num_rows = len(inputs.rows)
    if inputs.weights is not None and num_rows > MOST_ROWS:
        return f"takes weights of up to {MOST_ROWS} rows, not {num_rows}"
    return grouped.unsupported(inputs.rows, inputs.gate)


def expert_mlp(
    inputs: ExpertMlpInputs,
    *,
    activation: str,
    interpret: Interpret,
) -> Float[Array, "R M"]:
    """As `api.expert_mlp`, with every default filled in."""
    rows, gate, up, down, group_sizes, weights = inputs
    # Mosaic does not convert to or from float16.
    dtype = jnp.float32 if rows.dtype == jnp.float16 else rows.dtype
    in_kernel = ExpertMlpInputs(
        rows=rows.astype(dtype),
        gate=gate.astype(dtype),
        up=up.astype(dtype),
        down=down.astype(dtype),
        group_sizes=group_sizes.astype(jnp.int32),
        weights=None if weights is None else weights.astype(jnp.float32),
    )
    return _expert_mlp(Options(activation, interpret), in_kernel).astype(rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(options: Options, inputs: ExpertMlpInputs) -> Array:
    """The result without a derivative: the pre-activations are not written."""
    dtype = inputs.rows.dtype

    def weighted_product(product: Product, tiled: list[Array], weight: Array | None):
        # Rounded as those that the differentiated pass saves.
        a = product(0, 0).astype(dtype)
        b = product(0, 1).astype(dtype)
        return (_weighted_product(options, a, b, weight),)

    # x is read once for both matrices, and what is written is their weighted product alone.
    (hidden,), _ = grouped.rows_times_groups(
        RowsOptions("expert_mlp_hidden", options.interpret, (dtype,), weighted_product),
        RowsInputs(
            [inputs.rows],
            [inputs.gate, inputs.up],
            inputs.group_sizes,
            scale=inputs.weights,
        ),
    )
    (y,), _ = grouped.rows_times_groups(
        RowsOptions("expert_mlp_down", options.interpret, (dtype,)),
        RowsInputs([hidden], [inputs.down], inputs.group_sizes),
    )
    return y


def _weighted_product(
    options: Options,
    a: Array,
    b: Array,
    weight: Array | None,
) -> Array:
    """What the last matmul takes, of the pre-activations: weight act(a) * b."""
    # float32; the kernel rounds it to the dtype of the matmul.
    product = gated_product(options.activation, a, b)
    if weight is None:
        return product
    return product * weight


class Residuals(NamedTuple):
    """What the backward pass needs."""

    inputs: ExpertMlpInputs
    a: Float[Array, "R F"]  # rows gate
    b: Float[Array, "R F"]  # rows up


def _forward_saving(options: Options, inputs: ExpertMlpInputs) -> tuple[Array, Residuals]:
    dtype = inputs.rows.dtype

    # One program computes both, so that x is read once.
    def both(product: Product, tiled: list[Array], weight: Array | None):
        return product(0, 0), product(0, 1)

    # The pre-activations are saved: the backward pass needs both, and the product only of them.
    pre_activations, _ = grouped.rows_times_groups(
        RowsOptions("expert_mlp_pre_activations", options.interpret, (dtype, dtype), both),
        RowsInputs([inputs.rows], [inputs.gate, inputs.up], inputs.group_sizes),
    )
    a, b = pre_activations
    # Their weighted product is made tile by tile in VMEM, as the operand of this matmul.
    (y,), _ = grouped.rows_times_groups(
        RowsOptions(
            "expert_mlp_down",
            options.interpret,
            (dtype,),
            operand=partial(_weighted_product, options),
        ),
        RowsInputs(
            [a, b],
            [inputs.down],
            inputs.group_sizes,
            scale=inputs.weights,
        ),
    )
    return y, Residuals(inputs, a, b)


def _backward(
    options: Options,
    residuals: Residuals,
    dy: Array,
) -> tuple[ExpertMlpInputs]:
    inputs, a, b = residuals
    group_sizes = inputs.group_sizes
    weights = inputs.weights
    # The dtype of the kernels: `expert_mlp` has converted float16 before.
    dy = dy.astype(inputs.rows.dtype)
    # The left operand is the weighted product, made of a and b once more.
    ddown = grouped.outer_by_group(
        OuterOptions("expert_mlp_ddown", options.interpret, partial(_weighted_product, options)),
        OuterInputs(
            [a, b],
            dy,
            group_sizes,
            scale=weights,
        ),
    )
    # Nobody needs a and b after ddown has been made: their cotangents may take their place.
    a, b, ddown = jax.lax.optimization_barrier((a, b, ddown))
    da, db, dweights = _pre_activation_cotangents(options, inputs, a, b, dy)
    # Of da and db, nothing else is needed for the rows and the first two matrices.
    drows = _row_cotangents(options, inputs, da, db)
    dgate = grouped.outer_by_group(
        OuterOptions("expert_mlp_dgate", options.interpret),
        OuterInputs([inputs.rows], da, group_sizes),
    )
    dup = grouped.outer_by_group(
        OuterOptions("expert_mlp_dup", options.interpret),
        OuterInputs([inputs.rows], db, group_sizes),
    )
    return (
        ExpertMlpInputs(
            drows,
            dgate,
            dup,
            ddown,
            None,  # pyrefly: ignore[bad-argument-type]  # sizes are integers: no cotangent
            dweights,
        ),
    )


def _forward_once(options: Options, inputs: ExpertMlpInputs):
    y, residuals = once("expert_mlp", partial(_forward_saving, options), inputs)
    # Named out here: a policy of `jax.checkpoint` does not look into what `once` runs.
    return y, residuals._replace(
        a=checkpoint_name(residuals.a, PRE_ACTIVATIONS_NAME),
        b=checkpoint_name(residuals.b, PRE_ACTIVATIONS_NAME),
    )


def _backward_once(options: Options, residuals: Residuals, dy: Array):
    return once("expert_mlp", partial(_backward, options), residuals, dy)


_expert_mlp.defvjp(_forward_once, _backward_once)


def _pre_activation_cotangents(
    options: Options,
    inputs: ExpertMlpInputs,
    a: Array,
    b: Array,
    dy: Array,
) -> tuple[Array, Array, Array | None]:
    """The cotangents of a and b, in their place, and of the weights."""
    dtype = inputs.rows.dtype
    has_weights = inputs.weights is not None

    def cotangents(product: Product, tiled: list[Array], weight: Array | None):
        a, b = tiled
        # dy down^T: the cotangent of the weighted product. It is never written.
        dproduct = product(0, 0)
        if weight is None:
            return gated_product_cotangents(options.activation, a, b, dproduct)
        da, db = gated_product_cotangents(options.activation, a, b, dproduct * weight)
        # Summed over the columns, the third value is each row's dweight.
        return da, db, gated_product(options.activation, a, b) * dproduct

    (da, db), dweights = grouped.rows_times_groups(
        RowsOptions(
            "expert_mlp_dpre_activations",
            options.interpret,
            (dtype, dtype),
            cotangents,
            transposed=True,
            row_sums=has_weights,
        ),
        RowsInputs(
            xs=[dy],
            matrices=[inputs.down],
            group_sizes=inputs.group_sizes,
            tiled=[a, b],
            scale=inputs.weights,
        ),
    )
    return da, db, dweights


def _row_cotangents(
    options: Options,
    inputs: ExpertMlpInputs,
    da: Array,
    db: Array,
) -> Float[Array, "R M"]:
    """da gate^T + db up^T."""

    def total(product: Product, tiled: list[Array], weight: Array | None):
        # The first input times the first matrix, the second times the second: one float32 sum.
        return (product(0, 0) + product(1, 1),)

    (drows,), _ = grouped.rows_times_groups(
        RowsOptions(
            "expert_mlp_drows",
            options.interpret,
            (inputs.rows.dtype,),
            total,
            transposed=True,
        ),
        RowsInputs([da, db], [inputs.gate, inputs.up], inputs.group_sizes),
    )
    return drows
