"""Masked cross-entropy, in chunks so that the logits of a whole batch never exist at once.

`chunked_cross_entropy` is what evaluation sums. `training_loss` is the same number for a training
step, whose gradient is made along with it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.model import logits as compute_logits
from gatedjax.training.token_chunks import chunks, flat, positions_of_chunk

# (hidden states, output matrix) -> logits: softmax's, or those of another output (`output.py`).
ToLogits = Callable[[Array, Array], Array]


class TokenLosses(NamedTuple):
    """Weighted sums over tokens, of a batch or of each of its rows, float32.

    Divide by `count`, the sum of the weights, once it is global.
    """

    cross_entropy: Float[Array, "*rows"]
    z_loss: Float[Array, "*rows"]
    count: Float[Array, "*rows"]


class Predicted(NamedTuple):
    """What is said of every target; zeros and False where none is asked for.

    nats: `logsumexp(logits) - logits[target]`.
    log_z: `logsumexp(logits)`.
    is_best: the target is the most likely token.
    """

    nats: Float[Array, " tokens"]
    log_z: Float[Array, " tokens"]
    is_best: Bool[Array, " tokens"]


def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    chunk: int,
    by_row: bool = False,
    to_logits: ToLogits = compute_logits,
) -> TokenLosses:
    """`cross_entropy` over the batch, with the logits of about `chunk` tokens at a time.

    Chunks are cut along T, so that a batch sharded by rows stays sharded.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: the weight of each token.
      chunk: tokens whose logits exist at once; 0 for all of them.
      by_row: sums of each row, [B], in place of those of the batch.
      to_logits: how hidden states and the output matrix become logits.
    """
    rows, length = targets.shape

    def sums(hidden: Array, targets: Array, mask: Array) -> TokenLosses:
        if by_row:
            return cross_entropy(hidden, weights, targets, mask, to_logits)
        return cross_entropy(flat(hidden), weights, flat(targets), flat(mask), to_logits)

    positions = positions_of_chunk(rows, length, chunk)
    if positions == length:
        return sums(hidden, targets, mask)

    def add_chunk(total: TokenLosses, part: tuple[Array, Array, Array]) -> tuple[TokenLosses, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    zero = jnp.zeros(rows if by_row else (), jnp.float32)
    pieces = (
        chunks(hidden, positions),
        chunks(targets, positions),
        chunks(mask, positions),
    )
    total, _ = jax.lax.scan(add_chunk, TokenLosses(zero, zero, zero), pieces)
    return total


def cross_entropy(
    hidden: Float[Array, "*rows tokens M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "*rows tokens"],
    mask: Float[Array, "*rows tokens"],
    to_logits: ToLogits = compute_logits,
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
      to_logits: how the two become logits.
    """
    mask = mask.astype(jnp.float32)
    tokens = predicted(
        hidden.reshape(-1, hidden.shape[-1]),
        weights,
        targets.reshape(-1),
        mask.reshape(-1),
        to_logits,
    )
    return sums_of(jax.tree.map(lambda x: x.reshape(mask.shape), tokens), mask)


def sums_of(tokens: "Predicted", mask: Float[Array, "*rows tokens"]) -> TokenLosses:
    return TokenLosses(
        cross_entropy=jnp.sum(tokens.nats * mask, axis=-1),
        z_loss=jnp.sum(tokens.log_z**2 * mask, axis=-1),
        count=jnp.sum(mask, axis=-1),
    )


def count_correct(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    chunk: int,
    to_logits: ToLogits = compute_logits,
) -> Float[Array, "B"]:
    """The weight of the tokens of each row whose target is the most likely one.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: the weight of each token.
      chunk: tokens whose logits exist at once; 0 for all of them.
      to_logits: how hidden states and the matrix become logits.
    """
    rows, length = targets.shape

    def of_chunk(pieces: tuple[Array, Array, Array]) -> Float[Array, "B"]:
        hidden, targets, mask = pieces
        found = predicted(flat(hidden), weights, flat(targets), flat(mask), to_logits)
        return jnp.sum(jnp.where(found.is_best.reshape(mask.shape), mask, 0.0), axis=1)

    positions = positions_of_chunk(rows, length, chunk)
    pieces = tuple(chunks(x, positions) for x in (hidden, targets, mask))
    return jnp.sum(jax.lax.map(of_chunk, pieces), axis=0)


def predicted(
    hidden: Float[Array, "tokens M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, " tokens"],
    mask: Float[Array, " tokens"],
    to_logits: ToLogits = compute_logits,
) -> Predicted:
    """How each target is predicted.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict at each position.
      mask: where it is 0, hidden states and targets have no part, whatever stands there.
      to_logits: how the two become logits.
    """
    is_counted = mask != 0
    hidden = counted(hidden, is_counted)
    logits = to_logits(hidden, weights)
    return predicted_from_logits(logits, targets, is_counted)


def counted(
    hidden: Float[Array, "tokens M"],
    is_counted: Bool[Array, " tokens"],
) -> Float[Array, "tokens M"]:
    """Zeros for what is not counted.

    Selected, not multiplied: 0 x NaN is NaN. And before the product with the output matrix, whose
    gradient would multiply it.
    """
    return jnp.where(is_counted[:, None], hidden, 0)


def predicted_from_logits(
    logits: Float[Array, "tokens X"],
    targets: Int[Array, " tokens"],
    is_counted: Bool[Array, " tokens"],
) -> Predicted:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A sum over the vocabulary, beside the one of logsumexp: a TPU gathers single numbers slowly.
    is_target = targets[:, None] == jnp.arange(logits.shape[-1])
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    is_in_vocabulary = (targets >= 0) & (targets < logits.shape[-1])
    target_logits = jnp.where(is_in_vocabulary, target_logits, jnp.nan)
    return Predicted(
        nats=jnp.where(is_counted, log_z - target_logits, 0.0),
        log_z=jnp.where(is_counted, log_z, 0.0),
        is_best=is_counted & (jnp.argmax(logits, axis=-1) == targets),
    )
