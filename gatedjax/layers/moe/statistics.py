"""What losses, bias rules and the log need of a sparse layer, of tokens only: padding is none."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.layers.moe.routing import Routing

# By block; {} for a block without routers. Arrays are stacked over the block's layers.
Statistics = Mapping[str, Mapping[str, Array]]


class Extent(NamedTuple):
    """How much a batch, or a part of it, holds; float32."""

    tokens: Float[Array, ""]
    rows: Float[Array, ""]  # that hold a token


def extent(segment_ids: Int[Array, "B T"]) -> Extent:
    """The extent of packed rows."""
    is_token = segment_ids != 0
    has_token = jnp.any(is_token, axis=1)
    return Extent(
        jnp.sum(is_token, dtype=jnp.float32),
        jnp.sum(has_token, dtype=jnp.float32),
    )


def as_part(
    statistics: Statistics,
    part: Extent,
    whole: Extent,
) -> Statistics:
    """The statistics of a micro-batch as its part of the whole step's: the parts add up to them.

    Args:
      statistics: of the part.
      part: its extent.
      whole: the extent of the step.
    """
    of_tokens = fraction(part.tokens, whole.tokens)
    of_rows = fraction(part.rows, whole.rows)
    scales = {
        "probability": of_tokens,
        "z_loss": of_tokens,
        "entropy": of_tokens,
        "sequence_loss": of_rows,
        "importance_loss": of_rows,
        "load_loss": of_rows,
    }
    # Counts are sums already.
    return {
        block: {name: x * scales.get(name, 1.0) for name, x in of_block.items()}
        for block, of_block in statistics.items()
    }


def fraction(part: Float[Array, "..."], whole: Float[Array, "..."]) -> Float[Array, "..."]:
    """part / whole, 0 of nothing; for any whole above 0, smaller than 1 too."""
    is_something = whole > 0
    return jnp.where(is_something, part / jnp.where(is_something, whole, 1.0), 0.0)


def loads(counts: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """The fraction of all assignments that each expert got; zeros where there are none."""
    return fraction(counts, jnp.sum(counts, axis=-1, keepdims=True))


def router_statistics(
    logits: Float[Array, "B T E"],
    routing: Routing,
    chosen: Float[Array, "B E"],
    dropped: Float[Array, ""],
    is_token: Bool[Array, "B T"] | None = None,
) -> dict[str, Array]:
    """The statistics of one layer, over the whole batch, float32.

    Under jit on a mesh every sum goes over all devices, so no device has statistics of its own.
    Means are over tokens, whatever they weigh in the loss, and 0 where there are none. A token
    whose logits are NaN makes them NaN: the step is then skipped (`training/guard.py`).

    Args:
      logits: of the router, before the temperature.
      routing: what it decided.
      chosen: how often each row chose each expert, before any limit.
      dropped: assignments that capacity or exchange dropped.
      is_token: False for padding; None where there is none.

    Returns:
      counts         [E]  assignments that the router made
      probability    [E]  mean router probability; differentiable
      sequence_loss  []   mean over rows with tokens of `E sum_i f_i P_i` within the row
      z_loss         []   mean of logsumexp(logits)^2
      entropy        []   mean entropy of a token's probabilities, nats
      dropped        []   as given
    """
    p = routing.router_probs
    num_experts = chosen.shape[-1]
    if is_token is None:
        is_token = jnp.ones(p.shape[:2], bool)
    tokens_by_row = jnp.sum(is_token, axis=1, dtype=jnp.float32)
    num_tokens = jnp.sum(tokens_by_row)
    # Sums over a row first: the sequence loss is about rows.
    p_by_row = jnp.sum(jnp.where(is_token[..., None], p, 0.0), axis=1)
    mean_by_row = fraction(p_by_row, tokens_by_row[:, None])
    balance_by_row = jnp.sum(jax.lax.stop_gradient(loads(chosen)) * mean_by_row, axis=-1)
    num_rows = jnp.sum(tokens_by_row > 0, dtype=jnp.float32)
    # Selected before anything is computed: no gradient comes out of padding.
    logits = jnp.where(is_token[..., None], logits.astype(jnp.float32), 0.0)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    # p log p is 0 for p = 0.
    negative_entropy = jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)

    def mean(of_token: Float[Array, "B T"]) -> Float[Array, ""]:
        return fraction(jnp.sum(jnp.where(is_token, of_token, 0.0)), num_tokens)

    return {
        "counts": jnp.sum(chosen, axis=0),
        "probability": fraction(jnp.sum(p_by_row, axis=0), num_tokens),
        "sequence_loss": num_experts * fraction(jnp.sum(balance_by_row), num_rows),
        "z_loss": mean(log_partition**2),
        "entropy": -mean(negative_entropy),
        "dropped": dropped,
    }
