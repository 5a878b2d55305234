"""The cross-entropy of a training step, whose gradient is made along with it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.model import logits as compute_logits
from gatedjax.training.losses import (
    TokenLosses,
    chunked_cross_entropy,
    counted,
    predicted_from_logits,
    sums_of,
)
from gatedjax.training.output_matrix import (
    added_up,
    by_group,
    gathered,
    groups_of_rows,
    through_products,
)
from gatedjax.training.token_chunks import flat, over_chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def training_loss(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    scale: Float[Array, ""],
    chunk: int,
    z_loss: float,
) -> tuple[Float[Array, ""], TokenLosses]:
    """`scale x (cross-entropy + z_loss x z-loss)`, summed over the batch, and its sums.

    Differentiated, it makes its gradient in the forward pass, chunk by chunk, while the logits are
    there: a backward pass would make them a second time. Each device sums its chunks' gradients of
    the output matrix in float32; those of all devices are added in hidden's dtype and cut as the
    matrix is. The sums carry no gradient, nor do targets, mask and scale.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix, cut over devices as it is stored; used in hidden's dtype.
      targets: the token to predict at each position.
      mask: the weight of each token.
      scale: what the loss is multiplied by, such as 1 / the number of tokens. In here rather than
        outside, where it would round the gradient once more.
      chunk: tokens whose logits exist at once; 0 for all of them.
      z_loss: the weight of the z-loss.
    """
    losses = chunked_cross_entropy(
        hidden,
        gathered(weights, hidden),
        targets,
        mask,
        chunk,
    )
    return scale * (losses.cross_entropy + z_loss * losses.z_loss), losses


class Gradients(NamedTuple):
    """Of the loss. The output matrix's has the sum over each group of rows, float32."""

    hidden: Float[Array, "B C M"]
    weights: Float[Array, "P X M"]


def _training_loss_forward(
    hidden: Array,
    weights: Array,
    targets: Array,
    mask: Array,
    scale: Array,
    chunk: int,
    z_loss: float,
):
    whole_weights = gathered(weights, hidden)
    groups = groups_of_rows(targets.shape[0])

    def of_chunk(piece: tuple[Array, ...]) -> tuple[TokenLosses, Array, Array]:
        losses, gradients = _with_gradients(
            piece[0],
            whole_weights,
            piece[1],
            piece[2],
            scale,
            z_loss,
            groups,
        )
        return losses, gradients.hidden, gradients.weights

    losses, dhidden, dweights = over_chunks(of_chunk, (hidden, targets, mask), chunk)
    dweights = added_up(dweights, hidden.dtype).astype(weights.dtype)
    loss = scale * (losses.cross_entropy + z_loss * losses.z_loss)
    return (loss, losses), (dhidden, dweights)


def _training_loss_backward(
    chunk: int,
    z_loss: float,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, TokenLosses],
):
    dloss, _ = cotangents
    # XLA brings the chunks into the order of tokens: before they are float32, not after.
    gradients = jax.lax.optimization_barrier(gradients)
    dhidden, dweights = (
        (dloss * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients
    )
    return dhidden, dweights, None, None, None


training_loss.defvjp(_training_loss_forward, _training_loss_backward)


def _with_gradients(
    hidden: Float[Array, "B C M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B C"],
    mask: Float[Array, "B C"],
    scale: Float[Array, ""],
    z_loss: float,
    groups: int,
) -> tuple[TokenLosses, Gradients]:
    """The sums of a chunk, and the gradient of its loss.

    The loss of a token is `m (log_z - logits[target] + z_loss log_z^2)`, and `log_z` has the
    gradient `softmax(logits)`: that of the logits is `m ((1 + 2 z_loss log_z) softmax - onehot)`.
    """
    shape = hidden.shape
    targets = flat(targets)
    mask = flat(mask).astype(jnp.float32)
    is_counted = mask != 0
    hidden = counted(flat(hidden), is_counted)
    logits = compute_logits(hidden, weights)
    tokens = predicted_from_logits(logits, targets, is_counted)
    token_scale = (scale * mask)[:, None]
    log_z = tokens.log_z[:, None]
    softmax = jnp.exp(logits - log_z)
    is_target = targets[:, None] == jnp.arange(logits.shape[-1])
    dlogits = token_scale * ((1.0 + 2.0 * z_loss * log_z) * softmax - is_target)
    dlogits = jnp.where(is_counted[:, None], dlogits, 0.0).astype(hidden.dtype)
    dhidden, dweights = through_products(dlogits, hidden, weights, groups)
    return sums_of(tokens, mask), Gradients(dhidden.reshape(shape), by_group(dweights))
