"""Comparisons that rounding does not decide: which experts a token prefers, which tokens an expert.

In float32 sigmoid(20) and sigmoid(30) are both 1, and a softmax leaves 0 for all experts far below
the best. By such scores experts would tie, and the lowest ids would win. So nothing is compared by
its rounded score here: scores are two numbers whose sum has the digits that one number has no place
for, and what is still equal is compared by its logits. Only then the lower id comes first, on every
platform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.layers.documents import Documents


class Preference(NamedTuple):
    """What experts (or groups of them) are compared by, in this order."""

    high: Float[Array, "... E"]  # score and bias, rounded
    low: Float[Array, "... E"]  # what the rounding left out
    logits: Float[Array, "... E"]


def sparsemax_threshold(z: Float[Array, "... E"]) -> Float[Array, "... 1"]:
    """What sparsemax subtracts from the logits, so that those above it sum to 1."""
    ordered = jnp.sort(z, axis=-1, descending=True)
    total = jnp.cumsum(ordered, axis=-1)
    rank = jnp.arange(1, z.shape[-1] + 1, dtype=jnp.float32)
    # How many experts have more than 0.
    size = jnp.sum(1.0 + rank * ordered > total, axis=-1, keepdims=True)
    # A row that holds NaN has none.
    size = jnp.maximum(size, 1)
    return (jnp.take_along_axis(total, size - 1, axis=-1) - 1.0) / size


def preferences(
    scoring: str,
    logits: Float[Array, "... E"],
    bias: Float[Array, " E"] | None = None,
) -> Preference:
    """Scores plus bias, in two numbers each. The choice has no gradient.

    Args:
      scoring: "softmax", "sigmoid" or "sparsemax".
      logits: float32.
      bias: added to the scores.

    Returns:
      What the experts are compared by.
    """
    z = jax.lax.stop_gradient(logits)
    split = {
        "softmax": _split_softmax,
        "sigmoid": _split_sigmoid,
        "sparsemax": _split_sparsemax,
    }[scoring]
    high, low = split(z)
    if bias is not None:
        high, error = two_sum(high, jax.lax.stop_gradient(bias))
        low = low + error
    return Preference(*two_sum(high, low), z)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding left out: their sum is exact (Knuth)."""
    total = a + b
    of_b = total - a
    of_a = total - of_b
    return total, (a - of_a) + (b - of_b)


def _split_sigmoid(z: Array) -> tuple[Array, Array]:
    """1 - sigmoid(-z) where the sigmoid is nearer to 1 than to 0."""
    small = jax.nn.sigmoid(-jnp.abs(z))
    is_upper = z >= 0
    return jnp.where(is_upper, 1.0, small), jnp.where(is_upper, -small, 0.0)


def _split_softmax(z: Array) -> tuple[Array, Array]:
    """1 minus all others for the one expert that may have more than half."""
    is_top = _is_first_largest(z)
    exps = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    total = jnp.sum(exps, axis=-1, keepdims=True)
    others = jnp.sum(jnp.where(is_top, 0.0, exps), axis=-1, keepdims=True) / total
    is_near_one = is_top & (others < 0.5)
    return jnp.where(is_near_one, 1.0, exps / total), jnp.where(is_near_one, -others, 0.0)


def _split_sparsemax(z: Array) -> tuple[Array, Array]:
    """Piecewise linear: nothing saturates but at exactly 0."""
    return jnp.maximum(z - sparsemax_threshold(z), 0.0), jnp.zeros_like(z)


def _is_first_largest(z: Array) -> Bool[Array, "... E"]:
    """True at the largest of the last axis, at the first of them among equals."""
    best = jnp.argmax(z, axis=-1)
    return best[..., None] == jnp.arange(z.shape[-1])


def most_preferred(
    preference: Preference,
    k: int,
    allowed: Bool[Array, "... E"] | None = None,
) -> Int[Array, "... k"]:
    """Ids of the k most preferred, the best first; among equals the lower id.

    k rounds of three maxima. A sort by three keys would do, and is several times slower on CPUs.

    Args:
      preference: of every expert. NaN comes last.
      k: how many.
      allowed: those that may be chosen, k of them at least; None for all.

    Returns:
      The ids.
    """
    keys = [jnp.where(jnp.isnan(key), -jnp.inf, key) for key in preference]
    ids = jnp.arange(keys[0].shape[-1])

    def choose(left: Array, _: None) -> tuple[Array, Array]:
        best = left
        for key in keys:
            largest = jnp.max(jnp.where(best, key, -jnp.inf), axis=-1, keepdims=True)
            best = best & (key == largest)
        chosen = jnp.argmax(best, axis=-1).astype(jnp.int32)
        return left & (ids != chosen[..., None]), chosen

    left = jnp.ones(keys[0].shape, bool) if allowed is None else allowed
    _, chosen = jax.lax.scan(choose, left, length=k)
    return jnp.moveaxis(chosen, 0, -1)


def best_groups(
    preference: Preference,
    scoring: str,
    groups: int,
    kept: int,
    score: str,
) -> Bool[Array, "... E"]:
    """Which experts lie in the best groups of neighbors.

    Args:
      preference: of every expert.
      scoring: of the router.
      groups: how many equal groups there are.
      kept: how many of them are kept.
      score: a group's score is its best expert's ("max", DeepSeek-V2, arXiv 2405.04434) or the sum
        of its best two ("sum_top2", DeepSeek-V3, arXiv 2412.19437).

    Returns:
      True for the experts of the kept groups.
    """

    def in_groups(key: Array) -> Array:
        return key.reshape(*key.shape[:-1], groups, -1)

    members = Preference(*map(in_groups, preference))
    best = most_preferred(members, 2 if score == "sum_top2" else 1)

    def of_rank(rank: int) -> Preference:
        place = best[..., rank : rank + 1]
        return Preference(*(jnp.take_along_axis(key, place, -1)[..., 0] for key in members))

    of_group = of_rank(0)
    if score == "sum_top2":
        of_group = _sum_of_two(of_group, of_rank(1), scoring)
    chosen = most_preferred(of_group, kept)
    is_kept = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.repeat(is_kept, members.logits.shape[-1], axis=-1)


def _sum_of_two(
    first: Preference,
    second: Preference,
    scoring: str,
) -> Preference:
    """The sum of two scores; its logits order sums that saturate as their exact values would."""
    high, error = two_sum(first.high, second.high)
    low = first.low + second.low + error
    # Far below 0 a score goes as exp(z). Far above, a sigmoid goes as 1 - exp(-z).
    logits = jnp.logaddexp(first.logits, second.logits)
    if scoring == "sigmoid":
        from_above = -jnp.logaddexp(-first.logits, -second.logits)
        logits = jnp.where(jnp.minimum(first.logits, second.logits) > 0, from_above, logits)
    return Preference(*two_sum(high, low), logits)


def across_tokens(scoring: str, logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Orders the scores of all tokens and experts as the scores do, but never saturates.

    The logit of the score where it is a softmax or a sigmoid; sparsemax before it is cut at 0.
    """
    z = jax.lax.stop_gradient(logits.astype(jnp.float32))
    if scoring == "sigmoid":
        return z
    if scoring == "sparsemax":
        return z - sparsemax_threshold(z)
    # log(p / (1 - p)) = z - logsumexp of the others. Tokens whose logits differ by a constant tie.
    z = z - jnp.max(z, axis=-1, keepdims=True)
    is_top = _is_first_largest(z)
    of_all = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    # All but one expert have at most half: nothing is lost in 1 - p.
    small_p = jnp.where(is_top, 0.0, jnp.exp(z - of_all))
    others = of_all + jnp.log1p(-small_p)
    of_the_rest = jax.nn.logsumexp(jnp.where(is_top, -jnp.inf, z), axis=-1, keepdims=True)
    return z - jnp.where(is_top, of_the_rest, others)


def expert_choice(
    scores: Float[Array, "B T E"],
    ordered_by: Float[Array, "B T E"],
    k: int,
    documents: Documents | None,
) -> tuple[Int[Array, "B T E"], Float[Array, "B T E"]]:
    """Every expert takes its ceil(k T / E) best tokens of each document (arXiv 2202.09368).

    T is the document's own length: what an expert takes of it does not depend on the row that it
    is packed in. The balance is perfect, and the choice is not causal. A token may have any number
    of experts: it gets E places, those not filled are empty. Ties go to earlier tokens.

    Args:
      scores: of every token and expert, its weight if it is taken.
      ordered_by: what the tokens are compared by (`across_tokens`). NaN comes last.
      k: experts per token, on average.
      documents: of the rows; None where every row is one.

    Returns:
      The experts of each token, E where a place is empty, and their weights.
    """
    _, num_tokens, num_experts = scores.shape
    # [B, E, T]: every expert ranks the tokens.
    rank = jnp.swapaxes(_rank_in_document(ordered_by, documents), 1, 2)
    if documents is None:
        is_taken = rank < -(-k * num_tokens // num_experts)
    else:
        capacity = -(-k * documents.length // num_experts)
        is_taken = (rank < capacity[..., None]) & documents.is_token[..., None]
    experts = jnp.where(is_taken, jnp.arange(num_experts), num_experts)
    return experts, jnp.where(is_taken, scores, 0.0)


def _rank_in_document(
    ordered_by: Float[Array, "B T E"],
    documents: Documents | None,
) -> Int[Array, "B E T"]:
    """How many tokens of its document each expert puts before each token."""
    by_expert = jnp.swapaxes(ordered_by, 1, 2)
    descending = -jnp.where(jnp.isnan(by_expert), -jnp.inf, by_expert)
    place = jnp.broadcast_to(jnp.arange(descending.shape[-1]), descending.shape)
    if documents is None:
        _, order = jax.lax.sort((descending, place), num_keys=1)
        return jnp.argsort(order, axis=-1)
    index = jnp.broadcast_to(documents.index[:, None], descending.shape)
    _, _, order = jax.lax.sort((index, descending, place), num_keys=2)
    # Documents stay where they are in the row; only their tokens are sorted.
    return jnp.argsort(order, axis=-1) - documents.start[:, None]
