"""The sparsemax loss at a model's output (arXiv 1602.02068), for training loops of one's own.

`train.py` trains with it by model.output.kind=sparsemax. The loss and its gradient are optax's.
"""

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from gatedjax.model import logits as compute_logits


def sparsemax_loss(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The weighted mean over tokens of `-z_y + sum_{j in S} (z_j^2 - tau^2) / 2 + 1/2`.

    S are the tokens that sparsemax(z) gives something, tau is its threshold; the gradient by the
    logits z is sparsemax(z) - onehot(y). All logits of the batch exist at once, and are sorted.
    What has no weight is left out, whatever it holds; 0 where nothing has any.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix: `gatedjax.model.head_weights`.
      targets: the token to predict at each position.
      mask: the weight of each token, 0 or more.
    """
    is_counted = mask != 0
    # Selected, not multiplied: 0 x NaN is NaN.
    hidden = jnp.where(is_counted[..., None], hidden, 0)
    logits = compute_logits(hidden.reshape(-1, hidden.shape[-1]), weights)
    of_token = optax.losses.multiclass_sparsemax_loss(logits, targets.reshape(-1))
    counted = jnp.where(is_counted, of_token.reshape(mask.shape), 0)
    total = jnp.sum(mask)
    return jnp.sum(counted * mask) / jnp.where(total == 0, 1, total)
