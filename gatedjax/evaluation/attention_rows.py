"""Where attention goes: to the first token of a document, and over how many tokens.

No array of T x T exists: queries are taken in blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from kernels_pallas.attention import NORMALIZERS, Normalizer
from kernels_pallas.attention.normalizers.reference import weights

# Queries whose logits exist at once.
QUERY_BLOCK = 128


class _QueryBlock(NamedTuple):
    """Queries whose logits are computed together: blocks of their rows of a batch."""

    q: Float[Array, "B block H D"]
    segment_ids: Int[Array, "B block"]
    times: Int[Array, "B block"]
    is_first: Bool[Array, "B block"]
    is_counted: Bool[Array, "B block"]


class _KeysAndOptions(NamedTuple):
    """What all blocks of queries share."""

    k: Float[Array, "B T Hk D"]
    segment_ids: Int[Array, "B T"]
    is_first: Bool[Array, "B T"]
    sink_logits: Float[Array, " H"] | None
    alibi_slopes: Float[Array, " H"] | None
    normalizer: Normalizer
    window: int | None
    logits_soft_cap: float | None
    scale: float
    normalizer_parameters: Float[Array, "P H"] | None


def attention_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    segment_ids: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    *,
    normalizer: Normalizer = NORMALIZERS["softmax"],
    window: int | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    sink_logits: Float[Array, " H"] | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    normalizer_parameters: Float[Array, "P H"] | None = None,
    counted: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, " H"], Float[Array, " T"]]:
    """Where attention goes: to the first token of the document, and over how many tokens.

    Of the magnitudes of the weights on tokens, over their sum: a sink's part counts for nothing,
    and normalizers that do not sum to 1, or have weights below 0, can be compared.

    Args:
      q, k: as the op gets them, after norm and rotation.
      segment_ids: 0 is padding, which is left out.
      positions: in the document.
      normalizer, window, logits_soft_cap, scale, sink_logits, alibi_slopes, normalizer_parameters:
        as of `kernels_pallas.attention`.
      counted: the queries that the fraction is a mean over; None for all.

    Returns:
      For each head the fraction of attention that goes to the first token, a mean over all tokens
      that are counted and not first themselves; and by position the entropy in nats, a mean over
      rows and heads, NaN at positions that no token has.
    """
    B, T = segment_ids.shape
    segment_ids = jnp.asarray(segment_ids)
    # A document begins where the id differs from the one before.
    changes = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1)
    is_first = changes != 0
    shared = _KeysAndOptions(
        k=k.astype(jnp.float32),
        segment_ids=segment_ids,
        is_first=is_first,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        normalizer=normalizer.for_length(T),
        window=window,
        logits_soft_cap=logits_soft_cap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        normalizer_parameters=normalizer_parameters,
    )
    is_counted = (segment_ids > 0) & ~is_first
    if counted is not None:
        is_counted = is_counted & counted
    times = jnp.broadcast_to(jnp.arange(T), (B, T))
    queries = _QueryBlock(
        q=_in_blocks(q),
        segment_ids=_in_blocks(segment_ids),
        times=_in_blocks(times),
        is_first=_in_blocks(is_first),
        is_counted=_in_blocks(is_counted),
    )
    block_rows = functools.partial(_block_rows, shared)
    fractions, entropies = jax.lax.map(block_rows, queries)
    # [blocks, B, block] -> [B, T]
    entropy = jnp.moveaxis(entropies, 0, 1).reshape(B, -1)[:, :T]
    is_real = (segment_ids > 0).astype(jnp.float32)
    fraction = jnp.sum(fractions, axis=0) / jnp.maximum(jnp.sum(is_counted), 1)
    return fraction, _mean_by_position(entropy, is_real, jnp.asarray(positions))


def _in_blocks(x: Shaped[Array, "B T *channels"]) -> Shaped[Array, "blocks B block *channels"]:
    """Blocks of QUERY_BLOCK along T as the first axis; zeros, which are padding, fill the last."""
    B, T = x.shape[:2]
    blocks = -(-T // QUERY_BLOCK)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, blocks * QUERY_BLOCK - T)
    padded = jnp.pad(x, widths)
    cut = padded.reshape(B, blocks, QUERY_BLOCK, *x.shape[2:])
    return jnp.moveaxis(cut, 1, 0)


def _block_rows(
    shared: _KeysAndOptions,
    queries: _QueryBlock,
) -> tuple[Float[Array, " H"], Float[Array, "B block"]]:
    """For the queries of a block: weights on first tokens, summed; mean entropies over heads."""
    logits, is_seen = _block_logits(shared, queries)
    sinks = _by_head(shared.sink_logits)
    parameters = []
    if shared.normalizer_parameters is not None:
        parameters = list(shared.normalizer_parameters[:, :, None, None])
    p = weights(shared.normalizer, logits, is_seen, sinks, parameters)  # [B, H, block, T]
    if shared.normalizer.has_negative_weights:
        p = jnp.abs(p)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.maximum(total, 1e-30)
    # Of all first tokens of the row, a query sees that of its own document only.
    is_first_key = shared.is_first[:, None, None, :]
    p_of_first = jnp.where(is_first_key, p, 0.0)
    on_first = jnp.sum(p_of_first, axis=-1)  # [B, H, block]
    counted = on_first * queries.is_counted[:, None, :]
    entropy = jnp.mean(entropy_of(p), axis=1)
    return jnp.sum(counted, axis=(0, 2)), entropy


def _block_logits(
    shared: _KeysAndOptions,
    queries: _QueryBlock,
) -> tuple[Float[Array, "B H block T"], Bool[Array, "B 1 block T"]]:
    """The logits of a block's queries with all keys, and the mask of what each query sees."""
    B, T, key_heads, _ = shared.k.shape
    block, heads, channels = queries.q.shape[1:]
    # Query heads h and their key head h // (H / Hk), as two axes.
    q = queries.q.astype(jnp.float32)
    q = q.reshape(B, block, key_heads, -1, channels)
    products = jnp.einsum(
        "bqhgd,bkhd->bhgqk",
        q,
        shared.k,
        precision="highest",
    )
    logits = shared.scale * products
    logits = logits.reshape(B, heads, block, T)
    cap = shared.logits_soft_cap
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    # How many tokens a key lies before the query; below 0 it lies after it.
    distance = queries.times[:, None, :, None] - jnp.arange(T)
    slopes = _by_head(shared.alibi_slopes)
    if slopes is not None:
        logits = logits - slopes * jnp.abs(distance)
    query_ids = queries.segment_ids[:, None, :, None]
    key_ids = shared.segment_ids[:, None, None, :]
    is_seen = (distance >= 0) & (query_ids == key_ids)
    if shared.window is not None:
        is_seen = is_seen & (distance < shared.window)
    return logits, is_seen


def _by_head(x: Float[Array, " H"] | None) -> Float[Array, "H 1 1"] | None:
    """One number a head, beside logits [B, H, block, T]."""
    return None if x is None else x.astype(jnp.float32)[:, None, None]


def _mean_by_position(
    x: Float[Array, "B T"],
    is_real: Float[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, " T"]:
    """The mean of x over tokens at the same position; NaN where there is none."""

    def sum_by_position(y: Float[Array, "B T"]) -> Float[Array, " T"]:
        zeros = jnp.zeros(y.shape[1], jnp.float32)
        at = zeros.at[positions.reshape(-1)]
        return at.add(y.reshape(-1))

    count = sum_by_position(is_real)
    total = sum_by_position(x * is_real)
    mean = total / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, mean, jnp.nan)


def entropy_of(p: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """-sum p log p in nats, where 0 log 0 is 0."""
    is_positive = p > 0
    # A zero inside the log would make the gradient, and the product, NaN.
    log_p = jnp.log(jnp.where(is_positive, p, 1.0))
    terms = jnp.where(is_positive, p * log_p, 0.0)
    return -jnp.sum(terms, axis=-1)
