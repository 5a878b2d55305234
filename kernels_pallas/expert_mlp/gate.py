"""What lies between an expert's matmuls, elementwise: `activation(gate) * up`, and its cotangents."""

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def gated_product(activation: str, gate: Array, up: Array) -> Array:
    """float32 at least."""
    dtype = jnp.promote_types(jnp.float32, gate.dtype)
    return ACTIVATIONS[activation](gate.astype(dtype)) * up.astype(dtype)


def gated_product_cotangents(
    activation: str, gate: Array, up: Array, dproduct: Array
) -> tuple[Array, Array]:
    """(dgate, dup), float32 at least."""
    dtype = jnp.promote_types(jnp.float32, gate.dtype)
    _, pull = jax.vjp(
        lambda a, b: gated_product(activation, a, b), gate.astype(dtype), up.astype(dtype)
    )
    return pull(dproduct.astype(dtype))
