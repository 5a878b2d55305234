"""Routers as pure functions: logits -> scores -> experts and weights. Everything here is float32.

A token has k places, each with an expert id and a weight. The id E, one past the last expert, marks
an empty place: its weight is 0, it costs no expert any work, and sorting puts it last
(`sort_by_group`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config.moe import RouterConfig
from gatedjax.layers.norm import unit_length


class Routing(NamedTuple):
    """Where each token goes, with what weights; and the probabilities of all experts."""

    experts: Int[Array, "... k"]
    weights: Float[Array, "... k"]
    router_probs: Float[Array, "... E"]


def identity(h: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logits as they are."""
    return h


ACTIVATIONS = {
    "identity": identity,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def modified_input(x: Float[Array, "... M"], name: str) -> Float[Array, "... M"]:
    """M(x), bounded and not linear: it uncouples gate from expert parameters.

    From a general theory of multinomial logistic mixtures, arXiv 2310.14188. "unit" is `x / |x|`.
    """
    x = x.astype(jnp.float32)
    if name == "unit":
        return unit_length(x, eps=1e-12)
    return ACTIVATIONS[name](x)


def sparsemax(logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """The point of the simplex nearest to the logits (arXiv 1602.02068).

    Like softmax, but with exact zeros.
    """
    z = logits.astype(jnp.float32)
    ordered = jnp.sort(z, axis=-1, descending=True)
    total = jnp.cumsum(ordered, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=jnp.float32)
    # How many experts have more than 0.
    size = jnp.sum(1.0 + rank * ordered > total, axis=-1, keepdims=True)
    # The threshold by which theirs sum to 1.
    threshold = (jnp.take_along_axis(total, size - 1, axis=-1) - 1.0) / size
    return jnp.maximum(z - threshold, 0.0)


def softmax(logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Over the experts."""
    return jax.nn.softmax(logits, axis=-1)


# By `RouterConfig.scoring`.
SCORINGS = {
    "softmax": softmax,
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
      config: the router.
      logits: [B, T, E], already divided by the temperature.
      experts_per_token: k.
      bias: added to the scores for selection, never to the weights (DeepSeek-V3).
      importance: of this layer; a chosen expert is skipped where importance x score <
        `config.threshold`.
      tokens: token ids [B, T], for selection "hash".
      key: randomness of selection "gumbel"; None (evaluation) selects without noise.

    Returns:
      The experts of every token, their weights, and the probabilities of all experts.

    Raises:
      ValueError: selection "hash" without `tokens`.
    """
    z = logits.astype(jnp.float32)
    if config.selection == "gumbel" and key is not None:
        z = z + jax.random.gumbel(key, z.shape, jnp.float32)
    scores = SCORINGS[config.scoring](z)
    # Softmax and sparsemax sum to 1 by themselves; sigmoids do not.
    router_probs = scores
    if config.scoring == "sigmoid":
        router_probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    if config.selection == "expert_choice":
        experts, weights = expert_choice(scores, experts_per_token)
        return Routing(experts, config.scale * weights, router_probs)
    experts = _selected(
        config,
        z,
        scores,
        experts_per_token,
        bias,
        tokens,
    )
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    weights = _weights(
        config,
        z,
        chosen,
        experts,
    )
    if config.threshold:
        skipped = importance * chosen < config.threshold
        empty = z.shape[-1]
        experts = jnp.where(skipped, empty, experts)
        weights = jnp.where(skipped, 0.0, weights)
    return Routing(experts, weights, router_probs)


def _selected(
    config: RouterConfig,
    z: Float[Array, "... E"],
    scores: Float[Array, "... E"],
    k: int,
    bias: Float[Array, " E"] | None,
    tokens: Int[Array, "..."] | None,
) -> Int[Array, "... k"]:
    """The experts of every token, by their scores (and a bias), or by the token's id."""
    if config.selection == "hash":
        if tokens is None:
            message = 'route: tokens: got None, expected the ids [B, T] for selection="hash"'
            raise ValueError(message)
        return hash_experts(tokens, z.shape[-1], k)
    preferred = scores if bias is None else scores + jax.lax.stop_gradient(bias)
    if config.selection == "grouped_topk":
        is_kept = best_groups(
            preferred,
            config.num_groups,
            config.kept_groups,
            config.group_score,
        )
        return top_experts(jnp.where(is_kept, preferred, -jnp.inf), k)
    # By logits where they order alike: scores that rounded to 0 would all tie.
    if bias is None and config.scoring != "sparsemax":
        return top_experts(z, k)
    return top_experts(preferred, k)


def _weights(
    config: RouterConfig,
    z: Float[Array, "... E"],
    chosen: Float[Array, "... k"],
    experts: Int[Array, "... k"],
) -> Float[Array, "... k"]:
    """The weights of the chosen experts' outputs, whose scores are `chosen`."""
    k = experts.shape[-1]
    if config.weighting == "uniform":
        weights = jnp.full(experts.shape, 1.0 / k, jnp.float32)
    elif config.weighting == "selected":
        weights = SCORINGS[config.scoring](jnp.take_along_axis(z, experts, axis=-1))
    else:
        weights = chosen
    if config.selection == "gumbel":
        # Straight through (arXiv 1308.3432, 1611.01144): 1 going forward, the softmax's gradient
        # going backward.
        weights = 1.0 + weights - jax.lax.stop_gradient(weights)
    if config.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return config.scale * weights


def top_experts(preferred: Float[Array, "... E"], k: int) -> Int[Array, "... k"]:
    """Ids of the k largest, largest first; among equals the lower id first, on every platform."""
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(preferred), k)
    return ids


def best_groups(
    preferred: Float[Array, "... E"],
    groups: int,
    kept: int,
    score: str,
) -> Bool[Array, "... E"]:
    """Which experts lie in the best groups of neighbors.

    Args:
      preferred: the score of every expert.
      groups: how many equal groups there are.
      kept: how many of them are kept.
      score: a group's score is its best expert's ("max", DeepSeek-V2, arXiv 2405.04434) or the sum
        of its best two ("sum_top2", DeepSeek-V3, arXiv 2412.19437).

    Returns:
      True for the experts of the kept groups.
    """
    # The choice has no gradient; the weights of what is chosen do.
    members = jax.lax.stop_gradient(preferred).reshape(*preferred.shape[:-1], groups, -1)
    best_members, _ = jax.lax.top_k(members, 2 if score == "sum_top2" else 1)
    chosen = top_experts(jnp.sum(best_members, axis=-1), kept)
    is_kept = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.repeat(is_kept, members.shape[-1], axis=-1)


def hash_experts(
    tokens: Int[Array, "..."],
    num_experts: int,
    k: int,
) -> Int[Array, "... k"]:
    """k different experts for each token id (Hash Layers, arXiv 2106.04426).

    The same ones always: nothing is learned.

    The id is mixed by the last steps of MurmurHash3, so that frequent ids (small, in most
    vocabularies) spread.
    """
    h = tokens.astype(jnp.uint32)
    # Unsigned, so that shifts bring in zeros and products wrap around.
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = (h ^ (h >> 16)).astype(jnp.uint32)
    # Neighbors of the first one, so that no token has an expert twice.
    first = h[..., None] % num_experts
    experts = (first + jnp.arange(k, dtype=jnp.uint32)) % num_experts
    return experts.astype(jnp.int32)


def expert_choice(
    scores: Float[Array, "B T E"],
    k: int,
) -> tuple[Int[Array, "B T E"], Float[Array, "B T E"]]:
    """Every expert takes its ceil(k T / E) best tokens of each row (arXiv 2202.09368).

    The balance is perfect, and the choice is not causal.

    A token may have any number of experts: it gets E places, those not filled are empty. Ties go to
    earlier tokens.
    """
    num_tokens, num_experts = scores.shape[-2:]
    capacity = min(num_tokens, math.ceil(k * num_tokens / num_experts))
    # [B, E, T]: every expert ranks the tokens.
    by_expert = jnp.swapaxes(jax.lax.stop_gradient(scores), -1, -2)
    _, taken = jax.lax.top_k(by_expert, capacity)  # [B, E, capacity]
    nothing = jnp.zeros(by_expert.shape, bool)
    is_taken = jnp.put_along_axis(nothing, taken, True, axis=-1, inplace=False)
    is_taken = jnp.swapaxes(is_taken, -1, -2)
    experts = jnp.where(is_taken, jnp.arange(num_experts), num_experts)
    return experts, jnp.where(is_taken, scores, 0.0)


def count_places(experts: Int[Array, "B T k"], num_experts: int) -> Float[Array, "B E"]:
    """Places of each row that each expert got; empty ones not counted.

    In float32: exact up to 2^24 a row.
    """
    hit = experts[..., None] == jnp.arange(num_experts)
    return jnp.sum(hit, axis=(-3, -2), dtype=jnp.float32)
