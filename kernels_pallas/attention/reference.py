"""`attention` with its [T, T] logits: the readable truth that every fast path is tested against.

Heads are repeated and autodiff keeps every weight: slow and large, by intention. Computes in
float32, or in float64 when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.inputs import (
    AttentionInputs,
    AttentionOptions,
    StepInputs,
    StepOptions,
)
from kernels_pallas.attention.normalizers.reference import weights


def attention(inputs: AttentionInputs, options: AttentionOptions) -> Float[Array, "B T H V"]:
    """As `api.attention`, with every default filled in."""
    T = inputs.q.shape[1]
    # Query i [T, 1] against key j [1, T].
    i = jnp.arange(T)[:, None]
    j = jnp.arange(T)[None, :]
    # [1, T, T], or [B, T, T] with segments.
    seen = jnp.ones((1, T, T), bool)
    if options.causal:
        seen = seen & (j <= i)
    if options.window is not None:
        # To both sides; `causal` hides the later ones.
        not_too_early = i - options.window < j
        not_too_late = j < i + options.window
        seen = seen & not_too_early & not_too_late
    if inputs.segment_ids is not None:
        query_segments = inputs.segment_ids[:, :, None]
        key_segments = inputs.segment_ids[:, None, :]
        seen = seen & (query_segments == key_segments)
    distances = jnp.abs(i - j)[None]
    return _attend(inputs, options, seen, distances)


def attention_step(inputs: StepInputs, options: StepOptions) -> Float[Array, "B H V"]:
    """As `api.attention_step`, with every default filled in: `attention` of a single query."""
    gate_logits = inputs.gate_logits
    # T = 1 query against S = slots keys.
    as_attention = AttentionInputs(
        q=inputs.q[:, None],
        k=inputs.k_cache,
        v=inputs.v_cache,
        gate_logits=None if gate_logits is None else gate_logits[:, None],
        sink_logits=inputs.sink_logits,
        alibi_slopes=inputs.alibi_slopes,
    )
    # [B, 1, S]
    seen = inputs.valid[:, None]
    distances = None if inputs.distances is None else inputs.distances[:, None]
    return _attend(as_attention, options, seen, distances)[:, 0]


def _attend(
    inputs: AttentionInputs,
    options: AttentionOptions | StepOptions,
    seen: Bool[Array, "#B T S"],
    distances: Int[Array, "#B T S"] | None,
) -> Float[Array, "B T H V"]:
    """T queries against S keys; `seen` says which keys a query may see."""
    input_dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    dtype = jnp.promote_types(jnp.float32, input_dtype)
    num_heads = inputs.q.shape[2]
    q = inputs.q.astype(dtype)
    k = _repeat_heads(inputs.k, num_heads).astype(dtype)
    v = _repeat_heads(inputs.v, num_heads).astype(dtype)

    # Logits [B, H, T, S].
    s = options.scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
    if options.logits_soft_cap is not None:
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    if inputs.alibi_slopes is not None:
        assert distances is not None, "api.py checks that slopes come with distances"
        # Slopes [H, 1, 1] times distances [B, 1, T, S].
        slopes = inputs.alibi_slopes.astype(dtype)[:, None, None]
        s = s - slopes * distances[:, None].astype(dtype)

    # The sink of a head [H, 1, 1].
    sink = None
    if inputs.sink_logits is not None:
        sink = inputs.sink_logits.astype(dtype)[:, None, None]
    w = weights(options.normalizer, s, seen[:, None], sink)
    o = jnp.einsum("bhts,bshv->bthv", w, v, precision="highest")
    # The gate comes last, on the output of every head.
    if inputs.gate_logits is not None:
        o = o * jax.nn.sigmoid(inputs.gate_logits.astype(dtype))
    return o.astype(inputs.v.dtype)


def _repeat_heads(x: Float[Array, "B S Hk D"], num_heads: int) -> Float[Array, "B S H D"]:
    # Query head h uses key head h // (H / Hk).
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)
