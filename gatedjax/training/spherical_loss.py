"""The Z-loss (arXiv 1604.08859): softplus(a (b - z_y)) / a, with z the standardized logits.

It is a function of the target's logit and of the mean and the variance of all logits, so neither it
nor its exact gradient needs the logits [rows, vocabulary]. With W centered over the vocabulary and
Q = W^T W / X the variance is h^T Q h (1412.7091). `FactoredHead` takes steps of gradient descent at
a cost that does not know the size of the vocabulary at all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import OutputConfig
from gatedjax.output import LEAST_NORM
from gatedjax.training.losses import TokenLosses


def spherical_loss(
    output: OutputConfig,
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> tuple[Float[Array, ""], TokenLosses]:
    """The weighted sum of the Z-loss, and the sums of its tokens.

    Args:
      output: a (`sharpness`) and b (`offset`).
      hidden: the model's last hidden states.
      weights: the output matrix.
      targets: the token to predict; NaN for one outside of the vocabulary that has a weight.
      mask: the weight of each token; what has none is not looked at.
    """
    is_counted = mask != 0
    hidden = jnp.where(is_counted[..., None], hidden, 0).astype(jnp.float32)
    centered = weights.astype(jnp.float32)
    centered = centered - jnp.mean(centered, axis=0)
    # Float32 throughout: the variance is a difference of squares otherwise.
    spread = jnp.matmul(centered.T, centered, precision="highest") / weights.shape[0]
    variance = jnp.einsum("btm,mn,btn->bt", hidden, spread, hidden, precision="highest")
    known = jnp.where(targets < 0, weights.shape[0], targets)
    known = jnp.where(is_counted, known, 0)
    rows = jnp.take(centered, known, axis=0, mode="fill", fill_value=jnp.nan)
    above_mean = jnp.einsum("btm,btm->bt", hidden, rows, precision="highest")
    z = above_mean / jnp.sqrt(variance + LEAST_NORM)
    losses = jnp.where(is_counted, z_losses(output, z), 0.0)
    mask = mask.astype(jnp.float32)
    total = jnp.sum(losses * mask)
    return total, TokenLosses(total, jnp.float32(0.0), jnp.sum(mask))


def z_losses(output: OutputConfig, z: Float[Array, "..."]) -> Float[Array, "..."]:
    """softplus(a (b - z)) / a of the target's standardized logits."""
    return jax.nn.softplus(output.sharpness * (output.offset - z)) / output.sharpness


class FactoredHead(NamedTuple):
    """An output matrix W = V U + 1 w^T, and what the loss needs of all its rows.

    A step of gradient descent touches the rows of V that were targets, and otherwise arrays whose
    size does not depend on the vocabulary.

    inverse: of U.
    square: W^T W.
    total: the sum of the rows of W.
    """

    v: Float[Array, "X M"]
    u: Float[Array, "M M"]
    w: Float[Array, " M"]
    inverse: Float[Array, "M M"]
    square: Float[Array, "M M"]
    total: Float[Array, " M"]


def factored(weights: Float[Array, "X M"]) -> FactoredHead:
    """An output matrix, ready for `factored_step`."""
    width = weights.shape[1]
    eye = jnp.eye(width, dtype=weights.dtype)
    return FactoredHead(
        v=weights,
        u=eye,
        w=jnp.zeros(width, weights.dtype),
        inverse=eye,
        square=weights.T @ weights,
        total=jnp.sum(weights, axis=0),
    )


def dense(head: FactoredHead) -> Float[Array, "X M"]:
    """The output matrix itself."""
    return head.v @ head.u + head.w


def factored_step(
    output: OutputConfig,
    head: FactoredHead,
    hidden: Float[Array, "N M"],
    targets: Int[Array, " N"],
    rate: float,
) -> tuple[FactoredHead, Float[Array, ""], Float[Array, "N M"]]:
    """A step of gradient descent on the summed Z-loss, exact: (head, loss, gradient by hidden).

    The loss is a function of s = sum o, q = sum o^2 and o_y of each row of hidden states h. So the
    gradient of W is W A + 1 c^T + (one row of g for each target), with A = sum 2 q' h h^T,
    c = sum s' h and g = o_y' h. Every term keeps the form V U + 1 w^T.

    Args:
      output: a and b.
      head: before the step.
      hidden: hidden states.
      targets: the token of each, inside the vocabulary.
      rate: the learning rate.
    """
    vocab = head.v.shape[0]
    rows = head.v[targets] @ head.u + head.w
    sums = hidden @ head.total
    squares = jnp.einsum("nm,mk,nk->n", hidden, head.square, hidden)
    own = jnp.sum(hidden * rows, axis=1)

    def loss(sums: Array, squares: Array, own: Array) -> Array:
        mean = sums / vocab
        variance = squares / vocab - mean**2
        return jnp.sum(z_losses(output, (own - mean) / jnp.sqrt(variance + LEAST_NORM)))

    value, derivatives = jax.value_and_grad(loss, argnums=(0, 1, 2))(sums, squares, own)
    dsums, dsquares, down = derivatives
    dhidden = dsums[:, None] * head.total + down[:, None] * rows
    dhidden = dhidden + 2.0 * dsquares[:, None] * (hidden @ head.square)
    # What the step adds: -rate (W A + 1 c^T + G), where G has a row for each target.
    a = 2.0 * jnp.einsum("n,nm,nk->mk", dsquares, hidden, hidden)
    c = dsums @ hidden
    g = down[:, None] * hidden
    factor = jnp.eye(a.shape[0], dtype=a.dtype) - rate * a
    # W' = W F - rate (1 c^T + G): of W = V U + 1 w^T that is V U F + 1 (F w - rate c)^T - rate G.
    u = head.u @ factor
    inverse = jnp.linalg.solve(factor, head.inverse)
    w = head.w @ factor - rate * c
    v = head.v.at[targets].add(-rate * g @ inverse)
    # W'^T W' and its rows' sum, without W: W F is K here, and G has rows at targets alone.
    kept_square = factor.T @ head.square @ factor
    kept_total = head.total @ factor
    outer_total = jnp.outer(kept_total, c)
    outer_rows = (rows @ factor).T @ g
    added_total = vocab * c + jnp.sum(g, axis=0)
    square = kept_square - rate * (outer_total + outer_total.T + outer_rows + outer_rows.T)
    square = square + rate**2 * _square_of_added(c, g, targets, vocab)
    total = kept_total - rate * added_total
    new = FactoredHead(v, u, w, inverse, square, total)
    return new, value, dhidden


def _square_of_added(
    c: Float[Array, " M"],
    g: Float[Array, "N M"],
    targets: Int[Array, " N"],
    vocab: int,
) -> Float[Array, "M M"]:
    """(1 c^T + G)^T (1 c^T + G). Rows of the same target are one row of G."""
    is_same = (targets[:, None] == targets).astype(g.dtype)
    with_total = jnp.outer(c, jnp.sum(g, axis=0))
    return vocab * jnp.outer(c, c) + with_total + with_total.T + g.T @ is_same @ g
