"""Skipping of experts: importances against models that lack a layer's experts, thresholds against
counting.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedjax.config import (
    FrozenDict,
    GatedAttentionConfig,
    ModelConfig,
    RouterConfig,
    SparseMoEConfig,
)
from gatedjax.layers.moe.routing import route
from gatedjax.layers.moe.skipping import (
    calibrated,
    chosen_scores,
    divergence,
    frontier,
    skip_threshold,
)
from gatedjax.layers.moe.state import merge, split
from gatedjax.model import LanguageModel

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 8)).astype(np.int32))


def test_importance_is_what_a_layer_without_its_experts_changes():
    """Left out by hand: the matrices that experts end in are 0. Layers lie in a scan."""
    ffn = SparseMoEConfig(num_experts=3, hidden=8, router=RouterConfig(threshold=0.1))
    attention = GatedAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    sizes = dict(vocab_size=32, width=8, num_layers=3, init_std=0.5, dtype="float32")
    model = LanguageModel(
        ModelConfig(**sizes, mixers=FrozenDict(attention=attention), ffns=FrozenDict(mlp=ffn))
    )
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
    params, state = split(params)

    @jax.jit
    def logits_of(params, state):
        p = merge(params, state)
        hidden, *_ = model.apply({"params": p}, TOKENS)
        return hidden @ p["embedding"].T

    importance = lambda state: state["periods"]["layer_0"]["ffn"]["router_state"]["importance"]
    found = importance(calibrated(lambda state: logits_of(params, state), state))
    everything = jax.tree.map(lambda x: jnp.full_like(x, 1e30), state)
    p = np.asarray(jax.nn.log_softmax(logits_of(params, everything)), np.float64)
    assert np.abs(p - np.asarray(jax.nn.log_softmax(logits_of(params, state)))).max() > 1e-3, (
        "nothing is skipped"
    )
    for layer in range(3):
        down = params["periods"]["layer_0"]["ffn"]["down"]
        without = jax.tree.map(lambda x: x, params)
        without["periods"]["layer_0"]["ffn"]["down"] = down.at[layer].set(0.0)
        q = np.asarray(jax.nn.log_softmax(logits_of(without, everything)), np.float64)
        assert np.isclose(found[layer], np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), rtol=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.37, 1.0])
def test_threshold_skips_what_was_wanted_and_no_more(rate):
    rng = np.random.default_rng(1)
    logits, importance = (
        jnp.asarray(rng.normal(size=(3, 2, 50, 6)), jnp.float32),
        jnp.asarray([0.2, 3.0, 0.7], jnp.float32),
    )
    config = RouterConfig(scoring="sigmoid", scale=2.5)
    scores = chosen_scores(config, logits, 2)
    threshold = skip_threshold(importance, scores, rate)
    wanted = int(np.ceil(rate * scores.size))

    def skipped(threshold):
        config_then = dataclasses.replace(config, threshold=threshold)
        layers = [
            route(config_then, z, 2, importance=i).experts == 6 for z, i in zip(logits, importance)
        ]
        return int(np.sum(layers))

    assert skipped(threshold) == wanted and skipped(threshold * 0.999) <= wanted
    assert (
        not wanted
        or skipped(float(np.nextafter(np.float32(threshold), np.float32(0)))) == wanted - 1
    )


def test_padding_is_not_counted():
    """NaN where there is no token: thresholds and divergences of the tokens alone."""
    rng = np.random.default_rng(2)
    mask = rng.random((2, 20)) < 0.6
    scores = rng.random((3, 2, 20, 2)).astype(np.float32)
    importance = np.array([0.2, 3.0, 0.7], np.float32)
    padded = np.where(mask[..., None], scores, np.nan)
    expected = skip_threshold(importance, scores[:, mask], 0.4)
    assert skip_threshold(importance, padded, 0.4, is_token=mask) == expected
    log_p, logits = jax.nn.log_softmax(rng.normal(size=(2, 20, 5))), rng.normal(size=(2, 20, 5))
    everywhere = divergence(log_p[mask][None], jnp.asarray(logits[mask][None]))
    broken = jnp.asarray(np.where(mask[..., None], logits, np.nan))
    assert divergence(log_p, broken, mask) == pytest.approx(float(everywhere), rel=1e-5)
    assert divergence(log_p, broken, np.zeros_like(mask)) == 0
    with pytest.raises(ValueError, match="scores: got NaN or Inf, expected finite"):
        skip_threshold(importance, padded, 0.4)
    with pytest.raises(ValueError, match="is_token: got shape"):
        skip_threshold(importance, padded, 0.4, is_token=mask[:1])


def test_two_kinds_have_thresholds_of_their_own():
    """By loops: what is skipped of either kind; weights of what is left, and their gradients."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 5, (2, 9))
    logits = rng.normal(size=(2, 9, 4))
    config = RouterConfig(
        threshold=0.2, second_kind=(1, 3), second_threshold=0.3, renormalize=False
    )
    importance = jnp.asarray([0.8, 1.1])

    def formula(logits):
        weights = np.zeros((2, 9, 2))
        ids = np.full((2, 9, 2), 4)
        for at in np.ndindex(2, 9):
            p = np.exp(logits[at]) / np.exp(logits[at]).sum()
            kind = int(tokens[at] in (1, 3))
            for place, expert in enumerate(np.argsort(-p)[:2]):
                if (0.8, 1.1)[kind] * p[expert] >= (0.2, 0.3)[kind]:
                    weights[at][place] = p[expert]
                    ids[at][place] = expert
        return ids, weights

    def routed(logits):
        return route(config, logits, 2, importance=importance, tokens=jnp.asarray(tokens))

    found = routed(jnp.asarray(logits))
    ids, weights = formula(logits)
    assert 0 < np.sum(ids == 4) < ids.size
    np.testing.assert_array_equal(found.experts, ids)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    way = rng.normal(size=weights.shape)
    gradient = jax.grad(lambda z: jnp.sum(way * routed(z).weights))(jnp.asarray(logits))
    direction = rng.normal(size=logits.shape)
    moved = [(way * formula(logits + s * direction)[1]).sum() for s in (1e-6, -1e-6)]
    slope = (moved[0] - moved[1]) / 2e-6
    assert float(np.sum(gradient * direction)) == pytest.approx(slope, rel=1e-4)
    # Scores are those before anything is skipped.
    scores = np.asarray(chosen_scores(config, jnp.asarray(logits), 2, tokens=tokens))
    assert np.all(scores > 0)
    with pytest.raises(ValueError, match=r"tokens: got None, expected the ids .* for second_kind"):
        route(config, jnp.asarray(logits), 2)


def test_frontier_has_the_best_pair():
    """Against all pairs, for divergences that rise with either threshold; and it tries fewer."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        first = np.sort(rng.integers(0, 30, 7))
        second = np.sort(rng.integers(0, 30, 5))
        cost = rng.random((7, 5)).cumsum(0).cumsum(1)
        wanted = int(rng.integers(0, 70))
        pairs = frontier(first, second, wanted)
        enough = first[:, None] + second[None] >= wanted
        if not enough.any():
            assert pairs == []
            continue
        assert all(enough[pair] for pair in pairs) and len(pairs) <= 7
        assert min(cost[pair] for pair in pairs) == cost[enough].min()
    with pytest.raises(ValueError, match="second: got numbers that fall"):
        frontier([1, 2], [2, 1], 1)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"second_threshold: got 0\.5, expected 0 without"):
        RouterConfig(second_threshold=0.5)
    with pytest.raises(ValueError, match="skip_rate: got True"):
        skip_threshold(np.ones(2), np.ones((2, 3)), True)
    with pytest.raises(ValueError, match="skip_rate: got"):
        skip_threshold(np.ones(2), np.ones((2, 3)), 1.5)
    with pytest.raises(ValueError, match="scores: got shape"):
        skip_threshold(np.ones(2), np.ones((3, 3)), 0.5)
    with pytest.raises(ValueError, match="no importance"):
        calibrated(lambda state: np.zeros((1, 1, 2)), {"layer": {"bias": np.zeros(3)}})
