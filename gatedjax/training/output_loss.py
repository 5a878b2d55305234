"""What outputs other than softmax are trained with (`OutputConfig`), beside `training_loss`.

`token_losses` are the losses of tokens as functions of their products with the output matrix.
`output_loss` sums them over a batch, chunk by chunk, and makes the gradient while the products are
there. The Z-loss needs no products at all (`spherical_loss.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from gatedjax.config import ModelConfig, OutputConfig
from gatedjax.model import HEAD_BIAS, head_weights
from gatedjax.model import logits as products
from gatedjax.output import codes_of_tokens, fourier_logits, log_stable, roughness, unit_rows
from gatedjax.training.losses import TokenLosses, counted
from gatedjax.training.output_matrix import (
    added_up,
    by_group,
    gathered,
    groups_of_rows,
    through_products,
)
from gatedjax.training.spherical_loss import spherical_loss
from gatedjax.training.token_chunks import flat, over_chunks
from gatedjax.training.training_loss import training_loss


class Extra(NamedTuple):
    """What a loss needs besides the products.

    of_tokens: of noisy_softmax, [B T] each: the noise alpha |xi|, and the product |w| |h| of the
      target's row and the hidden state.
    shared: of fourier and sphereface2 the bias, of vq log(how many tokens have a code), [K].
    """

    of_tokens: tuple[Array, ...] = ()
    shared: Array | None = None


def token_losses(
    output: OutputConfig,
    raw: Float[Array, "tokens R"],
    targets: Int[Array, " tokens"],
    extra: Extra,
    bins: int,
) -> Float[Array, " tokens"]:
    """The loss of each token, float32; NaN for a target that is none of what is chosen from.

    Args:
      output: its kind and numbers.
      raw: the products of hidden states with the output matrix; of sphereface2 cosines.
      targets: tokens; of vq their codes.
      extra: `of_tokens` as [tokens] each.
      bins: of fourier, the size of the vocabulary.
    """
    if output.kind == "sphereface2":
        assert extra.shared is not None
        return sphereface2_losses(output, raw, targets, extra.shared)
    if output.kind == "sparsemax":
        losses = optax.losses.multiclass_sparsemax_loss(raw, targets)
        is_known = (targets >= 0) & (targets < raw.shape[-1])
        return jnp.where(is_known, losses, jnp.nan)
    logits = raw
    added = jnp.float32(0.0)
    if output.kind == "stablemax":
        logits = log_stable(raw)
    if output.kind == "fourier":
        assert extra.shared is not None
        coefficients = raw + extra.shared
        logits = fourier_logits(coefficients, bins)
        if output.smoothness:
            added = output.smoothness * roughness(coefficients)
    target_logits = of_targets(logits, targets)
    if output.kind == "noisy_softmax":
        noise, norms = extra.of_tokens
        lowered = target_logits - noise * (norms - target_logits)
        is_target = targets[:, None] == jnp.arange(logits.shape[-1])
        logits = jnp.where(is_target, lowered[:, None], logits)
        target_logits = lowered
    if output.kind == "vq":
        assert extra.shared is not None
        logits = logits + extra.shared
    return jax.nn.logsumexp(logits, axis=-1) - target_logits + added


def of_targets(
    logits: Float[Array, "tokens X"],
    targets: Int[Array, " tokens"],
) -> Float[Array, " tokens"]:
    """The logit of each target; NaN for one outside of the vocabulary."""
    is_target = targets[:, None] == jnp.arange(logits.shape[-1])
    found = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.where(jnp.any(is_target, axis=-1), found, jnp.nan)


def sphereface2_losses(
    output: OutputConfig,
    cosines: Float[Array, "tokens X"],
    targets: Int[Array, " tokens"],
    bias: Float[Array, ""],
) -> Float[Array, " tokens"]:
    """SphereFace2-C (arXiv 2108.01513), with g(z) = 2 ((z + 1) / 2)^t - 1:

    lambda / r log(1 + exp(-r (g(cos_y) - m) - b))
      + (1 - lambda) / r sum_{i != y} log(1 + exp(r (g(cos_i) + m) + b)).

    Args:
      output: r, m, t and lambda.
      cosines: of every token's row with the hidden states.
      targets: the token to predict at each position.
      bias: b.
    """
    scale = output.cosine_scale
    # A cosine may be rounded to below -1.
    halved = jnp.maximum((cosines + 1.0) / 2.0, 1e-6)
    bent = 2.0 * halved**output.power - 1.0
    own = of_targets(bent, targets)
    of_target = jax.nn.softplus(-scale * (own - output.margin) - bias)
    is_other = targets[:, None] != jnp.arange(cosines.shape[-1])
    of_others = jax.nn.softplus(scale * (bent + output.margin) + bias)
    others = jnp.sum(jnp.where(is_other, of_others, 0.0), axis=-1)
    weight = output.positive_weight
    return (weight * of_target + (1.0 - weight) * others) / scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def output_loss(
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "R M"],
    extra: Extra,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    scale: Float[Array, ""],
    chunk: int,
    output: OutputConfig,
    bins: int,
) -> tuple[Float[Array, ""], TokenLosses]:
    """`scale x` the weighted sum of `token_losses`, and the sums, as `training_loss`.

    Args:
      hidden: the model's last hidden states.
      weights: the output matrix, cut over devices as it is stored; used in hidden's dtype.
      extra: what else the loss depends on, differentiated too.
      targets: the token, or the code, to predict at each position.
      mask: the weight of each token; what has none is not looked at.
      scale: what the loss is multiplied by.
      chunk: tokens whose products exist at once; 0 for all of them.
      output: the kind of output.
      bins: of fourier, the size of the vocabulary.
    """
    values, _ = _output_loss_forward(
        hidden,
        weights,
        extra,
        targets,
        mask,
        scale,
        chunk,
        output,
        bins,
    )
    return values


def _output_loss_forward(
    hidden: Array,
    weights: Array,
    extra: Extra,
    targets: Array,
    mask: Array,
    scale: Array,
    chunk: int,
    output: OutputConfig,
    bins: int,
):
    whole_weights = gathered(weights, hidden)
    groups = groups_of_rows(targets.shape[0])

    def of_chunk(piece: tuple[Array, ...]):
        hidden, targets, mask, *extra_rows = piece
        shape = hidden.shape
        mask = flat(mask).astype(jnp.float32)
        is_counted = mask != 0
        hidden = counted(flat(hidden), is_counted)
        raw = products(hidden, whole_weights)
        # Zeros where nothing is counted, or the gradient of what is shared would be 0 x NaN.
        target_ids = jnp.where(is_counted, flat(targets), 0)

        def losses(raw: Array, extra: Extra) -> Array:
            return token_losses(output, raw, target_ids, extra, bins)

        here = Extra(tuple(flat(x) for x in extra_rows), extra.shared)
        values, pullback = jax.vjp(losses, raw, here)
        values = jnp.where(is_counted, values, 0.0)
        draw, dextra = pullback(scale * mask)
        draw = jnp.where(is_counted[:, None], draw, 0.0).astype(hidden.dtype)
        dhidden, dweights = through_products(draw, hidden, whole_weights, groups)
        of_rows = tuple(jnp.where(is_counted, d, 0.0).reshape(shape[:2]) for d in dextra.of_tokens)
        total = TokenLosses(
            cross_entropy=jnp.sum(values * mask),
            z_loss=jnp.float32(0.0),
            count=jnp.sum(mask),
        )
        of_tokens = (dhidden.reshape(shape), of_rows)
        return (total, dextra.shared), of_tokens, by_group(dweights)

    pieces = (hidden, targets, mask, *extra.of_tokens)
    sums, of_tokens, dweights = over_chunks(of_chunk, pieces, chunk)
    losses, dshared = sums
    dhidden, dof_tokens = of_tokens
    dweights = added_up(dweights, hidden.dtype).astype(weights.dtype)
    values = (scale * losses.cross_entropy, losses)
    return values, (dhidden, dweights, Extra(dof_tokens, dshared))


def _output_loss_backward(
    chunk: int,
    output: OutputConfig,
    bins: int,
    gradients: tuple[Array, Array, Extra],
    cotangents: tuple[Array, TokenLosses],
):
    dloss, _ = cotangents

    def scaled(gradient: Array) -> Array:
        return (dloss * gradient.astype(jnp.float32)).astype(gradient.dtype)

    return *jax.tree.map(scaled, gradients), None, None, None


output_loss.defvjp(_output_loss_forward, _output_loss_backward)


def model_loss(
    model: ModelConfig,
    params: Any,
    hidden: Float[Array, "B T M"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    scale: Float[Array, ""],
    chunk: int,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], TokenLosses]:
    """`scale x` the training loss of the model's kind of output, summed over the batch.

    Args:
      model: the model's configuration.
      params: its parameters.
      hidden: its last hidden states.
      targets: the token to predict at each position.
      mask: the weight of each token.
      scale: what the loss is multiplied by.
      chunk: tokens whose logits exist at once; 0 for all of them.
      key: of the noise of noisy_softmax.

    Returns:
      The loss, and the sums of its tokens: `cross_entropy` is the kind's own loss.
    """
    weights = head_weights(params)
    output = model.output
    rest = (targets, mask, scale, chunk)
    if output.kind == "softmax":
        return training_loss(hidden, weights, *rest, model.z_loss)
    if output.kind == "spherical":
        loss, losses = spherical_loss(output, hidden, weights, targets, mask)
        return scale * loss, losses
    if output.kind in ("noisy_softmax", "sphereface2"):
        # Before norms are taken: what has no weight may be NaN.
        hidden = jnp.where((mask != 0)[..., None], hidden, 0)
    extra = Extra()
    if output.kind in ("fourier", "sphereface2"):
        extra = Extra(shared=params[HEAD_BIAS])
    if output.kind == "sphereface2":
        hidden = unit_rows(hidden)
        weights = unit_rows(weights)
    if output.kind == "noisy_softmax":
        assert key is not None, "noisy_softmax needs a key"
        extra = Extra(of_tokens=_noise(output.noise, hidden, weights, targets, key))
    if output.kind == "vq":
        codes = codes_of_tokens(params)
        extra = Extra(shared=log_counts(codes, output.codes))
        # A target outside of the vocabulary is one outside of the codes.
        targets = jnp.take(codes, targets, mode="fill", fill_value=output.codes)
        rest = (targets, mask, scale, chunk)
    return output_loss(hidden, weights, extra, *rest, output, model.vocab_size)


def log_counts(codes: Int[Array, " X"], count: int) -> Float[Array, " K"]:
    """The logarithm of how many tokens have each code; -1e30 for a code that none has."""
    tokens = jnp.zeros(count, jnp.float32).at[codes].add(1.0)
    return jnp.where(tokens > 0, jnp.log(jnp.maximum(tokens, 1.0)), -1e30)


def _noise(
    alpha: float,
    hidden: Float[Array, "B T M"],
    weights: Float[Array, "X M"],
    targets: Int[Array, "B T"],
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    """alpha |xi| and |w_y| |h| of each token (arXiv 1708.03769)."""
    noise = alpha * jnp.abs(jax.random.normal(key, targets.shape))
    row_norms = _norms(weights)
    norms = jnp.take(row_norms, targets, mode="clip") * _norms(hidden)
    return noise, norms


def _norms(x: Float[Array, "... M"]) -> Float[Array, "..."]:
    # Not 0, where a norm has no gradient.
    return jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1) + 1e-24)
