"""A limit to what an expert takes of a row; what is over is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config.moe import SparseMoEConfig
from gatedjax.layers.moe.routing import Routing


def capacities(config: SparseMoEConfig, tokens: int) -> Int[np.ndarray, " E"]:
    """How many assignments each expert takes from a row: ceil(k T capacity_factor w_i / sum w).

    w is 1 for experts that cost nothing and tau (`zero_computation_weight`) for those that compute
    (MoE++, eq. 8, which leaves out the factor k and so has capacity for one assignment a token).
    """
    free = config.total_experts - config.num_experts
    weight = np.array([config.zero_computation_weight] * config.num_experts + [1.0] * free)
    assignments = config.experts_per_token * tokens * config.capacity_factor
    exact = assignments * weight / weight.sum()
    # 3.0000000001 is 3.
    return np.ceil(exact - 1e-9).astype(np.int32)


def limit_capacity(
    routing: Routing,
    capacity: Int[Array, " E"] | Int[np.ndarray, " E"],
    order: str,
) -> Routing:
    """Empties the places of a row [T, k] beyond each expert's `capacity`.

    What is dropped is what `count_places` then misses.

    Args:
      routing: of whole rows.
      capacity: the most places of a row that each expert takes.
      order: who comes first. "position": earlier tokens (causal). "choice": all first choices
        before any second (V-MoE, GShard). "priority": tokens by their largest weight (batch
        prioritized routing, arXiv 2106.05974).

    Returns:
      The routing without what was dropped.
    """
    experts, weights, router_probs = routing
    num_places = experts.shape[-2] * experts.shape[-1]
    rank = _ranks(weights, order)
    flat = experts.reshape(rank.shape)
    # Sort the places of a row by expert and, within an expert, by rank; remember where each was.
    index = jnp.broadcast_to(jnp.arange(num_places), rank.shape)
    ids, _, index = jax.lax.sort((flat, rank, index), num_keys=2)
    # A run of one expert's places begins where its id first appears.
    rows = ids.reshape(-1, num_places)
    start = jax.vmap(jnp.searchsorted)(rows, rows).reshape(ids.shape)
    # The empty place has an id past the last expert, and capacity for nobody.
    capacity_of_id = jnp.append(jnp.asarray(capacity), 0)[ids]
    fits_sorted = jnp.arange(num_places) - start < capacity_of_id
    # Back to the order of the tokens.
    inverse = jnp.argsort(index, axis=-1)
    fits = jnp.take_along_axis(fits_sorted, inverse, axis=-1).reshape(experts.shape)
    empty = router_probs.shape[-1]
    return Routing(
        jnp.where(fits, experts, empty),
        jnp.where(fits, weights, 0.0),
        router_probs,
    )


def _ranks(weights: Float[Array, "... T k"], order: str) -> Int[Array, "... Tk"]:
    """Who comes first among the T k places of a row: different numbers, the lowest first."""
    num_tokens, k = weights.shape[-2:]
    token, place = np.mgrid[:num_tokens, :k].reshape(2, -1)
    if order == "priority":
        best = jnp.max(jax.lax.stop_gradient(weights), axis=-1)
        # The inverse of the sorting permutation: each token's position among all.
        token_rank = jnp.argsort(jnp.argsort(-best, axis=-1, stable=True), axis=-1)
        return token_rank[..., token] * k + place
    ranks = {"position": token * k + place, "choice": place * num_tokens + token}
    return jnp.broadcast_to(ranks[order], (*weights.shape[:-2], num_tokens * k))
