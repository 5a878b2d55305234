"""Experts out of a gated MLP's channels: the split against masks in float64, labels of routers by
loops, loads of a cache by brute force, experts that are given.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms

from gatedjax.config import RouterConfig, SparseMoEConfig
from gatedjax.errors import InputError
from gatedjax.layers.moe.channel_experts import (
    FRACTIONS,
    expert_matrices,
    kept_channels,
    loads,
    overlaps,
    prefetch_order,
    router_loss,
    split_channels,
)
from gatedjax.layers.moe.given_experts import given_experts
from gatedjax.layers.moe.sparse import SparseMoE
from gatedjax.layers.tree import flatten_dict, unflatten_dict

RNG = np.random.default_rng(11)
B, T, M, F, E = 2, 5, 4, 12, 3
MEANS = RNG.uniform(size=(E, F)) + 2 * (np.arange(F) < 2)
KEPT = kept_channels(MEANS)
CHANNELS = split_channels(KEPT)
CONFIG = SparseMoEConfig(
    num_experts=E,
    experts_per_token=1,
    hidden=CHANNELS.own.shape[1],
    router=RouterConfig(selection="given", weighting="uniform"),
    shared_hidden=CHANNELS.permanent.size,
    shared_gate=False,
)


def test_channels():
    """The better half of each text; those of all apart; everybody has as many."""
    for means, kept in zip(MEANS, KEPT):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-means)[: F // 2])
    assert {0, 1} <= set(CHANNELS.permanent)
    for own, kept in zip(CHANNELS.own, KEPT):
        assert sorted([*own, *CHANNELS.permanent]) == list(np.flatnonzero(kept))
    with pytest.raises(InputError, match="texts: got 'the same channels for all'"):
        split_channels(np.stack([KEPT[0], KEPT[0]]))


def test_experts_are_the_masked_feed_forward():
    """Values, and the gradient of the input."""
    gate, up = RNG.normal(size=(2, M, F))
    down = RNG.normal(size=(F, M))
    x = RNG.normal(size=(B, T, M)).astype(np.float32)
    ids = RNG.integers(0, E, (B, T))
    layer = SparseMoE(CONFIG, 0.1, jnp.float32)
    flat = expert_matrices(*(jnp.asarray(w, jnp.float32) for w in (gate, up, down)), CHANNELS)
    flat[("router", "kernel")] = jnp.zeros((M, E))
    with given_experts(jnp.asarray(ids)):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    wanted = {path: leaf.shape for path, leaf in flatten_dict(nn.meta.unbox(shapes)).items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == wanted
    weights = RNG.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def total(x):
        with given_experts(jnp.asarray(ids)):
            y = layer.apply({"params": unflatten_dict(flat)}, x)
        return jnp.vdot(y, weights), y

    def formula(x):
        z = x @ gate
        return (z / (1 + np.exp(-z)) * (x @ up) * KEPT[ids]) @ down

    (_, y), gradient = jax.value_and_grad(total, has_aux=True)(x)
    assert rel_rms(y, formula(x.astype(np.float64))) < 1e-5
    check_gradients(lambda x: np.sum(formula(x) * weights), x, gradient)


def test_experts_have_to_be_given():
    layer = SparseMoE(CONFIG, 0.1, jnp.float32)
    x = jnp.zeros((B, T, M))
    with pytest.raises(InputError, match=r"'given': got experts of shape None, expected \(2, 5\)"):
        jax.eval_shape(layer.init, jax.random.key(0), x)
    with (
        given_experts(jnp.zeros((B, T + 1), jnp.int32)),
        pytest.raises(InputError, match=r"got experts of shape \(2, 6\), expected \(2, 5\)"),
    ):
        jax.eval_shape(layer.init, jax.random.key(0), x)
    with pytest.raises(InputError, match=r"experts_per_token: got 2, expected 1 with router\.sel"):
        dataclasses.replace(CONFIG, experts_per_token=2)
    with pytest.raises(InputError, match="selection: got 'given', expected another, or weighting"):
        RouterConfig(selection="given")


def test_labels_and_loss_of_the_router():
    h = RNG.normal(size=(B, T, F)).astype(np.float32)
    found = np.asarray(overlaps(jnp.asarray(h), jnp.asarray(KEPT)))
    expected = np.zeros((B, T, E))
    for b, t, e in np.ndindex(B, T, E):
        shares = []
        for fraction in FRACTIONS:
            count = max(1, round(fraction * F))
            largest = np.argsort(-np.abs(h[b, t]))[:count]
            shares.append(KEPT[e][largest].mean())
        expected[b, t, e] = np.mean(shares)
    expected = 10 * (expected - expected.mean(-1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-5)

    logits = RNG.normal(size=(B, T, E)).astype(np.float32)

    def formula(z):
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        soft = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
        best = np.eye(E)[found.argmax(-1)]
        hard = -np.sum((0.5 * best + 0.5 / E) * log_p, -1)
        return 0.75 * hard - 0.25 * np.sum(soft * log_p, -1)

    loss = jax.jit(jax.value_and_grad(lambda z: jnp.sum(router_loss(z, jnp.asarray(found)))))
    value, gradient = loss(logits)
    assert np.isclose(value, formula(logits.astype(np.float64)).sum(), rtol=1e-5)
    check_gradients(lambda z: formula(z).sum(), logits, gradient)


def fewest_loads(experts, capacity):
    """Over all ways of choosing who goes."""

    @functools.cache
    def rest(place, held):
        if place == len(experts):
            return 0
        expert = experts[place]
        if expert in held:
            return rest(place + 1, held)
        if len(held) < capacity:
            return 1 + rest(place + 1, held | {expert})
        return 1 + min(rest(place + 1, held - {e} | {expert}) for e in held)

    return rest(0, frozenset())


def test_loads():
    """Looking ahead loads as seldom as can be; recency by a hand's example."""
    for _ in range(5):
        experts = tuple(RNG.integers(0, 4, 14).tolist())
        for capacity in (1, 2, 3):
            assert loads(experts, capacity, "ahead") == fewest_loads(experts, capacity)
            assert loads(experts, capacity, "recent") >= loads(experts, capacity, "ahead")
    assert loads([0, 1, 2, 0, 1, 2], 2, "recent") == 6
    assert loads([0, 1, 2, 0, 1, 2], 2, "ahead") == 4
    assert prefetch_order([2, 2, 0, 2, 1, 0]) == [(0, 2), (2, 0), (4, 1)]
    with pytest.raises(InputError, match="capacity: got 0, expected at least 1"):
        loads([0], 0, "ahead")
