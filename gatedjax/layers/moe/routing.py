"""Routers as pure functions: logits -> scores -> experts and weights. Everything here is float32.

A token has k places, each with an expert id and a weight. The id E, one past the last expert, marks an empty place: its
weight is 0, it costs no expert any work, and sorting puts it last (`sort_by_group`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config.moe import RouterConfig, SparseMoEConfig

ACTIVATIONS = {
    "identity": lambda h: h,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


class Routing(NamedTuple):
    """Where each token goes, with what weights; and every expert's share of the token's scores, which sums to 1."""

    experts: Int[Array, "... k"]
    weights: Float[Array, "... k"]
    probabilities: Float[Array, "... E"]


def modified_input(x: Float[Array, "... M"], name: str) -> Float[Array, "... M"]:
    """M(x), bounded and not linear: it uncouples gate from expert parameters (general theory of multinomial logistic
    mixtures, arXiv 2310.14188). "unit" is `x / |x|`."""
    x = x.astype(jnp.float32)
    if name == "unit":
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
    return ACTIVATIONS[name](x)


def sparsemax(logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """The point of the simplex nearest to the logits (arXiv 1602.02068): like softmax, but with exact zeros."""
    z = logits.astype(jnp.float32)
    ordered = jnp.sort(z, axis=-1, descending=True)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=jnp.float32)
    total = jnp.cumsum(ordered, axis=-1)
    size = jnp.sum(
        1.0 + rank * ordered > total, axis=-1, keepdims=True
    )  # experts with a share above 0
    threshold = (jnp.take_along_axis(total, size - 1, axis=-1) - 1.0) / size
    return jnp.maximum(z - threshold, 0.0)


SCORES = {
    "softmax": lambda z: jax.nn.softmax(z, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sparsemax": sparsemax,
}


def route(
    config: RouterConfig,
    logits: Float[Array, "... E"],
    experts_per_token: int,
    *,
    bias: Float[Array, " E"] | None = None,
    importance: Float[Array, ""] | float = 1.0,
    tokens: Int[Array, "..."] | None = None,
    key: Array | None = None,
) -> Routing:
    """The composed router: `config` says of which parts.

    Args:
      logits: [B, T, E], already divided by the temperature.
      bias: added to the scores for selection, never to the weights (DeepSeek-V3).
      importance: of this layer; a chosen expert is skipped where importance x score < `config.threshold`.
      tokens: token ids [B, T], for selection "hash".
      key: randomness of selection "gumbel"; None (evaluation) selects without noise.

    Raises:
      ValueError: selection "hash" without `tokens`.
    """
    z = logits.astype(jnp.float32)
    if config.selection == "gumbel" and key is not None:
        z = z + jax.random.gumbel(key, z.shape, jnp.float32)
    scores = SCORES[config.scoring](z)
    probabilities = (
        scores / jnp.sum(scores, axis=-1, keepdims=True) if config.scoring == "sigmoid" else scores
    )
    k = experts_per_token
    preferred = scores if bias is None else scores + jax.lax.stop_gradient(bias)
    if config.selection == "expert_choice":
        experts, weights = expert_choice(scores, k)
        return Routing(experts, config.scale * weights, probabilities)
    if config.selection == "hash":
        if tokens is None:
            raise ValueError(
                'route: tokens: got None, expected the ids [B, T] for selection="hash"'
            )
        experts = hash_experts(tokens, z.shape[-1], k)
    elif config.selection == "grouped_topk":
        groups = best_groups(preferred, config.num_groups, config.kept_groups, config.group_score)
        experts = top_experts(jnp.where(groups, preferred, -jnp.inf), k)
    else:
        # By logits where they order alike: scores that rounded to 0 would all tie.
        by_logits = bias is None and config.scoring != "sparsemax"
        experts = top_experts(z if by_logits else preferred, k)
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    weights = _weights(config, z, chosen, experts)
    if config.threshold:
        skipped = importance * chosen < config.threshold
        experts, weights = (
            jnp.where(skipped, z.shape[-1], experts),
            jnp.where(skipped, 0.0, weights),
        )
    return Routing(experts, weights, probabilities)


def _weights(
    config: RouterConfig, z: Array, chosen: Float[Array, "... k"], experts: Int[Array, "... k"]
):
    """Weights [..., k] of the chosen experts' outputs, whose scores are `chosen`."""
    k = experts.shape[-1]
    if config.weighting == "uniform":
        weights = jnp.full(experts.shape, 1.0 / k, jnp.float32)
    elif config.weighting == "selected":
        weights = SCORES[config.scoring](jnp.take_along_axis(z, experts, axis=-1))
    else:
        weights = chosen
    if config.selection == "gumbel":
        # Straight through (arXiv 1308.3432, 1611.01144): 1 going forward, the softmax's gradient going backward.
        weights = 1.0 + weights - jax.lax.stop_gradient(weights)
    if config.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return config.scale * weights


def top_experts(preferred: Float[Array, "... E"], k: int) -> Int[Array, "... k"]:
    """Ids of the k largest, largest first; among equals the lower id first, on every platform."""
    return jax.lax.top_k(jax.lax.stop_gradient(preferred), k)[1]


def best_groups(
    preferred: Float[Array, "... E"], groups: int, kept: int, score: str
) -> Bool[Array, "... E"]:
    """Which experts lie in the `kept` best of the `groups` equal groups of neighbors.

    A group's score is its best expert's ("max", DeepSeek-V2, arXiv 2405.04434) or the sum of its best two
    ("sum_top2", DeepSeek-V3, arXiv 2412.19437).
    """
    members = jax.lax.stop_gradient(preferred).reshape(*preferred.shape[:-1], groups, -1)
    best = jnp.sum(jax.lax.top_k(members, 2 if score == "sum_top2" else 1)[0], axis=-1)
    chosen = top_experts(best, kept)
    is_kept = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.repeat(is_kept, members.shape[-1], axis=-1)


def hash_experts(tokens: Int[Array, "..."], num_experts: int, k: int) -> Int[Array, "... k"]:
    """k different experts for each token id, the same ones always (Hash Layers, arXiv 2106.04426). Nothing is learned.

    The id is mixed by the last steps of MurmurHash3, so that frequent ids (small, in most vocabularies) spread.
    """
    h = tokens.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    h = (h ^ (h >> 16)).astype(jnp.uint32)
    return ((h[..., None] % num_experts + jnp.arange(k, dtype=jnp.uint32)) % num_experts).astype(
        jnp.int32
    )


def expert_choice(
    scores: Float[Array, "B T E"], k: int
) -> tuple[Int[Array, "B T E"], Float[Array, "B T E"]]:
    """Every expert takes its ceil(k T / E) best tokens of each row (arXiv 2202.09368): perfect balance, not causal.

    A token may have any number of experts: it gets E places, those not filled are empty. Ties go to earlier tokens.
    """
    T, E = scores.shape[-2:]
    by_expert = jnp.swapaxes(jax.lax.stop_gradient(scores), -1, -2)
    taken = jax.lax.top_k(by_expert, min(T, -(-k * T // E)))[1]  # [B, E, C]
    mask = jnp.put_along_axis(jnp.zeros(by_expert.shape, bool), taken, True, axis=-1, inplace=False)
    mask = jnp.swapaxes(mask, -1, -2)
    return jnp.where(mask, jnp.arange(E), E), jnp.where(mask, scores, 0.0)


def capacities(config: SparseMoEConfig, tokens: int) -> Int[np.ndarray, " E"]:
    """How many assignments each expert takes from a row: ceil(k T capacity_factor w_i / sum w).

    w is 1 for experts that cost nothing and tau (`zero_computation_weight`) for those that compute (MoE++, eq. 8, which
    leaves out the factor k and so has room for one assignment a token).
    """
    free = config.total_experts - config.num_experts
    share = np.array([config.zero_computation_weight] * config.num_experts + [1.0] * free)
    wanted = config.experts_per_token * tokens * config.capacity_factor * share / share.sum()
    return np.ceil(wanted - 1e-9).astype(np.int32)  # 3.0000000001 is 3


def limit_capacity(routing: Routing, capacity: Int[Array, " E"], order: str) -> Routing:
    """Empties the places of a row [T, k] beyond each expert's `capacity`. Drops are what `count_places` then misses.

    Args:
      order: who comes first. "position": earlier tokens (causal). "choice": all first choices before any second
        (V-MoE, GShard). "priority": tokens by their largest weight (batch prioritized routing, arXiv 2106.05974).
    """
    experts, weights, probabilities = routing
    T, k = experts.shape[-2:]
    token, place = np.mgrid[:T, :k].reshape(2, -1)
    if order == "priority":
        best = jnp.max(jax.lax.stop_gradient(weights), axis=-1)
        token_rank = jnp.argsort(jnp.argsort(-best, axis=-1, stable=True), axis=-1)
        first = token_rank[..., token] * k + place
    else:
        first = {"position": token * k + place, "choice": place * T + token}[order]
        first = jnp.broadcast_to(first, (*experts.shape[:-2], T * k))
    flat = experts.reshape(first.shape)
    index = jnp.broadcast_to(jnp.arange(T * k), first.shape)
    ids, _, index = jax.lax.sort((flat, first, index), num_keys=2)
    # A run of one expert's places begins where its id first appears.
    start = jax.vmap(jnp.searchsorted)(ids.reshape(-1, T * k), ids.reshape(-1, T * k)).reshape(
        ids.shape
    )
    fits_sorted = jnp.arange(T * k) - start < jnp.append(jnp.asarray(capacity), 0)[ids]
    back = jnp.argsort(index, axis=-1)
    fits = jnp.take_along_axis(fits_sorted, back, axis=-1).reshape(experts.shape)
    empty = probabilities.shape[-1]
    return Routing(jnp.where(fits, experts, empty), jnp.where(fits, weights, 0.0), probabilities)


def count_places(experts: Int[Array, "B T k"], num_experts: int) -> Float[Array, "B E"]:
    """Places of each row that each expert got; empty ones not counted. float32, exact up to 2^24 a row."""
    hit = experts[..., None] == jnp.arange(num_experts)
    return jnp.sum(hit, axis=(-3, -2), dtype=jnp.float32)
