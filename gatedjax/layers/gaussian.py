"""Logits that are less the farther a key is from the query (a Gaussian kernel under exp).

    s_ij = -scale |q_i - k_j|^2 / 2 = scale (q_i k_j - |q_i|^2 / 2 - |k_j|^2 / 2)

Both squares are channels of queries and keys, as the sinks of tokens are: every kernel takes them
so, and a cache of keys too. Softmax of it is normalized Gaussian attention, where the query's own
square has no effect; `exp` keeps it (arXiv 2111.00035).
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.sinks import token_sinks_as_channels


def distances_as_channels(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    scale: float,
) -> tuple[Float[Array, "B T H _"], Float[Array, "B T Hk _"]]:
    """Queries and keys whose products are those of the formula above.

    Args:
      q, k: queries and keys.
      scale: what the op multiplies the products by.
    """
    half_q, half_k = (0.5 * scale * _squares(x) for x in (q, k))
    q_with, k_with = token_sinks_as_channels(q, k, half_q, scale)
    # The same with the two in each other's place.
    k_with, q_with = token_sinks_as_channels(k_with, q_with, half_k, scale)
    return q_with, k_with


def _squares(x: Float[Array, "B T H D"]) -> Float[Array, "B T H"]:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
