"""What losses, bias rules and the log need of a sparse layer."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.moe.routing import Routing

# By block of the period; {} for a block without routers. Arrays are stacked over periods.
Statistics = Mapping[str, Mapping[str, Array]]


def router_statistics(
    logits: Float[Array, "B T E"],
    routing: Routing,
    chosen: Float[Array, "B E"],
    dropped: Float[Array, ""],
) -> dict[str, Array]:
    """The statistics of one layer, over the whole batch, float32.

    Under jit on a mesh every sum goes over all devices, so no device has statistics of its own.

    Args:
      logits: of the router, before the temperature.
      routing: what it decided.
      chosen: how often each row chose each expert, before any limit.
      dropped: assignments that capacity or exchange dropped.

    Returns:
      counts         [E]  assignments that the router made
      probability    [E]  mean router probability; differentiable
      sequence_loss  []   mean over rows of `E sum_i f_i P_i` within the row
      z_loss         []   mean of logsumexp(logits)^2
      entropy        []   mean entropy of a token's probabilities, nats
      dropped        []   as given
    """
    p = routing.router_probs
    num_experts = chosen.shape[-1]
    # Means over a row first: the sequence loss is about rows.
    probability_by_row = jnp.mean(p, axis=1)
    assignments_by_row = jnp.sum(chosen, axis=-1, keepdims=True)
    load_by_row = jax.lax.stop_gradient(chosen / jnp.maximum(assignments_by_row, 1.0))
    balance_by_row = jnp.sum(load_by_row * probability_by_row, axis=-1)
    log_partition = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    # p log p is 0 for p = 0.
    negative_entropy = jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
    return {
        "counts": jnp.sum(chosen, axis=0),
        "probability": jnp.mean(probability_by_row, axis=0),
        "sequence_loss": num_experts * jnp.mean(balance_by_row),
        "z_loss": jnp.mean(log_partition**2),
        "entropy": -jnp.mean(negative_entropy),
        "dropped": dropped,
    }
