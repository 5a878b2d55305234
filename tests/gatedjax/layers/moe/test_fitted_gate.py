"""MixER's gate: k-means, the assignment and least squares against loops, and what keeps the old
gate.
"""

import itertools

import numpy as np
import pytest

from gatedjax.errors import InputError
from gatedjax.layers.moe.fitted_gate import (
    chosen_experts,
    clustered,
    experts_of_clusters,
    fitted_gate,
    gate_probs,
    least_squares_gate,
)

RNG = np.random.default_rng(0)
CENTERS = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
CLUSTER = np.repeat([0, 1, 2], 5)
CONTEXTS = CENTERS[CLUSTER] + 0.3 * RNG.normal(size=(15, 2))


def test_k_means_finds_the_clusters():
    """From poor centroids; settled, at the means, by mean absolute distances."""
    found = clustered(CONTEXTS, CENTERS + RNG.normal(size=(3, 2)))
    assert found.is_settled
    np.testing.assert_array_equal(found.nearest, CLUSTER)
    for e in range(3):
        np.testing.assert_allclose(found.centroids[e], CONTEXTS[e == CLUSTER].mean(axis=0))
    # (2, 2) is nearer to (0, 3.5) than to (0, 0) by squares, and not by absolute values.
    tie = clustered(
        np.array([[2.0, 2.0], [0.0, 0.0], [0.0, 3.4]]), np.array([[0.0, 0.0], [0.0, 3.6]])
    )
    by_hand = [abs(2 - 0) + abs(2 - 0), abs(2 - 0) + abs(2 - 3.6)]
    assert by_hand[1] < by_hand[0] and tie.nearest[0] == 1


def test_the_assignment_is_the_best_of_all():
    losses = RNG.uniform(size=(15, 3))
    found = experts_of_clusters(losses, CLUSTER)
    medians = np.stack([np.median(losses[e == CLUSTER], axis=0) for e in range(3)])
    totals = {p: medians[range(3), p].sum() for p in itertools.permutations(range(3))}
    assert tuple(found) == min(totals, key=totals.get)


def test_least_squares():
    experts = np.array([2, 0, 1])[CLUSTER]
    weights = least_squares_gate(CONTEXTS, experts, 3, np.random.default_rng(1))
    x = np.concatenate([CONTEXTS, np.ones((15, 1))], axis=1)
    normal = np.linalg.solve(x.T @ x, x.T @ np.eye(3)[experts])
    np.testing.assert_allclose(weights, normal, atol=1e-3)
    probs = gate_probs(CONTEXTS, weights)
    logits = x @ weights
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probs, expected)
    np.testing.assert_array_equal(chosen_experts(CONTEXTS, weights), experts)


def test_the_whole_fit():
    """Experts go to whom they are best for; an empty cluster keeps the old gate."""
    good = np.array([1, 2, 0])
    losses = np.where(good[CLUSTER][:, None] == np.arange(3), 0.1, 1.0)
    losses += 0.05 * RNG.uniform(size=losses.shape)
    gate, clusters = fitted_gate(CONTEXTS, losses, CENTERS, np.random.default_rng(2))
    np.testing.assert_array_equal(chosen_experts(CONTEXTS, gate), good[CLUSTER])
    assert clusters.is_settled
    far = CENTERS + np.array([[0, 0], [0, 0], [100, 100]])
    gate, clusters = fitted_gate(CONTEXTS, losses, far, np.random.default_rng(2))
    assert gate is None and not clusters.is_settled
    with pytest.raises(InputError, match="contexts: got 2, expected at least one for each expert"):
        fitted_gate(CONTEXTS[:2], losses[:2], CENTERS, np.random.default_rng(2))
