"""`attention` with its [T, T] logits: the readable truth that every fast path is tested against.

Heads are repeated and autodiff keeps every weight: slow and large, by intention. Computes in float32, or in float64
when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.attention.normalizers.reference import weights


def attention(
    q,
    k,
    v,
    gate_logits,
    sink_logits,
    alibi_slopes,
    segment_ids,
    *,
    normalizer: Normalizer,
    causal: bool,
    window: int | None,
    logits_soft_cap: float | None,
    scale: float,
) -> Array:
    """As `api.attention`, with every default filled in."""
    T = q.shape[1]
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    seen = jnp.ones((1, T, T), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (i - window < j) & (j < i + window)
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return _attend(
        q,
        k,
        v,
        gate_logits,
        sink_logits,
        alibi_slopes,
        seen,
        jnp.abs(i - j)[None],
        normalizer,
        logits_soft_cap,
        scale,
    )


def attention_step(
    q,
    k_cache,
    v_cache,
    gate_logits,
    sink_logits,
    alibi_slopes,
    valid,
    distances,
    *,
    normalizer: Normalizer,
    logits_soft_cap: float | None,
    scale: float,
) -> Array:
    """As `api.attention_step`, with every default filled in."""
    gate_logits, distances = (
        None if gate_logits is None else gate_logits[:, None],
        None if distances is None else distances[:, None],
    )
    arrays = (
        q[:, None],
        k_cache,
        v_cache,
        gate_logits,
        sink_logits,
        alibi_slopes,
        valid[:, None],
        distances,
    )
    return _attend(*arrays, normalizer, logits_soft_cap, scale)[:, 0]


def _attend(
    q,
    k,
    v,
    gate_logits,
    sink_logits,
    alibi_slopes,
    seen,
    distances,
    normalizer,
    logits_soft_cap,
    scale,
) -> Array:
    """T queries against S keys; `seen` and `distances` [B or 1, T, S]."""
    out_dtype, dtype, H = v.dtype, _compute_dtype(q, k, v), q.shape[2]
    q, k, v = q.astype(dtype), _repeat_heads(k, H).astype(dtype), _repeat_heads(v, H).astype(dtype)
    by_head = lambda x: None if x is None else x.astype(dtype)[:, None, None]
    s = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    if alibi_slopes is not None:
        s = s - by_head(alibi_slopes) * distances[:, None].astype(dtype)
    o = jnp.einsum(
        "bhts,bshv->bthv",
        weights(normalizer, s, seen[:, None], by_head(sink_logits)),
        v,
        precision="highest",
    )
    return _gated(o, gate_logits).astype(out_dtype)


def _gated(o: Array, gate_logits: Array | None) -> Array:
    return o if gate_logits is None else o * jax.nn.sigmoid(gate_logits.astype(o.dtype))


def _compute_dtype(*inputs: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, jnp.result_type(*inputs))


def _repeat_heads(x: Array, num_heads: int) -> Array:
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)
