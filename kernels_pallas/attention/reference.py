"""`attention` with its [T, T] scores: the readable truth that every fast path is tested against.

Heads are repeated and autodiff keeps every weight: slow and large, by intention. Computes in float32, or in float64
when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array


def attention(
    q, k, v, gate, sink_logits, segment_ids,
    *, score: str, causal: bool, window: int | None, soft_cap: float | None, scale: float,
) -> Array:  # fmt: skip
    """As `api.attention`, with every default filled in. "softmax" is the one score so far."""
    out_dtype, dtype, H, T = v.dtype, _compute_dtype(q, k, v), q.shape[2], q.shape[1]
    q, k, v = q.astype(dtype), _repeat_heads(k, H).astype(dtype), _repeat_heads(v, H).astype(dtype)
    s = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    i, j = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    seen = jnp.ones((1, 1, T, T), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= (i - window < j) & (j < i + window)
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    o = jnp.einsum("bhts,bshv->bthv", _softmax(s, seen, sink_logits, soft_cap), v, precision="highest")
    return _gated(o, gate).astype(out_dtype)


def attention_step(q, k_cache, v_cache, gate, sink_logits, valid, *, soft_cap: float | None, scale: float) -> Array:
    """As `api.attention_step`, with every default filled in."""
    out_dtype, dtype, H = v_cache.dtype, _compute_dtype(q, k_cache, v_cache), q.shape[1]
    q, k, v = q.astype(dtype), _repeat_heads(k_cache, H).astype(dtype), _repeat_heads(v_cache, H).astype(dtype)
    s = scale * jnp.einsum("bhk,bshk->bhs", q, k, precision="highest")[:, :, None]
    weights = _softmax(s, valid[:, None, None], sink_logits, soft_cap)[:, :, 0]
    o = jnp.einsum("bhs,bshv->bhv", weights, v, precision="highest")
    return _gated(o, gate).astype(out_dtype)


def _softmax(s: Array, seen: Array, sink_logits: Array | None, soft_cap: float | None) -> Array:
    """Weights [B, H, T, S] of the logits s. A row that sees no key and has no sink gets zeros."""
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    least = jnp.finfo(s.dtype).min
    m = jnp.max(jnp.where(seen, s, least), axis=-1, keepdims=True)
    sink = None if sink_logits is None else sink_logits.astype(s.dtype)[:, None, None]
    if sink is not None:
        m = jnp.maximum(m, sink)
    m = jax.lax.stop_gradient(m)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - m, 0)), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - m)
    return p / jnp.where(total == 0, 1, total)


def _gated(o: Array, gate: Array | None) -> Array:
    return o if gate is None else o * jax.nn.sigmoid(gate.astype(o.dtype))


def _compute_dtype(*inputs: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, jnp.result_type(*inputs))


def _repeat_heads(x: Array, num_heads: int) -> Array:
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)
