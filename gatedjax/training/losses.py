"""Masked cross-entropy, in chunks so that the logits of a whole batch never exist at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.model import logits as compute_logits


class TokenLosses(NamedTuple):
    """Sums over tokens, float32: divide by `count`, the number of tokens with a target, once it is global."""

    cross_entropy: Float[Array, ""]
    z_loss: Float[Array, ""]
    count: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "R M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, " R"],
    mask: Float[Array, " R"],
) -> TokenLosses:
    """`logsumexp(logits) - logits[target]` in nats, and the z-loss `logsumexp(logits)^2` (arXiv 2204.02311), masked."""
    scores = compute_logits(hidden, weights)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    target_score = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    mask = mask.astype(jnp.float32)
    return TokenLosses(
        jnp.sum((log_z - target_score) * mask), jnp.sum(log_z**2 * mask), jnp.sum(mask)
    )


def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    chunk: int,
) -> TokenLosses:
    """`cross_entropy` over the batch, with the logits of B x chunk' tokens at a time, recomputed in the backward pass.

    Cut along T, so that a batch sharded by rows stays sharded; chunk' is the number of positions that gives about
    `chunk` tokens. `chunk = 0`: all at once.
    """
    rows, length = targets.shape
    step = length if chunk == 0 else max(1, min(length, chunk // rows))
    flat = lambda *arrays: [a.reshape(-1, *a.shape[2:]) for a in arrays]
    if step == length:
        h, t, m = flat(hidden, targets, mask)
        return cross_entropy(h, weights, t, m)
    pad = -length % step
    cut = lambda a: jnp.moveaxis(
        jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)).reshape(
            rows, -1, step, *a.shape[2:]
        ),
        1,
        0,
    )

    @jax.checkpoint
    def body(total: TokenLosses, part):
        h, t, m = flat(*part)
        return jax.tree.map(jnp.add, total, cross_entropy(h, weights, t, m)), None

    zero = TokenLosses(*(jnp.zeros((), jnp.float32),) * 3)
    return jax.lax.scan(body, zero, (cut(hidden), cut(targets), cut(mask)))[0]
