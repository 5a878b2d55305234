"""Early exits against float64 loops: numbers of predictions, probabilities, calibration, costs;
and generation layer by layer against the model's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import random_batch, tiny

from gatedjax.errors import InputError
from gatedjax.evaluation import exit_learning
from gatedjax.evaluation import exits as early
from gatedjax.evaluation.early_exit import EarlyExit, require_simple
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.flops import forward_flops_per_token

RNG = np.random.default_rng(11)


def test_numbers_of_a_prediction():
    """Values and gradients of JEI-DNN's four numbers."""
    x = 2 * RNG.normal(size=(3, 7))

    def numbers(x):
        p = np.exp(x) / np.exp(x).sum()
        top = np.sort(p)[::-1]
        squared = p**2 / (p**2).sum()
        entropies = [-(p * np.log(p)).sum(), -(squared * np.log(squared)).sum()]
        return np.array([top[0], entropies[0], top[0] - top[1], entropies[1]])

    found = early.features(jnp.asarray(x))
    np.testing.assert_allclose(found, [numbers(row) for row in x], rtol=2e-6, atol=1e-6)
    jacobian = jax.jacobian(early.features)(jnp.asarray(x[0], jnp.float32))
    for i in range(7):
        step = 1e-6 * np.eye(7)[i]
        slope = (numbers(x[0] + step) - numbers(x[0] - step)) / 2e-6
        np.testing.assert_allclose(jacobian[:, i], slope, rtol=1e-4, atol=1e-5)


def test_exit_probabilities():
    gates = np.array([[0.3, 0.4, 0.9], [1.0, 0.5, 0.5], [0.0, 0.0, 0.0]])
    right = [[0.3, 0.4, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    np.testing.assert_allclose(early.exit_probabilities(jnp.asarray(gates)), right, atol=1e-7)


def test_what_gates_are_taught():
    losses = jnp.asarray([[2.0, 1.5, 1.4], [3.0, 2.9, 0.5], [1.0, 1.0, 1.0]])
    costs = jnp.asarray([0.2, 0.6, 1.0])
    best = early.cheapest(losses, costs, 1.0)
    np.testing.assert_array_equal(best, [1, 2, 0])
    gates = np.array([[0.3, 0.6], [0.3, 0.6], [0.3, 0.6]])
    right = [
        -np.log(0.7) - np.log(0.6),
        -np.log(0.7) - np.log(0.4),
        -np.log(0.3),
    ]
    np.testing.assert_allclose(early.gate_loss(jnp.asarray(gates), best), right, rtol=1e-6)


def test_calibration_by_brute_force():
    confidence = np.round(RNG.random((60, 3)), 1)
    is_right = RNG.random((60, 3)) < confidence
    for epsilon in (0.0, 0.05, 0.2):
        found = early.calibrated(confidence, is_right, epsilon)
        for column in range(3):
            own, right = confidence[:, column], is_right[:, column]
            accuracy = {d: right[own >= d].mean() for d in np.unique(own)}
            best = max(accuracy.values())
            expected = min(d for d, a in accuracy.items() if a >= best - epsilon)
            assert found[column] == expected
    assert np.all(early.calibrated(confidence, is_right, 1.0) == confidence.min(axis=0))


def test_outcome():
    confidence = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]])
    chosen = early.chosen_exit(confidence, np.array([0.5, 0.8]))
    np.testing.assert_array_equal(chosen, [0, 1, 2])
    losses = np.arange(9.0).reshape(3, 3)
    is_right = losses % 2 == 0
    result = early.outcome(chosen, losses, is_right, np.array([1.0, 2.0, 4.0]))
    assert result.loss == (0 + 4 + 8) / 3
    assert result.accuracy == 1.0
    assert result.flops == 7 / 3
    assert result.fractions == (1 / 3, 1 / 3, 1 / 3)
    with pytest.raises(InputError, match="--epsilon=0: got 'thresholds that no token reaches'"):
        early.require_selecting(np.array([2, 2]), 2, "--epsilon=0")


def test_costs_are_those_of_the_model():
    model = tiny(model__num_layers=4).model
    of_layers = early.layer_flops(model, 32)
    prediction = 2.0 * model.width * model.vocab_size
    assert of_layers.sum() + prediction == pytest.approx(forward_flops_per_token(model, 32))
    costs = early.exit_costs(model, 32, (1, 3))
    right = [
        of_layers[0] + prediction,
        of_layers[:3].sum() + 2 * prediction,
        of_layers.sum() + 3 * prediction,
    ]
    np.testing.assert_allclose(costs, right)


def test_bad_input():
    model = tiny(model__num_layers=4).model
    assert early.layers_of([], model) == (1, 2, 3)
    assert early.layers_of(["1", "3"], model) == (1, 3)
    for wrong in (["0"], ["4"], ["3", "1"], ["x"], ["1", "1"]):
        with pytest.raises(InputError, match="--layers: got"):
            early.layers_of(wrong, model)
    with pytest.raises(InputError, match="a model with a norm of its embeddings"):
        require_simple(tiny(model__embedding_norm=True).model)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_generation_layer_by_layer(scan_layers):
    """Without exits it is the model's own; with all taken, the first exit's on the whole stream."""
    model = tiny(model__num_layers=4, model__scan_layers=scan_layers).model
    prompt = [3, 9, 1, 5]
    params = LanguageModel(model).init(jax.random.key(0), jnp.asarray([prompt]))["params"]
    params = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params
    )
    exits = early.fresh_exits(2, params["final_norm"]["scale"])
    decoder = EarlyExit(model, params, exits, (1, 3))
    whole = decoder.generate(prompt, 6, np.full(2, np.inf))
    tokens = list(prompt)
    for _ in range(6):
        hidden, _, _ = LanguageModel(model).apply({"params": params}, jnp.asarray([tokens]))
        tokens.append(int(jnp.argmax(logits(hidden[0, -1], head_weights(params)))))
    assert whole.tokens == tokens[len(prompt) :]
    assert whole.exits == [2] * 5
    early_exit = decoder.generate(prompt, 6, np.full(2, -np.inf))
    assert early_exit.exits == [0] * 5
    assert early_exit.flops < 0.8 * whole.flops


def test_gate_of_the_depth():
    """Values of its logits in float64, what it is taught, and what a token then costs."""
    x = RNG.normal(size=(5, 4))
    gate = early.DepthGate(jnp.asarray(RNG.normal(size=(4, 3))), jnp.asarray(RNG.normal(size=3)))

    def formula(weights, bias):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) @ weights + bias

    expected = formula(np.asarray(gate.weights, np.float64), np.asarray(gate.bias, np.float64))
    np.testing.assert_allclose(early.depth_logits(gate, jnp.asarray(x), 1e-6), expected, rtol=1e-5)
    assert np.all(early.depth_logits(early.fresh_depth_gate(4, 2), jnp.asarray(x), 1e-6) == 0)
    model = tiny(model__num_layers=4).model
    of_layers = early.layer_flops(model, 32)
    prediction = 2.0 * model.width * model.vocab_size
    gate_flops = 2.0 * model.width * 3
    costs = early.depth_costs(model, 32, (1, 3))
    right = [of_layers[:n].sum() + prediction + gate_flops for n in (1, 3, 4)]
    np.testing.assert_allclose(costs, right)
    # One prediction for each token: less than with an exit at each layer on the way.
    assert np.all(costs[1:] < early.exit_costs(model, 32, (1, 3))[1:])


@pytest.mark.slow
def test_what_the_depth_learns_from():
    """Steps A and C in float64 numpy, from the logits that the exits give."""
    model = tiny(model__num_layers=4, model__dtype="float32").model
    batch = random_batch(rows=2)
    params = LanguageModel(model).init(jax.random.key(0), jnp.asarray(batch.tokens))["params"]
    params = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(jax.random.key(1), p.shape), params
    )
    layers = (1, 3)
    exits = early.fresh_exits(2, params["final_norm"]["scale"])
    seen = exit_learning.predictions(model, layers, params, exits, batch)
    mask = np.asarray(batch.loss_mask, np.float64)
    losses = []
    for predicted in seen.all:
        p = np.asarray(predicted, np.float64)
        log_z = np.log(np.exp(p).sum(-1))
        losses.append(log_z - np.take_along_axis(p, batch.targets[..., None], -1)[..., 0])
    losses = np.stack(losses, -1)
    found = exit_learning.parent_loss((exits, params), batch, model, layers)
    expected = ((losses @ [1 / 4, 3 / 4, 1.0]) * mask).sum() / mask.sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)
    gate = early.DepthGate(jnp.asarray(RNG.normal(size=(32, 3))), jnp.zeros(3))
    costs = np.array([0.3, 0.8, 1.0])
    best = (losses + 0.5 * costs).argmin(-1)
    assert len(np.unique(best)) > 1
    chosen = np.asarray(early.depth_logits(gate, seen.first, model.norm_eps), np.float64)
    chosen -= np.log(np.exp(chosen).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(chosen, best[..., None], -1)[..., 0] * mask).sum() / mask.sum()
    found = exit_learning.depth_loss(
        gate, batch, exits, params, model, layers, jnp.asarray(costs, jnp.float32), 0.5
    )
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_generation_by_the_gate_of_the_depth():
    """A gate that always says the same: that exit's tokens, and nothing of the others."""
    model = tiny(model__num_layers=4).model
    prompt = [3, 9, 1, 5]
    params = LanguageModel(model).init(jax.random.key(0), jnp.asarray([prompt]))["params"]
    exits = early.fresh_exits(2, params["final_norm"]["scale"])
    never = np.full(2, np.inf)
    plain = EarlyExit(model, params, exits, ()).generate(prompt, 5, np.zeros(0))
    flops = []
    for place in range(3):
        bias = jnp.zeros(3).at[place].set(1e6)
        gate = early.DepthGate(jnp.zeros((32, 3)), bias)
        result = EarlyExit(model, params, exits, (1, 3), depth=gate).generate(prompt, 5, never)
        assert result.exits == [place] * 4
        flops.append(result.flops)
    assert flops[0] < flops[1] < flops[2] < 1.05 * plain.flops
    whole = EarlyExit(model, params, exits, (1, 3)).generate(prompt, 5, never)
    assert result.tokens == plain.tokens == whole.tokens and plain.flops < whole.flops
