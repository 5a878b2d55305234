"""`expert_mlp`: the public function. Checks, defaults and the choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas import dispatch
from kernels_pallas.common.checks import all_varying, check_float, check_integer, check_interpret
from kernels_pallas.expert_mlp import composed
from kernels_pallas.expert_mlp.gate import ACTIVATIONS
from kernels_pallas.expert_mlp.tpu import op as tpu
from kernels_pallas.grouped_matmul.gpu import op as gpu


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
    """`w (activation(x gate_g) * (x up_g)) down_g` for each row x of group g and weight w: the MLPs of sparse experts.

    Rows are sorted by group as in `grouped_matmul`: the first group_sizes[0] rows go through the first matrices, and so
    on. On TPU it is two kernels forward and five backward; the only arrays [R, F] that exist are the two
    pre-activations, which are saved, and in whose place the backward pass puts their cotangents.

    Args:
      rows, gate, up, down: one float dtype for all: float16, bfloat16, float32 (or float64 under x64). Sums are
        float32, pre-activations and products are rounded to that dtype.
      group_sizes: integers >= 0. Rows beyond their sum give zeros and get zero gradient; an empty group gets zero
        gradient. Not checked: values are unknown under jit. Rows counted beyond R do not exist.
      weights: of each row's result, as a router gives them; any float dtype, multiplied in float32 (or float64) before
        the last matmul. All 1 if None. Their gradient is made on the way to the rows' and divides by nothing.
      activation: "silu" (SwiGLU, arXiv 2002.05202) or "gelu" (its tanh form).
      implementation: None, "reference", "xla", "tpu" or "gpu"; see `kernels_pallas.dispatch`.
      interpret: run a named kernel ("tpu", "gpu") in interpret mode, on CPU.

    Raises:
      ValueError: a shape, dtype or option that does not fit, by name.
      NotImplementedError: the implementation asked for does not cover this call.
    """
    op = "expert_mlp"
    _check(op, rows, gate, up, down, group_sizes)
    if weights is not None and (
        weights.shape != rows.shape[:1] or not jnp.issubdtype(weights.dtype, jnp.floating)
    ):
        came = f"shape {weights.shape} and dtype {weights.dtype}"
        raise ValueError(f"{op}: weights: got {came}, expected {rows.shape[:1]} of a float dtype")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    check_interpret(op, interpret, implementation)
    chosen = dispatch.choose(
        op,
        implementation,
        {"tpu": tpu.unsupported(rows, gate, weights), "gpu": gpu.unsupported(rows)},
    )
    arrays = rows, gate, up, down, group_sizes, weights
    if chosen != "tpu":
        return composed.expert_mlp(
            *arrays, activation=activation, implementation=chosen, interpret=interpret
        )
    return tpu.expert_mlp(*all_varying(*arrays), activation=activation, interpret=interpret)


def _check(op: str, rows, gate, up, down, group_sizes) -> None:
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{op}: rows: got shape {rows.shape}, expected [R, M] with no empty axis")
    if gate.ndim != 3 or 0 in gate.shape or gate.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{op}: gate: got shape {gate.shape}, expected [G, {rows.shape[1]}, F] for rows {rows.shape}"
        )
    G, M, F = gate.shape
    for name, x, shape in (
        ("up", up, (G, M, F)),
        ("down", down, (G, F, M)),
        ("group_sizes", group_sizes, (G,)),
    ):
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name}: got shape {x.shape}, expected {shape} for gate of shape {gate.shape}"
            )
    check_integer(op, "group_sizes", group_sizes)
    check_float(op, "rows", rows)
    for name, x in (("gate", gate), ("up", up), ("down", down)):
        if x.dtype != rows.dtype:
            raise ValueError(f"{op}: {name}: got dtype {x.dtype}, expected {rows.dtype} as in rows")
