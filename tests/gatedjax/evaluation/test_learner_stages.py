"""A trained model's MLPs become adaptive: what they start from, what is taught, what is spent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import plain, random_batch, tiny

from gatedjax.config import AdaptiveMLPConfig, FrozenDict, MLPConfig, VersatileMLPConfig
from gatedjax.errors import InputError
from gatedjax.evaluation import learner_stages as stages
from gatedjax.evaluation.spent import is_on_demand, spent_flops
from gatedjax.layers.block import block_layers
from gatedjax.layers.tree import unflatten_dict
from gatedjax.model import LanguageModel
from gatedjax.training.flops import forward_flops_per_token

RNG = np.random.default_rng(8)


def test_which_mlps_become_adaptive():
    model = tiny().model
    found = stages.adaptive_model(model, 4, 0.5)
    assert found.ffns["mlp"] == AdaptiveMLPConfig(
        hidden=64, learners=4, gated=True, activation="silu", budget=0.5
    )
    assert found.ffns["moe"] == model.ffns["moe"] and found.mixers == model.mixers
    assert list(stages.adaptive_layers(found)) == [0]
    with pytest.raises(InputError, match="learners: got 5, expected a divisor of hidden = 64"):
        stages.adaptive_model(model, 5, 0.5)
    for ffn in (MLPConfig(bias=True), MLPConfig(neuron_gate="soft")):
        others = dataclasses.replace(plain().model, ffns=FrozenDict(mlp=ffn))
        with pytest.raises(InputError, match="--checkpoint: got 'a model without MLPs to cut'"):
            stages.adaptive_model(others, 4, 0.5)


def test_what_is_spent():
    """A mean over tokens, layer by layer, in place of all learners or loops."""
    dense = tiny(model__ffn_pattern=("mlp",), model__num_layers=4).model
    adaptive = stages.adaptive_model(dense, 4, 0.5)
    assert is_on_demand(adaptive) and not is_on_demand(dense)
    had = {layer: RNG.integers(0, 5, 30) for layer in range(4)}
    of_learner = 6 * 32 * 64 / 4
    missing = sum(4 - had[layer].mean() for layer in had) * of_learner
    expected = forward_flops_per_token(adaptive, 32) - missing
    assert spent_flops(adaptive, 32, had) == pytest.approx(expected)
    gate = 2 * (32 * 16 + 16 * 16 + 16 * 5)
    assert forward_flops_per_token(adaptive, 32) == pytest.approx(
        forward_flops_per_token(dense, 32) + 4 * gate
    )
    ffn = VersatileMLPConfig(hidden=64, loops=3, experts=4)
    versatile = dataclasses.replace(dense, ffns=FrozenDict(mlp=ffn, moe=dense.ffns["moe"]))
    had = {layer: RNG.integers(1, 4, 30) for layer in range(4)}
    expected = forward_flops_per_token(versatile, 32)
    for loops in had.values():
        by_token = [6 * 32 * 64 * n + (2 * 32 * 64 if n < 3 else 0) for n in loops]
        expected += np.mean(by_token) - (3 * 6 + 2) * 32 * 64
    assert spent_flops(versatile, 32, had) == pytest.approx(expected)


def initial(model, batch):
    params = LanguageModel(model).init(jax.random.key(0), jnp.asarray(batch.tokens))["params"]
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_they_start_as_the_mlps(scan_layers):
    """With all learners the model is the dense one, to the bit."""
    dense = plain(model__num_layers=2, model__scan_layers=scan_layers).model
    batch = random_batch(rows=2)
    params = initial(dense, batch)
    adaptive = stages.adaptive_model(dense, 4, 0.5)
    of_layers = stages.from_dense(adaptive, params, seed=3)
    for own in of_layers.values():
        own["learner_gate"]["layer_2"]["bias"] = jnp.asarray([0, 0, 0, 0, 1e6])
    made = unflatten_dict(stages.whole(adaptive, params, of_layers))
    inputs = (jnp.asarray(batch.tokens), batch.positions, batch.segment_ids)
    expected, _, _ = LanguageModel(dense).apply({"params": params}, *inputs)
    found, _, _ = LanguageModel(adaptive).apply({"params": made}, *inputs)
    assert np.array_equal(found, expected)


@pytest.mark.slow
def test_what_learners_and_gates_are_taught_in_a_model():
    """Both losses in float64 numpy, from what the trained model's MLP gets and gives."""
    dense = plain().model
    batch = random_batch(rows=2)
    params = initial(dense, batch)
    adaptive = stages.adaptive_model(dense, 2, 0.5)
    own = stages.from_dense(adaptive, params, seed=3)
    own = jax.tree.map(lambda p: p + 0.1 * RNG.normal(size=p.shape), own)
    inputs, targets = stages._seen(dense, params, batch)
    x, target = (np.asarray(y[0], np.float64) for y in (inputs, targets))
    mask = np.asarray(batch.segment_ids) != 0
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), own["0"])
    gate, up = x @ p["gate"]["kernel"], x @ p["up"]["kernel"]
    h = gate / (1 + np.exp(-gate)) * up
    pieces = [np.zeros_like(x)]
    pieces += [h[..., i : i + 32] @ p["down"]["kernel"][i : i + 32] for i in (0, 32)]
    outputs = np.cumsum(pieces, axis=0)
    squares = ((outputs - target) ** 2).mean((0, -1))
    expected = squares[mask].mean() / (target**2).mean(-1)[mask].mean()
    found = stages.learners_loss(own, params, batch, dense, adaptive)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    errors = np.sqrt(((outputs - target) ** 2).sum(-1))
    label = np.where(errors[0] / errors[1] < 1.2, 2, np.where(errors[1] / errors[2] < 1.2, 2, 2))
    logits = x
    for layer in range(3):
        of_layer = p["learner_gate"][f"layer_{layer}"]
        logits = logits @ of_layer["kernel"] + of_layer["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, label[..., None], -1)[..., 0][mask].mean()
    gates = {"0": own["0"]["learner_gate"]}
    found = stages.gates_loss(gates, own, params, batch, dense, adaptive)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert block_layers(adaptive, adaptive.blocks[0])[1].config.learners == 2
