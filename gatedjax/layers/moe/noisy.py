"""V-MoE's router (arXiv 2106.05974, appendix A.2): noise on the logits, and two losses of evenness.

    h' = h + n / E,  n ~ N(0, noise^2)                     in training; h' chooses and weights
    importance: CV^2 over experts of  mean_t softmax(h_t)
    load:       CV^2 over experts of  mean_t P(h + new noise >= the k-th largest h'_t)

CV is the standard deviation over the mean. Both are taken within every row of the batch (an image
of an encoder) and averaged over rows, so that micro-batches add up to their step.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.layers.moe.statistics import fraction


def noise_std(noise: float, num_experts: int) -> float:
    """Of the logits: `noise / E`."""
    return noise / num_experts


def with_noise(
    key: Array,
    logits: Float[Array, "... E"],
    noise: float,
) -> Float[Array, "... E"]:
    """`h + n`.

    Args:
      key: randomness.
      logits: h, float32.
      noise: standard deviation of n, times E.
    """
    std = noise_std(noise, logits.shape[-1])
    return logits + std * jax.random.normal(key, logits.shape, logits.dtype)


def importance_loss(
    logits: Float[Array, "B T E"],
    is_token: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """How uneven the mean probabilities of a row are, a mean over rows with tokens.

    Args:
      logits: without noise.
      is_token: False for padding.
    """
    return _unevenness(jax.nn.softmax(logits, axis=-1), is_token)


def load_loss(
    logits: Float[Array, "B T E"],
    noisy: Float[Array, "B T E"],
    experts_per_token: int,
    noise: float,
    is_token: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """How uneven the chances are to be chosen, were the noise drawn again.

    Args:
      logits: without noise.
      noisy: with the noise that chose.
      experts_per_token: k.
      noise: as of `with_noise`.
      is_token: False for padding.
    """
    threshold = jax.lax.top_k(noisy, experts_per_token)[0][..., -1:]
    std = noise_std(noise, logits.shape[-1])
    chances = jax.scipy.special.ndtr((logits - threshold) / std)
    return _unevenness(chances, is_token)


def _unevenness(
    of_tokens: Float[Array, "B T E"],
    is_token: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """The squared coefficient of variation over experts of a row's sums, a mean over rows."""
    sums = jnp.sum(jnp.where(is_token[..., None], of_tokens, 0.0), axis=1)
    of_rows = fraction(jnp.var(sums, axis=-1), jnp.mean(sums, axis=-1) ** 2)
    num_rows = jnp.sum(jnp.any(is_token, axis=1), dtype=jnp.float32)
    return fraction(jnp.sum(of_rows), num_rows)
