"""A limit to what an expert takes of a document; what is over is dropped.

A measure of training, for experts with buffers of a fixed size (Switch, GShard, V-MoE). The group
of tokens that shares an expert's capacity is the document: a row of packed documents drops what the
documents drop by themselves. Evaluation and decoding drop nothing, as DeepSeek-V2 does (arXiv
2405.04434): one token at a time is always within the capacity, and a prompt must not differ from
its tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config.moe import SparseMoEConfig
from gatedjax.errors import require
from gatedjax.layers.documents import Documents
from gatedjax.layers.moe.routing import Routing

ORDERS = ("position", "choice", "priority")


def capacities(
    config: SparseMoEConfig,
    tokens: int | Int[np.ndarray, "..."],
) -> Int[np.ndarray, "... E"]:
    """How many assignments each expert takes: ceil(k T capacity_factor w_i / sum w).

    w is 1 for experts that cost nothing and tau (`zero_computation_weight`) for those that compute
    (MoE++, eq. 8, which leaves out the factor k and so has capacity for one assignment a token).

    Args:
      config: of the layer.
      tokens: T, of one document or of many.

    Returns:
      The capacity of every expert, for each T.
    """
    free = config.total_experts - config.num_experts
    weight = np.array([config.zero_computation_weight] * config.num_experts + [1.0] * free)
    assignments = config.experts_per_token * np.asarray(tokens)[..., None] * config.capacity_factor
    exact = assignments * weight / weight.sum()
    # 3.0000000001 is 3.
    return np.ceil(exact - 1e-9).astype(np.int32)


def capacity_of_places(
    config: SparseMoEConfig,
    experts: Int[Array, "B T k"],
    documents: Documents | None,
) -> Int[Array, "B T k"]:
    """For each place, how much its expert takes of the document that the place belongs to.

    Args:
      config: of the layer.
      experts: of every token.
      documents: of the rows; None where every row is one.

    Returns:
      The capacities; 0 where the place is empty.
    """
    num_tokens = experts.shape[1]
    # Computed for every length that a document can have, in float64: a capacity is an integer.
    of_length = capacities(config, np.arange(num_tokens + 1))
    # There are two sorts of experts: those that compute come first, those that cost nothing last.
    of_length = jnp.asarray(of_length[:, [0, -1]])
    length = jnp.full((1, 1), num_tokens) if documents is None else documents.length
    # [B, T, 2]
    of_document = of_length[length]
    computes = experts < config.num_experts
    capacity = jnp.where(computes, of_document[..., :1], of_document[..., 1:])
    return jnp.where(experts < config.total_experts, capacity, 0)


def limit_capacity(
    routing: Routing,
    capacity: Int[Array, "... T k"],
    order: str,
    *,
    documents: Documents | None = None,
    priority: Float[Array, "... T"] | None = None,
) -> Routing:
    """Empties the places beyond each expert's capacity.

    What is dropped is what `count_places` then misses.

    Args:
      routing: of whole rows, [B, T, k].
      capacity: for each place, the most that its expert takes of the place's document.
      order: who comes first. "position": earlier tokens (causal, but for the length of their
        document). "choice": all first choices before any second (V-MoE, GShard). "priority":
        tokens with a larger `priority` (batch prioritized routing, arXiv 2106.05974).
      documents: of the rows; None where every row is one.
      priority: of every token, for that order. NaN comes last.

    Returns:
      The routing without what was dropped.

    Raises:
      InputError: an order that there is not, or no priorities where they are needed.
    """
    require(order in ORDERS, "order", order, f"one of {', '.join(ORDERS)}")
    experts, weights, router_probs = routing
    num_places = experts.shape[-2] * experts.shape[-1]
    rank = _ranks(experts.shape, order, priority)
    flat = experts.reshape(rank.shape)
    group = flat
    if documents is not None:
        # The experts of each document by themselves.
        index = jnp.repeat(documents.index, experts.shape[-1], axis=-1)
        group = index * (router_probs.shape[-1] + 1) + flat
    # Sort the places of a row by expert and, within an expert, by rank; remember where each was.
    place = jnp.broadcast_to(jnp.arange(num_places), rank.shape)
    ids, _, place = jax.lax.sort((group, rank, place), num_keys=2)
    # A run of one expert's places begins where its id first appears.
    rows = ids.reshape(-1, num_places)
    start = jax.vmap(jnp.searchsorted)(rows, rows).reshape(ids.shape)
    before_sorted = jnp.arange(num_places) - start
    # Back to the order of the tokens.
    inverse = jnp.argsort(place, axis=-1)
    before = jnp.take_along_axis(before_sorted, inverse, axis=-1).reshape(experts.shape)
    fits = before < capacity
    empty = router_probs.shape[-1]
    return Routing(
        jnp.where(fits, experts, empty),
        jnp.where(fits, weights, 0.0),
        router_probs,
    )


def _ranks(
    shape: tuple[int, ...],
    order: str,
    priority: Float[Array, "... T"] | None,
) -> Int[Array, "... Tk"]:
    """Who comes first among the T k places of a row: different numbers, the lowest first."""
    *batch, num_tokens, k = shape
    token, place = np.mgrid[:num_tokens, :k].reshape(2, -1)
    if order == "priority":
        require(priority is not None, "priority", priority, "one for each token, to order by")
        best = jax.lax.stop_gradient(jnp.asarray(priority))
        descending = -jnp.where(jnp.isnan(best), -jnp.inf, best)
        # The inverse of the sorting permutation: each token's position among all.
        token_rank = jnp.argsort(jnp.argsort(descending, axis=-1, stable=True), axis=-1)
        return token_rank[..., token] * k + place
    ranks = {"position": token * k + place, "choice": place * num_tokens + token}
    return jnp.broadcast_to(ranks[order], (*batch, num_tokens * k))
