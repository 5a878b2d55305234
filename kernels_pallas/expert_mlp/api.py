"""`expert_mlp`: the public function. Checks, defaults and the choice of implementation."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import (
    as_array,
    as_bounded_int32,
    check_float,
    check_integer,
    check_interpret,
    check_same_dtype,
)
from kernels_pallas.common.mesh import varying_together
from kernels_pallas.expert_mlp import composed
from kernels_pallas.expert_mlp.gate import ACTIVATIONS
from kernels_pallas.expert_mlp.inputs import ExpertMlpInputs
from kernels_pallas.expert_mlp.tpu import op as tpu
from kernels_pallas.grouped_matmul import gpu

OP = "expert_mlp"


def expert_mlp(
    rows: Float[Array, "R M"],
    gate: Float[Array, "G M F"],
    up: Float[Array, "G M F"],
    down: Float[Array, "G F M"],
    group_sizes: Int[Array, "G"],
    weights: Float[Array, "R"] | None = None,
    *,
    activation: str = "silu",
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "R M"]:
    """The MLPs of sparse experts: `weight (activation(x gate_g) * (x up_g)) down_g` for each row.

    x is a row of group g. Rows are sorted by group as in `grouped_matmul`: the first group_sizes[0]
    rows go through the first matrices, and so on. On TPU it is two kernels forward and five
    backward. The only arrays [R, F] that exist are the two pre-activations, which are saved, and in
    whose place the backward pass puts their cotangents. These kernels are differentiated once; the
    other implementations are as `grouped_matmul` is.

    Args:
      rows: float16, bfloat16, float32 (or float64 under x64). Sums are float32, pre-activations and
        products are rounded to that dtype.
      gate: one matrix for each group, of the rows' dtype.
      up: as `gate`.
      down: one matrix for each group, of the rows' dtype.
      group_sizes: as in `grouped_matmul`, with R for M.
      weights: of each row's result, as a router gives them; any float dtype, multiplied in float32
        (or float64) before the last matmul. All 1 if None. Their gradient is computed on the way to
        the rows' and divides by nothing.
      activation: "silu" (SwiGLU, arXiv 2002.05202) or "gelu" (its tanh form).
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Returns:
      One row for each row, in the rows' dtype.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    inputs = ExpertMlpInputs(
        rows,
        gate,
        up,
        down,
        group_sizes,
        weights,
    )
    inputs = _checked(inputs, activation)
    check_interpret(OP, interpret, implementation)
    # The gpu backend is `composed` with the GPU's grouped matmuls.
    refusals = {
        "tpu": partial(tpu.unsupported, inputs),
        "gpu": partial(gpu.unsupported, inputs.rows),
    }
    chosen = dispatch.choose(OP, implementation, refusals, inputs)
    inputs = dispatch.for_its_platform(OP, chosen, interpret, inputs)
    if chosen == "tpu":
        # `composed` leaves this to `grouped_matmul`.
        return tpu.expert_mlp(
            varying_together(inputs),
            activation=activation,
            interpret=interpret,
        )
    return composed.expert_mlp(
        inputs,
        activation=activation,
        implementation=chosen,
        interpret=interpret,
    )


def _checked(inputs: ExpertMlpInputs, activation: str) -> ExpertMlpInputs:
    """The inputs as arrays, sizes bounded; ValueError for the first argument that does not fit."""
    sizes = inputs.group_sizes
    inputs = ExpertMlpInputs._make(as_array(x) for x in inputs)._replace(group_sizes=sizes)
    rows = inputs.rows
    gate = inputs.gate
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{OP}: rows: got shape {rows.shape}, expected [R, M] with no empty axis")
    if gate.ndim != 3 or 0 in gate.shape or gate.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{OP}: gate: got shape {gate.shape}, "
            f"expected [G, {rows.shape[1]}, F] for rows {rows.shape}"
        )
    G, M, F = gate.shape
    # The shape of gate is taken as given, so that one wrong argument is one message.
    _check_shape_by_gate("up", inputs.up, (G, M, F), gate)
    _check_shape_by_gate("down", inputs.down, (G, F, M), gate)
    _check_shape_by_gate("group_sizes", inputs.group_sizes, (G,), gate)
    check_integer(OP, "group_sizes", inputs.group_sizes)
    check_float(OP, "rows", rows)
    check_same_dtype(OP, "gate", gate, "rows", rows)
    check_same_dtype(OP, "up", inputs.up, "rows", rows)
    check_same_dtype(OP, "down", inputs.down, "rows", rows)
    if inputs.weights is not None:
        _check_weights(inputs.weights, len(rows))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{OP}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    bounded = as_bounded_int32(OP, "group_sizes", sizes, most=len(rows))
    return inputs._replace(group_sizes=bounded)


def _check_shape_by_gate(
    name: str,
    x: Array,
    expected: tuple[int, ...],
    gate: Array,
) -> None:
    if x.shape != expected:
        raise ValueError(
            f"{OP}: {name}: got shape {x.shape}, expected {expected} for gate of shape {gate.shape}"
        )


def _check_weights(weights: Array, num_rows: int) -> None:
    is_float = jnp.issubdtype(weights.dtype, jnp.floating)
    if weights.shape != (num_rows,) or not is_float:
        raise ValueError(
            f"{OP}: weights: got shape {weights.shape} and dtype {weights.dtype}, "
            f"expected {(num_rows,)} of a float dtype"
        )
