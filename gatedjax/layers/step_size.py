"""The decays of Mamba-2, Gated DeltaNet and KDA, and how their step sizes and rates start.

The published codes draw step sizes log-uniformly and rates uniformly (arXiv 2405.21060 and its
code; flash-linear-attention).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

# Step sizes at the start, log-uniform between these; decay rates, uniform up to the last.
MIN_STEP_SIZE = 1e-3
MAX_STEP_SIZE = 1e-1
MAX_DECAY_RATE = 16.0


def step_size_bias(
    key: Array,
    shape: tuple[int, ...],
    dtype,
) -> Array:
    """b with softplus(b) log-uniform between the least and the largest step size."""
    log_dt = jax.random.uniform(
        key,
        shape,
        dtype,
        np.log(MIN_STEP_SIZE),
        np.log(MAX_STEP_SIZE),
    )
    dt = jnp.exp(log_dt)
    # The inverse of softplus.
    return dt + jnp.log(-jnp.expm1(-dt))


def log_decay_rate(
    key: Array,
    shape: tuple[int, ...],
    dtype,
) -> Array:
    """The log of a decay rate, uniform between 1 and the largest."""
    return jnp.log(1 + (MAX_DECAY_RATE - 1) * jax.random.uniform(key, shape, dtype))


def softplus_decay(
    logits: Float[Array, "..."],
    log_rate: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The log decay `-exp(A_log) softplus(logits)` of Mamba-2, Gated DeltaNet and KDA, float32."""
    return -jnp.exp(log_rate) * jax.nn.softplus(logits.astype(jnp.float32))
