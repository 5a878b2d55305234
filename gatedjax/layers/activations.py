"""What lies between the matrices of an MLP, in float32."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# The slope of gpt-oss's gate: with it the sigmoid is nearly the one of a GELU.
GATE_SLOPE = 1.702


def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(x, 0)^2` (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x: with it a gated MLP is the bilinear one."""
    return x


# jax.nn.gelu is the tanh form unless told otherwise.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
    "sigmoid": jax.nn.sigmoid,
    "identity": identity,
}


def activated(x: Float[Array, "..."], activation: str) -> Float[Array, "..."]:
    """`activation(x)`, computed in float32; returned in x's dtype."""
    return ACTIVATIONS[activation](x.astype(jnp.float32)).astype(x.dtype)


def gates_of(
    gate_logits: Float[Array, "..."],
    activation: str,
    limit: float = 0.0,
) -> Float[Array, "..."]:
    """What `up` is multiplied by, float32.

    Args:
      gate_logits: before the activation.
      activation: "clamped_swiglu", or of `ACTIVATIONS`.
      limit: of "clamped_swiglu": gate logits are cut to it from above.
    """
    logits = gate_logits.astype(jnp.float32)
    if activation != "clamped_swiglu":
        return ACTIVATIONS[activation](logits)
    logits = jnp.minimum(logits, limit)
    return logits * jax.nn.sigmoid(GATE_SLOPE * logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gated_product(
    gate_logits: Float[Array, "..."],
    up: Float[Array, "..."],
    activation: str,
    limit: float = 0.0,
) -> Float[Array, "..."]:
    """`activation(gate_logits) * up`, in float32; returned in up's dtype.

    "clamped_swiglu" is that of gpt-oss: `(up + 1) * g * sigmoid(1.702 g)`, where up is cut to
    +- limit and g, the gate logits, to limit from above only.

    The backward pass keeps the two arrays as they are given, and computes the float32 ones between
    them and the product again: they are larger, and quickly made.

    Args:
      gate_logits: before the activation.
      up: what is gated.
      activation: "clamped_swiglu", or of `ACTIVATIONS`.
      limit: of "clamped_swiglu".
    """
    return _product(gate_logits, up, activation, limit)


def _product(gate_logits: Array, up: Array, activation: str, limit: float) -> Array:
    gates = gates_of(gate_logits, activation, limit)
    factor = up.astype(jnp.float32)
    if activation == "clamped_swiglu":
        factor = jnp.clip(factor, -limit, limit) + 1.0
    return (gates * factor).astype(up.dtype)


def _gated_product_forward(gate_logits: Array, up: Array, activation: str, limit: float):
    return _product(gate_logits, up, activation, limit), (gate_logits, up)


def _gated_product_backward(
    activation: str,
    limit: float,
    inputs: tuple[Array, Array],
    dproduct: Array,
) -> tuple[Array, Array]:
    product = functools.partial(_product, activation=activation, limit=limit)
    _, pullback = jax.vjp(product, *inputs)
    return pullback(dproduct)


gated_product.defvjp(_gated_product_forward, _gated_product_backward)
