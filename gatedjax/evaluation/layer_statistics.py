"""Numbers about one layer, from what it sowed or from its matrices: what `probes` puts together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.evaluation.attention_rows import entropy_of

# Of histograms of gates.
BINS = 40

# Channels of the residual stream that are told apart, and entries that stand for all of them where
# the median is taken.
MASSIVE_CHANNELS = 3
MEDIAN_SAMPLE = 1 << 16


def first_norm(
    x: Float[Array, "B T H D"],
    segment_ids: Int[Array | np.ndarray, "B T"],
) -> Float[Array, " H"]:
    """The mean norm at first tokens of documents over the mean norm at all others.

    Padding, segment 0, is left out.
    """
    ids = jnp.asarray(segment_ids)
    is_first = jnp.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
    is_real = ids > 0
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)

    def mean(is_counted: Bool[Array, "B T"]) -> Float[Array, " H"]:
        total = jnp.sum(norms * is_counted[..., None], axis=(0, 1))
        return total / jnp.maximum(jnp.sum(is_counted), 1)

    return mean(is_real & is_first) / jnp.maximum(mean(is_real & ~is_first), 1e-30)


def max_activation(
    x: Float[Array, "B T M"],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> Float[Array, ""]:
    """The largest magnitude at real tokens."""
    magnitudes = jnp.abs(x.astype(jnp.float32))
    return jnp.max(jnp.where(is_real[..., None], magnitudes, 0.0))


def massive_channels(
    x: Float[Array, "B T M"],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> dict[str, Array]:
    """The channels with the largest magnitudes at real tokens, which they are, and the median.

    The median is that of entries at even distances: all of them would have to be sorted.
    """
    magnitudes = jnp.abs(x.astype(jnp.float32))
    of_channels = jnp.max(jnp.where(is_real[..., None], magnitudes, 0.0), axis=(0, 1))
    largest, channels = jax.lax.top_k(of_channels, min(MASSIVE_CHANNELS, x.shape[-1]))
    entries = jnp.where(is_real[..., None], magnitudes, jnp.nan).reshape(-1)
    # Odd, so that a width that is a power of two does not leave out channels.
    step = entries.size // MEDIAN_SAMPLE * 2 + 1
    return {
        "massive_channels": largest,
        "massive_channel_ids": channels,
        "median_activation": jnp.nanmedian(entries[::step]),
    }


def kurtosis(
    x: Float[Array, "B T M"],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> Float[Array, ""]:
    """Fourth central moment over the squared second, over all entries at real tokens.

    Pearson's: 3 for a normal distribution.
    """
    count = jnp.sum(is_real) * x.shape[-1]

    def mean(y: Float[Array, "B T M"]) -> Float[Array, ""]:
        real = jnp.where(is_real[..., None], y, 0.0)
        return jnp.sum(real) / count

    x = x.astype(jnp.float32)
    centered = x - mean(x)
    variance = mean(centered**2)
    return mean(centered**4) / variance**2


def effective_rank(
    value: Float[Array, "M Hk D"],
    out: Float[Array, "H D M"],
) -> Float[Array, " H"]:
    """exp(entropy of normalized singular values) of W_V W_O, head by head; at most D."""
    groups = out.shape[0] // value.shape[1]
    by_key_head = jnp.moveaxis(value, 1, 0)
    values = jnp.repeat(by_key_head, groups, axis=0)  # [H, M, D]
    out_transposed = jnp.swapaxes(out, 1, 2)  # [H, M, D]
    # With W_V = Q R and W_O^T = Q' R', the singular values of W_V W_O are those of R R'^T, D x D.
    r_value = jnp.linalg.qr(values, mode="r")
    r_out = jnp.linalg.qr(out_transposed, mode="r")
    small = r_value @ jnp.swapaxes(r_out, 1, 2)
    singular_values = jnp.linalg.svd(small, compute_uv=False)
    total = jnp.sum(singular_values, axis=-1, keepdims=True)
    return jnp.exp(entropy_of(singular_values / total))


def gate_statistics(
    gates: Float[Array, "#B #T ..."],
    is_real: Bool[Array | np.ndarray, "B T"],
) -> dict[str, Array]:
    """Mean and histogram of the gates at real tokens, with the histogram's edges."""
    of_token = is_real.reshape(*is_real.shape, *[1] * (gates.ndim - 2))
    # Gates that do not depend on the token have one of their own: every token counts it.
    shape = jnp.broadcast_shapes(gates.shape, of_token.shape)
    gates = jnp.broadcast_to(gates, shape)
    is_counted = jnp.broadcast_to(of_token, shape)
    count = jnp.maximum(jnp.sum(is_counted), 1)
    lowest = jnp.min(jnp.where(is_counted, gates, jnp.inf))
    highest = jnp.max(jnp.where(is_counted, gates, -jnp.inf))
    counts, edges = jnp.histogram(
        jnp.where(is_counted, gates, lowest),
        BINS,
        range=(lowest, highest),
        weights=is_counted,
    )
    return {
        "gate_mean": jnp.sum(jnp.where(is_counted, gates, 0.0)) / count,
        "gate_histogram": counts / count,
        "gate_edges": edges,
    }


def half_life(
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | Float[Array, " H"],
    is_real: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Float[Array, " channels"]:
    """log 2 over the mean of -log_decay, in tokens, for every channel that decays by itself.

    The mean is over real tokens; all are, without `is_real`.
    """
    mean = log_decay.astype(jnp.float32)
    if mean.ndim > 1:
        if is_real is None:
            is_real = jnp.ones(mean.shape[:2], bool)
        of_token = is_real.reshape(*is_real.shape, *[1] * (mean.ndim - 2))
        total = jnp.sum(jnp.where(of_token, mean, 0.0), axis=(0, 1))
        mean = (total / jnp.maximum(jnp.sum(is_real), 1)).reshape(-1)
    return math.log(2.0) / jnp.maximum(-mean, 1e-12)
