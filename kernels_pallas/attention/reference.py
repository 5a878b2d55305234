"""`attention` with its [T, T] logits: the readable truth that every fast path is tested against.

Heads are repeated, every query has its own copy of the keys that it sees, and autodiff keeps every
weight: slow and large, by intention. Computes in float32, or in float64 when an input is float64.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.inputs import (
    MASK_BLOCK,
    AttentionInputs,
    AttentionOptions,
    Outputs,
    StepInputs,
    StepOptions,
    statistics_dtype,
)
from kernels_pallas.attention.normalizers.reference import log_sum_exp, weights
from kernels_pallas.common.heads import repeat_heads
from kernels_pallas.common.padding import padded


def attention(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    first: Int[Array, ""] | int | None = None,
    distances: Int[Array, "B S"] | None = None,
) -> Outputs:
    """As `api.attention`, with every default filled in.

    Args:
      inputs: the arrays. The queries may be a part of the sequence; a block mask is of all of it.
      options: the static arguments.
      first: the position of the first query among the keys; 0 if None.
      distances: of keys in no order from a single query; None if positions tell them.

    Returns:
      y in v's dtype; with `return_lse` (y, lse).
    """
    T = inputs.q.shape[1]
    S = inputs.k.shape[1]
    # Query i [T, 1] against key j [1, S].
    i = jnp.arange(T)[:, None] + (0 if first is None else first)
    j = jnp.arange(S)[None, :]
    # [1, 1, T, S], or [B, 1, T, S] with segments, or [B, H, T, S] with a block mask.
    seen = jnp.ones((1, 1, T, S), bool)
    if options.causal:
        seen = seen & (j <= i)[None, None]
    if options.window is not None:
        # To both sides; `causal` hides the later ones.
        not_too_early = i - options.window < j
        not_too_late = j < i + options.window
        seen = seen & (not_too_early & not_too_late)[None, None]
    if inputs.segment_ids is not None:
        key_segments = inputs.segments_of_keys
        assert key_segments is not None
        same = inputs.segment_ids[:, :, None] == key_segments[:, None, :]
        seen = seen & same[:, None]
    if inputs.block_mask is not None:
        # Every pair looks its block up. Queries of padding, past the last block, see what it does.
        of_queries = jnp.take(inputs.block_mask, i[:, 0] // MASK_BLOCK, axis=2, mode="clip")
        seen = seen & jnp.take(of_queries, j[0] // MASK_BLOCK, axis=3)
    of_pairs = jnp.abs(i - j)[None] if distances is None else distances[:, None]
    return _attend(inputs, options, seen, of_pairs)


def attention_by_blocks(
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    first: Int[Array, ""] | int | None = None,
    distances: Int[Array, "B S"] | None = None,
    block: int = 16,
) -> Outputs:
    """`attention` of a few queries at a time, which autodiff computes again.

    Memory is linear in T, in derivatives of any order: those of the fast backends, from the second
    one on.

    Args:
      inputs, options, first, distances: as of `attention`.
      block: how many queries at a time.

    Returns:
      As `attention`.
    """
    T = inputs.q.shape[1]
    block = min(T, block)
    num_blocks = -(-T // block)

    def in_blocks(x: Array | None) -> Array | None:
        if x is None:
            return None
        # [B, T, ...] -> [N, B, block, ...]
        x = padded(x, 1, num_blocks * block)
        x = x.reshape(x.shape[0], num_blocks, block, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def attend(part: tuple) -> Outputs:
        q, gate_logits, segment_ids, number = part
        queries = inputs._replace(
            q=q,
            gate_logits=gate_logits,
            segment_ids=segment_ids,
            key_segment_ids=inputs.segments_of_keys,
        )
        return attention(
            queries,
            options,
            first=number * block + (0 if first is None else first),
            distances=distances,
        )

    parts = (
        in_blocks(inputs.q),
        in_blocks(inputs.gate_logits),
        in_blocks(inputs.segment_ids),
        jnp.arange(num_blocks),
    )
    result = jax.lax.map(attend, parts)

    def joined(y: Array) -> Float[Array, "B T H V"]:
        # [N, B, block, H, V] -> [B, T, H, V], without the padding.
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], num_blocks * block, *y.shape[3:])[:, :T]

    if not options.return_lse:
        return joined(result)
    y, lse = result
    # [N, B, H, block] -> [B, H, T]
    lse = joined(jnp.swapaxes(lse, 2, 3))
    return joined(y), jnp.swapaxes(lse, 1, 2)


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
        normalizer_parameters=inputs.normalizer_parameters,
    )
    # [B, 1, 1, S]
    seen = inputs.valid[:, None, None]
    distances = None if inputs.distances is None else inputs.distances[:, None]
    y = _attend(as_attention, options, seen, distances)
    assert isinstance(y, Array)
    return y[:, 0]


def _attend(
    inputs: AttentionInputs,
    options: AttentionOptions | StepOptions,
    seen: Bool[Array, "#B #H T S"],
    distances: Int[Array, "#B T S"] | None,
) -> Outputs:
    """T queries against S keys; `seen` says which keys a query may see."""
    dtype = statistics_dtype(inputs.q, inputs.k, inputs.v)
    num_heads = inputs.q.shape[2]
    # [B, T, 1, H, .] and [B, 1, S, H, .]
    q = inputs.q.astype(dtype)[:, :, None]
    k = repeat_heads(inputs.k, num_heads).astype(dtype)[:, None]
    v = repeat_heads(inputs.v, num_heads).astype(dtype)[:, None]
    # Every query has keys and values of its own here: zeros for those that it does not see. No
    # matrix product would do, because there 0 times NaN is NaN.
    pairs = jnp.moveaxis(seen, 1, -1)[..., None]
    k = jnp.where(pairs, k, 0)
    v = jnp.where(pairs, v, 0)

    # Logits [B, H, T, S].
    s = jnp.moveaxis(options.scale * jnp.sum(q * k, axis=-1), -1, 1)
    # An infinite query times a zero from above is NaN, whose gradients would come back.
    s = jnp.where(seen, s, 0)
    if options.logits_soft_cap is not None:
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    if inputs.alibi_slopes is not None:
        assert distances is not None, "api.py checks that slopes come with distances"
        # Slopes [1, H, 1, 1] times distances [B, 1, T, S].
        slopes = inputs.alibi_slopes.astype(dtype)[None, :, None, None]
        s = s - slopes * distances[:, None].astype(dtype)

    # The sink of a head [1, H, 1, 1].
    sink = None
    if inputs.sink_logits is not None:
        sink = inputs.sink_logits.astype(dtype)[None, :, None, None]
    # The same for each learned number of the normalizer.
    parameters = ()
    if inputs.normalizer_parameters is not None:
        by_head = inputs.normalizer_parameters.astype(dtype)
        parameters = tuple(x[None, :, None, None] for x in by_head)
    w = weights(options.normalizer, s, seen, sink, parameters)
    # [B, H, T, S] -> [B, T, S, H, 1]
    w = jnp.moveaxis(w, 1, -1)[..., None]
    o = jnp.sum(jnp.where(pairs, w * v, 0), axis=2)
    # The gate comes last, on the output of every head.
    if inputs.gate_logits is not None:
        o = o * jax.nn.sigmoid(inputs.gate_logits.astype(dtype))
    y = o.astype(inputs.v.dtype)
    if isinstance(options, AttentionOptions) and options.return_lse:
        return y, log_sum_exp(s, seen, sink)[..., 0]
    return y
