"""V-MoE's noise and its two losses, against their formulas in float64, gradients too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms

from gatedjax.config import RouterConfig, SparseMoEConfig
from gatedjax.errors import InputError
from gatedjax.layers import SparseMoE
from gatedjax.layers.moe.noisy import importance_loss, load_loss, with_noise

E, K, NOISE = 4, 2, 1.5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, E)).astype(np.float32)
DRAWN = (NOISE / E * RNG.normal(size=LOGITS.shape)).astype(np.float32)
# Of the last row nothing is a token.
TOKENS = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


def squared_variation(values):
    """Of the means over the tokens of each row."""
    rows = [row[is_token].mean(0) for row, is_token in zip(values, TOKENS) if is_token.any()]
    return np.mean([(row.std() / row.mean()) ** 2 for row in rows])


def importance(h):
    e = np.exp(h - h.max(-1, keepdims=True))
    return squared_variation(e / e.sum(-1, keepdims=True))


def load(h):
    """The chance of a normal number to lift each expert over the k-th of those that were noisy."""
    noisy = h + DRAWN
    threshold = np.sort(noisy, axis=-1)[..., -K][..., None]
    needed = (threshold - h) / (NOISE / E)
    return squared_variation(0.5 * np.vectorize(math.erfc)(needed / math.sqrt(2)))


def test_losses_and_gradients():
    is_token = jnp.asarray(TOKENS)
    ours = {
        importance: lambda h: importance_loss(h, is_token),
        load: lambda h: load_loss(h, h + DRAWN, K, NOISE, is_token),
    }
    for formula, loss in ours.items():
        value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOGITS))
        assert rel_rms(value, formula(LOGITS.astype(np.float64))) < 1e-5
        check_gradients(formula, LOGITS.astype(np.float64), gradient)
        assert not gradient[1, 3:].any() and not gradient[2].any()
    even = jnp.zeros((1, 2, E))
    assert importance_loss(even, jnp.ones((1, 2), bool)) == 0


def test_noise_has_its_deviation():
    added = with_noise(jax.random.key(0), jnp.zeros((100, 50, E)), NOISE)
    assert abs(float(jnp.std(added)) * E / NOISE - 1) < 0.02


@pytest.mark.slow
def test_a_layer_is_noisy_where_it_has_random_numbers():
    """In training; its losses are those of the logits it recorded. Evaluation has no noise."""
    router = RouterConfig(noise=50.0, renormalize=False)
    c = SparseMoEConfig(num_experts=E, hidden=8, router=router, importance_loss=1.0, load_loss=1.0)
    layer = SparseMoE(c, init_std=1.0)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)
    params = layer.init(jax.random.key(0), x)

    def run(rngs):
        return layer.apply(params, x, rngs=rngs, method="with_statistics")

    (quiet, of_quiet, logits), again = run(None), run(None)
    noisy, of_noisy, same_logits = run({"router": jax.random.key(1)})
    assert (quiet == again[0]).all() and rel_rms(noisy, quiet) > 0.1
    assert (logits == same_logits).all()
    assert of_quiet["importance_loss"] == of_noisy["importance_loss"]
    everything = jnp.ones((2, 5), bool)
    assert np.isclose(of_quiet["importance_loss"], importance_loss(logits, everything))
    assert of_noisy["load_loss"] != of_quiet["load_loss"]


def test_what_noise_refuses():
    with pytest.raises(InputError, match=r"noise: got 1.0, expected 0 with selection 'gumbel'"):
        RouterConfig(selection="gumbel", noise=1.0)
    with pytest.raises(InputError, match=r"load_loss: got 0.1, expected 0 without router.noise"):
        SparseMoEConfig(load_loss=0.1)
