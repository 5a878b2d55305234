"""One token from its logits: temperature, the k likeliest, the nucleus."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

# Below it a temperature takes the most likely token, above it any: so it does here, without leaving
# the range of float32.
LEAST_TEMPERATURE = 1e-30
MOST_TEMPERATURE = 1e30


class Sampling(NamedTuple):
    """How a token is chosen: the last arguments of `sample_token`."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0


def filter_logits(
    logits: Float[Array, "B X"],
    top_k: int,
    top_p: float,
) -> Float[Array, "B X"]:
    """-inf for all but the k most likely tokens, and of those all but the nucleus of mass p.

    The nucleus is the smallest set of most likely tokens whose probabilities reach p
    (arXiv 1904.09751), never empty. Of equally likely tokens those with lower ids come first.
    top_k = 0 and top_p = 1 keep all tokens.
    """
    vocabulary = logits.shape[-1]
    k = min(top_k, vocabulary) if top_k else vocabulary
    if k == vocabulary and top_p >= 1.0:
        return logits
    # From the most likely on; of equals the one with the lower id first. 0 and -0 are equal.
    logits = jnp.where(logits == 0, 0.0, logits)
    ordered, token_ids = jax.lax.top_k(logits, k)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        mass = jnp.cumsum(probabilities, axis=-1)
        # The token that reaches p is kept: what counts is the mass of those before it.
        has_reached = mass[:, :-1] >= top_p
        ordered = ordered.at[:, 1:].set(jnp.where(has_reached, -jnp.inf, ordered[:, 1:]))
    row = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, -jnp.inf).at[row, token_ids].set(ordered)


def sample_token(
    logits: Float[Array, "B X"],
    key: Array,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, " B"]:
    """One token per row.

    Args:
      logits: of the next token.
      key: the randomness of this token.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens; 0 for all.
      top_p: sample among the fewest tokens whose probabilities reach p. Both filters see the logits
        after the temperature.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0: a small temperature then takes the others to -inf and none to +inf.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    divisor = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    filtered = filter_logits((logits - highest) / divisor, top_k, top_p)
    token = jax.random.categorical(key, filtered)
    return token.astype(jnp.int32)
