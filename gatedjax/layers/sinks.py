"""Sinks of tokens: a logit in the denominator of a row of attention that is the row's own.

    W_ij = exp(s_ij) / (exp(a_i) + sum_j exp(s_ij)) = exp(s_ij - a_i) / (1 + sum_j exp(s_ij - a_i))

The right side is attention with a sink of 0, whose logits are less by a number of the query. One
more channel subtracts it, in which all keys are 1: every kernel takes sinks of tokens so, and a
cache of keys too.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

# A float32 number is the sum of so many of 8 bits each.
PARTS_OF_16_BITS = 3


def num_sink_channels(dtype: DTypeLike) -> int:
    """How many channels the sinks of tokens take in queries and keys of this dtype."""
    return PARTS_OF_16_BITS if jnp.dtype(dtype).itemsize == 2 else 1


def token_sinks_as_channels(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    sink_logits: Float[Array, "B T H"],
    scale: float,
) -> tuple[Float[Array, "B T H _"], Float[Array, "B T Hk _"]]:
    """Queries and keys whose logits are less by the query's sink.

    Args:
      q, k: queries and keys.
      sink_logits: of every token and head, float32.
      scale: what the op multiplies `q k` by; not 0.
    """
    rest = -sink_logits / scale
    channels = []
    if q.dtype.itemsize > 2:
        channels.append(rest.astype(q.dtype))
    else:
        kept = jnp.finfo(q.dtype)
        for _ in range(PARTS_OF_16_BITS):
            # Not a cast there and back: XLA may leave out the two, and there would be no rest.
            # What is too small for float16 is lost: less than 6e-5.
            part = lax.reduce_precision(rest, kept.nexp, kept.nmant)
            channels.append(part.astype(q.dtype))
            rest = rest - part
    ones = jnp.ones((*k.shape[:3], len(channels)), k.dtype)
    q = jnp.concatenate([q, jnp.stack(channels, axis=-1)], axis=-1)
    return q, jnp.concatenate([k, ones], axis=-1)
