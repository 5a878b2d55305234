"""Routers as pure functions: logits -> scores -> experts and weights. Everything here is float32.

A token has k places, each with an expert id and a weight. The id E, one past the last expert, marks
an empty place: its weight is 0, it costs no expert any work, and sorting puts it last
(`sort_by_group`). All places of padding are empty.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config.router import RouterConfig
from gatedjax.errors import require
from gatedjax.layers.documents import Documents
from gatedjax.layers.moe.given_experts import experts_given
from gatedjax.layers.moe.selection import (
    across_tokens,
    best_groups,
    expert_choice,
    most_preferred,
    preferences,
    sparsemax_threshold,
)
from gatedjax.layers.norm import unit_length
from gatedjax.layers.stochastic_gate import straight_through, with_gumbel_noise


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
    return jnp.maximum(z - sparsemax_threshold(z), 0.0)


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
    temperature: Float[Array, ""] | float | None = None,
    bias: Float[Array, " E"] | None = None,
    importance: Float[Array, "*kinds"] | float = 1.0,
    tokens: Int[Array, "..."] | None = None,
    key: Array | None = None,
    documents: Documents | None = None,
) -> Routing:
    """The composed router: `config` says of which parts.

    Args:
      config: the router.
      logits: [B, T, E], already divided by the temperature.
      experts_per_token: k.
      temperature: what the logits were divided by; None for `config.temperature`. Noise is divided
        by it too, once: `softmax((h + g) / temperature)` (arXiv 1611.01144), so the temperature
        does not change how often an expert is drawn.
      bias: added to the scores for selection, never to the weights (DeepSeek-V3).
      importance: of this layer, or of it for tokens of either kind [2]; a chosen expert is skipped
        where importance x score < the threshold of the token's kind.
      tokens: token ids [B, T], for selection "hash" and for a second kind.
      key: randomness of selection "gumbel"; None (evaluation) selects without noise.
      documents: of packed rows, and where they are padding; None where every row is one document.

    Returns:
      The experts of every token, their weights, and the probabilities of all experts.

    Raises:
      InputError: `experts_per_token` is no number of experts.
      ValueError: selection "hash" or a second kind without `tokens`.
    """
    num_experts = logits.shape[-1]
    check_places("experts_per_token", experts_per_token, num_experts)
    z = logits.astype(jnp.float32)
    if config.selection == "gumbel" and key is not None:
        z = with_gumbel_noise(key, z, config.temperature if temperature is None else temperature)
    scores = SCORINGS[config.scoring](z)
    # Softmax and sparsemax sum to 1 by themselves; sigmoids do not.
    router_probs = scores
    if config.scoring == "sigmoid":
        router_probs = _normalized_sigmoids(z)
    if config.selection == "expert_choice":
        experts, weights = expert_choice(
            scores,
            across_tokens(config.scoring, z),
            experts_per_token,
            documents,
        )
        return Routing(experts, config.scale * weights, router_probs)
    experts = _selected(
        config,
        z,
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
    is_empty = jnp.zeros(experts.shape, bool)
    if config.skips:
        is_empty = _is_skipped(config, chosen, importance, tokens)
    if documents is not None:
        is_empty = is_empty | ~documents.is_token[..., None]
    if config.skips or documents is not None:
        experts = jnp.where(is_empty, num_experts, experts)
        weights = jnp.where(is_empty, 0.0, weights)
    return Routing(experts, weights, router_probs)


def _is_skipped(
    config: RouterConfig,
    chosen: Float[Array, "... k"],
    importance: Float[Array, "*kinds"] | float,
    tokens: Int[Array, "..."] | None,
) -> Bool[Array, "... k"]:
    """Which of the chosen experts count too little for their layer and the kind of the token.

    Args:
      config: the router.
      chosen: scores of the chosen experts.
      importance: of the layer, or for either kind.
      tokens: token ids.
    """
    if not config.second_kind:
        return importance * chosen < config.threshold
    is_second = is_second_kind(config.second_kind, _ids(tokens, "second_kind"))
    of_kinds = jnp.broadcast_to(jnp.asarray(importance), (2,))
    thresholds = jnp.asarray([config.threshold, config.second_threshold])
    kind = is_second.astype(jnp.int32)[..., None]
    return of_kinds[kind] * chosen < thresholds[kind]


def is_second_kind(ids: tuple[int, ...], tokens: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Whether each token's id is one of `ids`."""
    return jnp.any(tokens[..., None] == jnp.asarray(ids), axis=-1)


def check_places(name: str, k: int, num_experts: int) -> None:
    """Raises InputError unless k is an integer from 1 to the number of experts."""
    is_integer = isinstance(k, numbers.Integral) and not isinstance(k, bool)
    is_fine = is_integer and 1 <= k <= num_experts
    require(is_fine, name, k, f"an integer between 1 and the number of experts, {num_experts}")


def _normalized_sigmoids(z: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Each sigmoid over their sum; logits far below 0, where all of them round to 0, too."""
    return jax.nn.softmax(jax.nn.log_sigmoid(z), axis=-1)


def _selected(
    config: RouterConfig,
    z: Float[Array, "... E"],
    k: int,
    bias: Float[Array, " E"] | None,
    tokens: Int[Array, "..."] | None,
) -> Int[Array, "... k"]:
    """The experts of every token, by their scores (and a bias), by the token's id, or given."""
    if config.selection == "given":
        return experts_given(z)
    if config.selection == "hash":
        return hash_experts(_ids(tokens, 'selection="hash"'), z.shape[-1], k)
    # Without a bias logits order as scores do, and do not round to the same 0 or 1.
    if bias is None and config.selection != "grouped_topk":
        _, ids = jax.lax.top_k(jax.lax.stop_gradient(z), k)
        return ids
    preference = preferences(config.scoring, z, bias)
    if config.selection != "grouped_topk":
        return most_preferred(preference, k)
    is_kept = best_groups(
        preference,
        config.scoring,
        config.num_groups,
        config.kept_groups,
        config.group_score,
    )
    return most_preferred(preference, k, is_kept)


def _ids(tokens: Int[Array, "..."] | None, needed_by: str) -> Int[Array, "..."]:
    """The ids of the tokens, or a ValueError."""
    if tokens is None:
        raise ValueError(f"route: tokens: got None, expected the ids [B, T] for {needed_by}")
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"route: tokens: got dtype {ids.dtype}, expected integers")
    return ids


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
        weights = straight_through(1.0, weights)
    if config.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return config.scale * weights


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


def count_places(experts: Int[Array, "B T k"], num_experts: int) -> Float[Array, "B E"]:
    """Places of each row that each expert got; empty ones not counted.

    In float32: exact up to 2^24 a row.
    """
    hit = experts[..., None] == jnp.arange(num_experts)
    return jnp.sum(hit, axis=(-3, -2), dtype=jnp.float32)
