"""Masked cross-entropy, in chunks so that the logits of a whole batch never exist at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from gatedjax.model import logits as compute_logits


class TokenLosses(NamedTuple):
    """Weighted sums over tokens, of a batch or of each of its rows, float32.

    Divide by `count`, the sum of the weights, once it is global.
    """

    cross_entropy: Float[Array, "*rows"]
    z_loss: Float[Array, "*rows"]
    count: Float[Array, "*rows"]


def cross_entropy(
    hidden: Float[Array, "*rows tokens M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "*rows tokens"],
    mask: Float[Array, "*rows tokens"],
) -> TokenLosses:
    """Weighted sums of `logsumexp(logits) - logits[target]` in nats, and of the z-loss, by row.

    The z-loss is `logsumexp(logits)^2` (arXiv 2204.02311). What has no weight is left out: its
    target may be any number, its hidden state NaN. A target outside of the vocabulary that has a
    weight makes the loss NaN.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: the weight of each token, 0 or more: 1 if it has a target, 0 if not.
    """
    mask = mask.astype(jnp.float32)
    tokens = predicted(
        hidden.reshape(-1, hidden.shape[-1]),
        weights,
        targets.reshape(-1),
        mask.reshape(-1),
    )
    nats = tokens.nats.reshape(mask.shape)
    log_z = tokens.log_z.reshape(mask.shape)
    return TokenLosses(
        cross_entropy=jnp.sum(nats * mask, axis=-1),
        z_loss=jnp.sum(log_z**2 * mask, axis=-1),
        count=jnp.sum(mask, axis=-1),
    )


class Predicted(NamedTuple):
    """What is said of every target; zeros and False where none is asked for.

    nats: `logsumexp(logits) - logits[target]`.
    log_z: `logsumexp(logits)`.
    is_best: the target is the most likely token.
    """

    nats: Float[Array, " tokens"]
    log_z: Float[Array, " tokens"]
    is_best: Bool[Array, " tokens"]


def predicted(
    hidden: Float[Array, "tokens M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, " tokens"],
    mask: Float[Array, " tokens"],
) -> Predicted:
    """How each target is predicted.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: where it is 0, hidden states and targets have no part, whatever stands there.
    """
    # Selected, not multiplied: 0 x NaN is NaN. Hidden states are selected before the product,
    # whose gradient would multiply them.
    is_counted = mask != 0
    hidden = jnp.where(is_counted[:, None], hidden, 0)
    logits = compute_logits(hidden, weights)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Below 0 is outside of the vocabulary too, not counted from its end.
    targets = jnp.where(targets < 0, logits.shape[-1], targets)
    targets = jnp.where(is_counted, targets, 0)
    target_logits = jnp.take_along_axis(
        logits,
        targets[:, None],
        axis=-1,
        mode="fill",
        fill_value=jnp.nan,
    )[:, 0]
    return Predicted(
        nats=jnp.where(is_counted, log_z - target_logits, 0.0),
        log_z=jnp.where(is_counted, log_z, 0.0),
        is_best=is_counted & (jnp.argmax(logits, axis=-1) == targets),
    )


def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    chunk: int,
    by_row: bool = False,
) -> TokenLosses:
    """`cross_entropy` over the batch, with the logits of about `chunk` tokens at a time.

    They are computed again in the backward pass. Chunks are cut along T, so that a batch sharded by
    rows stays sharded.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: the weight of each token.
      chunk: tokens whose logits exist at once; 0 for all of them.
      by_row: sums of each row, [B], in place of those of the batch.
    """
    rows, length = targets.shape

    def sums(hidden: Array, targets: Array, mask: Array) -> TokenLosses:
        if by_row:
            return cross_entropy(hidden, weights, targets, mask)
        return cross_entropy(_flat(hidden), weights, _flat(targets), _flat(mask))

    # How many positions of each row make a chunk.
    positions = length
    if chunk > 0:
        positions = max(1, min(length, chunk // rows))
    if positions == length:
        return sums(hidden, targets, mask)

    @jax.checkpoint
    def add_chunk(total: TokenLosses, part: tuple[Array, Array, Array]) -> tuple[TokenLosses, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    zero = jnp.zeros(rows if by_row else (), jnp.float32)
    parts = (
        _chunks(hidden, positions),
        _chunks(targets, positions),
        _chunks(mask, positions),
    )
    total, _ = jax.lax.scan(add_chunk, TokenLosses(zero, zero, zero), parts)
    return total


def _flat(x: Shaped[Array, "B T *channels"]) -> Shaped[Array, "tokens *channels"]:
    return x.reshape(-1, *x.shape[2:])


def _chunks(
    x: Shaped[Array, "B T *channels"],
    positions: int,
) -> Shaped[Array, "N B C *channels"]:
    """Pieces of `positions` along T as the first axis. The last is filled with zeros."""
    rows, length = x.shape[:2]
    padding = -length % positions
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, padding)
    padded = jnp.pad(x, widths)
    pieces = padded.reshape(rows, -1, positions, *x.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)
