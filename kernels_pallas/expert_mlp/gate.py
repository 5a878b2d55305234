"""What lies between an expert's matmuls: `activation(gate) * up`, and its cotangents."""

from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.precision import accumulator_dtype

# jax.nn.gelu is the tanh form unless told otherwise.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def gated_product(
    activation: str,
    gate: Float[Array, "*rows F"],
    up: Float[Array, "*rows F"],
) -> Float[Array, "*rows F"]:
    """activation(gate) * up, in float32 at least."""
    dtype = accumulator_dtype(gate.dtype)
    return ACTIVATIONS[activation](gate.astype(dtype)) * up.astype(dtype)


def gated_product_cotangents(
    activation: str,
    gate: Float[Array, "*rows F"],
    up: Float[Array, "*rows F"],
    dproduct: Float[Array, "*rows F"],
) -> tuple[Float[Array, "*rows F"], Float[Array, "*rows F"]]:
    """The cotangents of gate and up for that of the product, in float32 at least."""
    dtype = accumulator_dtype(gate.dtype)
    # Of the same function, so that the two cannot disagree. It also runs inside a kernel.
    _, pull_back = jax.vjp(
        partial(gated_product, activation),
        gate.astype(dtype),
        up.astype(dtype),
    )
    return pull_back(dproduct.astype(dtype))
