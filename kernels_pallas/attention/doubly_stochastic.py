"""Attention whose weights sum to 1 over keys and over queries: Sinkhorn's, and one by QR.

A column's sum is over queries that come later, so neither is causal; both keep the [T, T] weights.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.inputs import statistics_dtype
from kernels_pallas.common.checks import check_bool, check_shape, default_scale
from kernels_pallas.common.heads import repeat_heads

# Normalizers that there are not, and what is there in their place.
NOT_CAUSAL = {
    "sinkhorn": "sinkhorn_attention",
    "qr": "qr_attention",
}


def sinkhorn_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    *,
    iterations: int = 3,
    epsilon: float = 1.0,
    is_token: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Doubly stochastic attention by Sinkhorn's iteration (Sinkformers, arXiv 2110.11773).

        W = exp(s / epsilon), whose rows and columns are divided by their sums, by turns

    In the log domain: potentials of rows and columns, and no logit overflows. One iteration is
    softmax; odd numbers end on the rows, which then sum to 1, and many make the columns do so too.
    Differentiable through all iterations; memory grows with them.

    Args:
      q, k, v: queries, keys and values of the same tokens; Hk divides H.
      iterations: how often rows or columns are divided; the first time rows.
      epsilon: the temperature, above 0.
      is_token: False for padding, which is in no row and no column, and gives zeros; None where
        there is none.
      segment_ids: documents of a row, 0 for padding: each has weights of its own.
      scale: of the logits; K**-0.5 if None.

    Returns:
      y in v's dtype.

    Raises:
      ValueError: a shape or a number that does not fit, by name.
    """
    op = "sinkhorn_attention"
    _check_arrays(op, q, k, v)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{op}: iterations: got {iterations!r}, expected an integer from 1 on")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"{op}: epsilon: got {epsilon}, expected a number above 0")
    if is_token is not None:
        check_shape(op, "is_token", is_token, q.shape[:2])
        check_bool(op, "is_token", is_token)
    pairs = _pairs(op, q, is_token, segment_ids)
    if pairs is not None:
        q, k, v = _without_padding(pairs, q, k, v)
    s = _logits(q, k, scale) / epsilon
    weights = jnp.exp(sinkhorn_log_weights(s, pairs, iterations))
    if pairs is not None:
        weights = jnp.where(pairs, weights, 0)
    return _weighted(weights, v, q.shape[2])


def _pairs(
    op: str,
    q: Array,
    is_token: Array | None,
    segment_ids: Array | None,
) -> Bool[Array, "B 1 T T"] | None:
    """Which tokens see which: both are tokens of one document. None where all do."""
    if segment_ids is None:
        if is_token is None:
            return None
        segment_ids = is_token.astype(jnp.int32)
    check_shape(op, "segment_ids", segment_ids, q.shape[:2])
    is_seen = segment_ids != 0
    if is_token is not None:
        is_seen = is_seen & is_token
    is_same = segment_ids[:, :, None] == segment_ids[:, None, :]
    pairs = is_same & is_seen[:, :, None] & is_seen[:, None, :]
    return pairs[:, None]


def _without_padding(pairs: Bool[Array, "B 1 T T"], *arrays: Array) -> tuple[Array, ...]:
    """Zeros for tokens that do not see themselves: selected out, as 0 times NaN is NaN."""
    is_token = jnp.diagonal(pairs[:, 0], axis1=1, axis2=2)[:, :, None, None]
    return tuple(jnp.where(is_token, x, 0) for x in arrays)


def sinkhorn_log_weights(
    s: Float[Array, "*batch T S"],
    seen: Bool[Array, "..."] | None,
    iterations: int,
) -> Float[Array, "*batch T S"]:
    """The logarithm of the weights; of pairs that are not seen, nothing that has a meaning.

    Args:
      s: logits over epsilon.
      seen: which pairs there are; None for all. Broadcasts against `s`.
      iterations: as of `sinkhorn_attention`.
    """
    # Logarithms of what rows and columns are multiplied by.
    row = jnp.zeros_like(s[..., :1])
    column = jnp.zeros_like(s[..., :1, :])
    for i in range(iterations):
        if i % 2 == 0:
            # With these, every row sums to 1, and the columns no longer do.
            row = -_log_sum_exp(s + column, seen, axis=-1)
        else:
            column = -_log_sum_exp(s + row, seen, axis=-2)
    return s + row + column


def _log_sum_exp(x: Array, seen: Array | None, axis: int) -> Array:
    """Over what is seen; 0 where that is nothing, and with no gradient there."""
    if seen is None:
        return jax.nn.logsumexp(x, axis=axis, keepdims=True)
    is_any = jnp.any(seen, axis=axis, keepdims=True)
    # A row of nothing counts as one of zeros, so that no -inf has a gradient.
    hidden = jnp.where(is_any, -jnp.inf, 0)
    total = jax.nn.logsumexp(jnp.where(seen, x, hidden), axis=axis, keepdims=True)
    return jnp.where(is_any, total, 0)


def qr_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    *,
    noise: Float[Array, "B H T T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Doubly stochastic attention from an orthogonal matrix (arXiv 2504.16275).

        scale q k^T = U R,   W = U * U element by element

    Rows and columns of U have length 1, so those of W sum to 1. The derivative needs logits of full
    rank, which T > K tokens never have: the paper adds small noise, N(0, 1e-7), to those. That
    makes it defined, not tame: it holds 1 / R.

    Args:
      q, k, v: queries, keys and values of the same tokens; Hk divides H.
      noise: added to the logits; None for none.
      segment_ids: documents of a row, 0 for padding: each has weights of its own.
      scale: of the logits; K**-0.5 if None.

    Returns:
      y in v's dtype.

    Raises:
      ValueError: a shape that does not fit, by name.
    """
    op = "qr_attention"
    _check_arrays(op, q, k, v)
    pairs = _pairs(op, q, None, segment_ids)
    if pairs is not None:
        q, k, v = _without_padding(pairs, q, k, v)
    s = _logits(q, k, scale)
    if noise is not None:
        check_shape(op, "noise", noise, s.shape)
        s = s + noise.astype(s.dtype)
    if pairs is not None:
        # Blocks of documents, and ones on the diagonal of padding: reflections stay within them.
        is_padding = jnp.eye(s.shape[-1], dtype=bool) & ~pairs
        s = jnp.where(pairs, s, is_padding.astype(s.dtype))
    # Of a square matrix of any rank: Householder's U is orthogonal all the same.
    orthogonal, _ = jnp.linalg.qr(s)
    weights = orthogonal * orthogonal
    if pairs is not None:
        weights = jnp.where(pairs, weights, 0)
    return _weighted(weights, v, q.shape[2])


def _check_arrays(
    op: str,
    q: Array,
    k: Array,
    v: Array,
) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"{op}: q: got shape {q.shape}, expected [B, T, H, K] with no empty axis")
    B, T, H, K = q.shape
    if k.ndim != 4 or k.shape[:2] != (B, T) or k.shape[3] != K or H % max(k.shape[2], 1):
        expected = f"[{B}, {T}, a divisor of {H}, {K}]"
        raise ValueError(f"{op}: k: got shape {k.shape}, expected {expected}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        expected = f"[{B}, {T}, {k.shape[2]}, V]"
        raise ValueError(f"{op}: v: got shape {v.shape}, expected {expected}")


def _logits(
    q: Array,
    k: Array,
    scale: float | None,
) -> Float[Array, "B H T T"]:
    """scale q k^T, in float32 or float64."""
    dtype = statistics_dtype(q, k)
    keys = repeat_heads(k, q.shape[2]).astype(dtype)
    products = jnp.einsum("bthk,bshk->bhts", q.astype(dtype), keys, precision="highest")
    return default_scale(scale, q.shape[-1]) * products


def _weighted(
    weights: Float[Array, "B H T T"],
    v: Array,
    num_heads: int,
) -> Array:
    values = repeat_heads(v, num_heads).astype(weights.dtype)
    y = jnp.einsum("bhts,bshv->bthv", weights, values, precision="highest")
    return y.astype(v.dtype)
