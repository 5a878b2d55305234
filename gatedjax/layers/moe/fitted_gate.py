"""A gate that is fitted to what experts are good at, by k-means and least squares, and not by
gradients (MixER, arXiv 2502.05335). It chooses one expert for each environment, by its context.

    expert of c = argmax softmax([c, 1] W)

    1. the contexts are clustered (k-means, mean absolute distances, from the clusters of before);
    2. each cluster gets an expert of its own: least sum of the median losses (an assignment);
    3. W is the least-squares map from [c, 1] to the experts, as vectors with a single one.

Numbers of the host, float64: nothing here is differentiated, and contexts are few.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from gatedjax.errors import require

ITERATIONS = 20
TOLERANCE = 1e-4
# What contexts are moved by, so that equal ones do not make the least squares singular.
JITTER = 1e-4


class Clusters(NamedTuple):
    """Where the centroids are, which of them each context is nearest to, and if that is settled."""

    centroids: Float[np.ndarray, "E C"]
    nearest: Int[np.ndarray, " N"]
    is_settled: bool


def gate_probs(
    contexts: Float[np.ndarray, "N C"],
    weights: Float[np.ndarray, "C+1 E"],
) -> Float[np.ndarray, "N E"]:
    """`softmax([c, 1] W)`; the likeliest expert is taken, and its output is not weighted."""
    logits = _with_one(contexts) @ weights
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def chosen_experts(
    contexts: Float[np.ndarray, "N C"],
    weights: Float[np.ndarray, "C+1 E"],
) -> Int[np.ndarray, " N"]:
    """The expert of each context."""
    return np.argmax(gate_probs(contexts, weights), axis=1)


def clustered(
    contexts: Float[np.ndarray, "N C"],
    centroids: Float[np.ndarray, "E C"],
) -> Clusters:
    """K-means from given centroids, at most 20 rounds.

    It is settled if no centroid moved in the last one and no cluster is empty.
    """
    centroids = np.asarray(centroids, np.float64)
    for _ in range(ITERATIONS):
        nearest = _nearest(contexts, centroids)
        counts = np.bincount(nearest, minlength=len(centroids))
        if np.any(counts == 0):
            return Clusters(centroids, nearest, False)
        means = np.stack([contexts[nearest == e].mean(axis=0) for e in range(len(centroids))])
        moved = np.max(np.abs(means - centroids))
        centroids = means
        if moved < TOLERANCE:
            return Clusters(centroids, nearest, True)
    return Clusters(centroids, _nearest(contexts, centroids), False)


def experts_of_clusters(
    losses: Float[np.ndarray, "N E"],
    nearest: Int[np.ndarray, " N"],
) -> Int[np.ndarray, " E"]:
    """The expert of each cluster, all different: the least sum of medians of its losses.

    Args:
      losses: of every expert on every environment.
      nearest: the cluster of each environment.
    """
    num_experts = losses.shape[1]
    medians = [np.median(losses[nearest == e], axis=0) for e in range(num_experts)]
    _, experts = linear_sum_assignment(np.stack(medians))
    return experts


def least_squares_gate(
    contexts: Float[np.ndarray, "N C"],
    experts: Int[np.ndarray, " N"],
    num_experts: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "C+1 E"]:
    """W of `[c, 1] W ~ onehot(expert)`.

    Args:
      contexts: of the environments.
      experts: that they are to have.
      num_experts: E.
      rng: of the small noise on the contexts.
    """
    moved = contexts + JITTER * rng.normal(size=contexts.shape)
    wanted = np.eye(num_experts)[experts]
    return np.linalg.lstsq(_with_one(moved), wanted, rcond=None)[0]


def fitted_gate(
    contexts: Float[np.ndarray, "N C"],
    losses: Float[np.ndarray, "N E"],
    centroids: Float[np.ndarray, "E C"],
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "C+1 E"] | None, Clusters]:
    """The gate and its clusters; None for the gate where clusters did not settle: keep the old one.

    Args:
      contexts: of the environments.
      losses: of every expert on every environment.
      centroids: of the clusters before.
      rng: of the small noise on the contexts.

    Raises:
      InputError: fewer environments than experts.
    """
    count, num_experts = losses.shape
    require(count >= num_experts, "contexts", count, f"at least one for each expert, {num_experts}")
    clusters = clustered(contexts, centroids)
    if not clusters.is_settled:
        return None, clusters
    experts = experts_of_clusters(losses, clusters.nearest)
    weights = least_squares_gate(contexts, experts[clusters.nearest], num_experts, rng)
    return weights, clusters


def _nearest(
    contexts: Float[np.ndarray, "N C"],
    centroids: Float[np.ndarray, "E C"],
) -> Int[np.ndarray, " N"]:
    distances = np.abs(contexts[:, None] - centroids).mean(axis=-1)
    return np.argmin(distances, axis=1)


def _with_one(contexts: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C+1"]:
    return np.concatenate([contexts, np.ones((len(contexts), 1))], axis=1)
