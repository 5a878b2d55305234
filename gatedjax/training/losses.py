"""Masked cross-entropy, in chunks so that the logits of a whole batch never exist at once.

`chunked_cross_entropy` is what evaluation sums. `training_loss` is the same number for a training
step, whose gradient is made along with it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from gatedjax.model import logits as compute_logits
from gatedjax.sharding import is_cut, parts, sum_of_parts

# (hidden states, output matrix) -> logits: softmax's, or those of another output (`output.py`).
ToLogits = Callable[[Array, Array], Array]


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
    return _predicted(logits, targets, is_counted)


def counted(
    hidden: Float[Array, "tokens M"],
    is_counted: Bool[Array, " tokens"],
) -> Float[Array, "tokens M"]:
    """Zeros for what is not counted.

    Selected, not multiplied: 0 x NaN is NaN. And before the product with the output matrix, whose
    gradient would multiply it.
    """
    return jnp.where(is_counted[:, None], hidden, 0)


def _predicted(
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


def over_chunks(
    of_chunk: Callable[[tuple[Array, ...]], tuple[Any, Any, Array]],
    pieces: tuple[Array, ...],
    chunk: int,
) -> tuple[Any, Any, Array]:
    """A loss and its gradients, made chunk by chunk: (sums, what is of tokens, dweights).

    Args:
      of_chunk: of the pieces of a chunk: what is summed, what belongs to its tokens [B C ...], and
        the gradient of the output matrix by groups of rows, which is summed too.
      pieces: arrays [B T ...].
      chunk: tokens whose logits exist at once; 0 for all of them.
    """
    rows, length = pieces[0].shape[:2]
    positions = positions_of_chunk(rows, length, chunk)
    if positions == length:
        return of_chunk(pieces)

    def add_chunk(total: tuple[Any, Array], piece: tuple[Array, ...]):
        sums, of_tokens, dweights = of_chunk(piece)
        return jax.tree.map(jnp.add, total, (sums, dweights)), of_tokens

    def shape_of_piece(x: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, positions, *x.shape[2:]), x.dtype)

    sums, _, dweights = jax.eval_shape(of_chunk, jax.tree.map(shape_of_piece, pieces))
    zeros = (
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        by_group(jnp.zeros(dweights.shape, dweights.dtype)),
    )
    cut = jax.tree.map(lambda x: chunks(x, positions), pieces)
    (sums, dweights), of_tokens = jax.lax.scan(add_chunk, zeros, cut)
    return sums, jax.tree.map(lambda x: _unchunked(x, length), of_tokens), dweights


def groups_of_rows(rows: int) -> int:
    """Rows of the same devices are a group: a loop over chunks then adds up without any traffic."""
    groups = parts("batch")
    return groups if rows % groups == 0 else 1


def added_up(gradients: Float[Array, "P X M"], dtype: Any) -> Float[Array, "X M"]:
    """The gradient of the output matrix; groups are added in `dtype`."""
    # One group is added to nothing, and stays float32.
    if gradients.shape[0] > 1:
        gradients = gradients.astype(dtype)
    return _sum_of_groups(gradients)


def _training_loss_backward(
    chunk: int,
    z_loss: float,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, TokenLosses],
):
    dloss, _ = cotangents
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
    tokens = _predicted(logits, targets, is_counted)
    token_scale = (scale * mask)[:, None]
    log_z = tokens.log_z[:, None]
    softmax = jnp.exp(logits - log_z)
    is_target = targets[:, None] == jnp.arange(logits.shape[-1])
    dlogits = token_scale * ((1.0 + 2.0 * z_loss * log_z) * softmax - is_target)
    dlogits = jnp.where(is_counted[:, None], dlogits, 0.0).astype(hidden.dtype)
    dhidden, dweights = through_products(dlogits, hidden, weights, groups)
    return sums_of(tokens, mask), Gradients(dhidden.reshape(shape), by_group(dweights))


def through_products(
    dlogits: Float[Array, "tokens X"],
    hidden: Float[Array, "tokens M"],
    weights: Float[Array, "X M"],
    groups: int,
) -> tuple[Float[Array, "tokens M"], Float[Array, "P X M"]]:
    """Gradients by hidden states and by the output matrix, from those of their products.

    Args:
      dlogits: in hidden's dtype.
      hidden: the hidden states of a chunk.
      weights: the output matrix.
      groups: of rows.
    """
    dhidden = jnp.einsum("nx,xm->nm", dlogits, weights)
    dweights = jnp.einsum(
        "pnx,pnm->pxm",
        dlogits.reshape(groups, -1, dlogits.shape[-1]),
        hidden.reshape(groups, -1, hidden.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return dhidden, dweights


def gathered(weights: Float[Array, "X M"], hidden: Float[Array, "..."]) -> Float[Array, "X M"]:
    """The output matrix along the whole width, before a loop would gather it each time."""
    return nn.with_logical_constraint(weights.astype(hidden.dtype), ("vocab", None))


def by_group(gradients: Float[Array, "P X M"]) -> Float[Array, "P X M"]:
    """Each group's gradient on the devices of its rows."""
    if gradients.shape[0] == 1:
        return gradients
    return nn.with_logical_constraint(gradients, ("batch", "vocab", None))


def _sum_of_groups(gradients: Float[Array, "P X M"]) -> Float[Array, "X M"]:
    """The gradient, cut over devices as the matrix is."""
    groups, vocab, width = gradients.shape
    names = ("vocab", "embed_vocab")
    # Where the sequence is cut, the same axis cuts the width too.
    is_by_device = groups == parts("batch") and parts("length") == 1
    if is_by_device and is_cut("embed_vocab", width) and vocab % parts("vocab") == 0:
        return sum_of_parts(gradients, names)
    return nn.with_logical_constraint(jnp.sum(gradients, axis=0), names)


def positions_of_chunk(rows: int, length: int, chunk: int) -> int:
    """How many positions of each row make a chunk of about `chunk` tokens."""
    if chunk == 0:
        return length
    return max(1, min(length, chunk // rows))


def flat(x: Shaped[Array, "B T *channels"]) -> Shaped[Array, "tokens *channels"]:
    return x.reshape(-1, *x.shape[2:])


def chunks(
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


def _unchunked(
    pieces: Shaped[Array, "N B C *channels"],
    length: int,
) -> Shaped[Array, "B T *channels"]:
    """What `chunks` cut, without what filled its last piece."""
    count, rows, positions = pieces.shape[:3]
    joined = jnp.moveaxis(pieces, 0, 1).reshape(rows, count * positions, *pieces.shape[3:])
    return joined[:, :length]
