"""Soft mixtures of adapters beside a feed-forward: loops in float64 with gradients, the bits of the
feed-forward at first, documents apart, causal models.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_gradients, rel_rms
from scipy.special import erf
from tiny_run import plain

from gatedjax.config import FrozenDict, GatedMLPConfig, MLPConfig, SoftAdaptersConfig
from gatedjax.errors import InputError
from gatedjax.layers import GatedMLP, TokenInfo
from gatedjax.layers.moe.soft_adapters import SoftAdapters, adapter_flops

RNG = np.random.default_rng(7)
B, T, M, E, S, F = 2, 6, 5, 3, 2, 4
X = RNG.normal(size=(B, T, M)).astype(np.float32)


def softmax(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def formula(p, x, normalize):
    """Loops over rows and slots."""
    y = np.zeros_like(x)
    phi = p["phi"].reshape(M, E * S)
    for row, tokens in enumerate(x):
        logits = tokens @ phi
        if normalize:
            lengths = np.sqrt((tokens**2).sum(-1, keepdims=True) + 1e-6)
            of_slots = np.sqrt((phi**2).sum(0) + 1e-6)
            logits = p["scale"] * logits / lengths / of_slots
        dispatch, combine = softmax(logits, 0), softmax(logits, 1)
        for slot in range(E * S):
            e = slot // S
            hidden = dispatch[:, slot] @ tokens @ p["down"][e] + p["down_bias"][e]
            hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
            y[row] += combine[:, slot : slot + 1] * (hidden @ p["up"][e] + p["up_bias"][e])
    return y


@pytest.mark.parametrize("normalize", [False, True])
def test_adapters_equal_loops_over_slots(normalize):
    layer = SoftAdapters(SoftAdaptersConfig(E, S, F, normalize), 0.1, jnp.float32)
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), X, None)["params"])
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)
    weights = RNG.normal(size=X.shape).astype(np.float32)

    def total(given):
        y = layer.apply({"params": given[0]}, given[1], None)
        return jnp.vdot(y, weights), y

    given = (params, X)
    (_, y), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    assert rel_rms(y, formula(*wide, normalize)) < 1e-5
    check_gradients(lambda g: np.sum(formula(*g, normalize) * weights), given, gradient)


def dense_formula(p, x):
    """Every token through every bottleneck."""
    y = np.zeros_like(x)
    for e in range(E):
        hidden = x @ p["down"][e] + p["down_bias"][e]
        y += hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ p["up"][e] + p["up_bias"][e]
    return y


def test_without_slots_they_are_ordinary_adapters():
    config = SoftAdaptersConfig(E, 0, F)
    assert config.not_causal is None and adapter_flops(config, M, T) == 2 * E * 2 * M * F
    layer = SoftAdapters(config, 0.1, jnp.float32)
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), X, None)["params"])
    assert sorted(shapes) == ["down", "down_bias", "up", "up_bias"]
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
    info = TokenInfo(jnp.zeros_like(ids), ids, jnp.zeros_like(ids))
    weights = RNG.normal(size=X.shape).astype(np.float32)
    is_token = np.asarray(ids != 0)[..., None]

    def total(given):
        y = layer.apply({"params": given[0]}, given[1], info)
        return jnp.vdot(y, weights), y

    given = (params, X)
    (_, y), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    assert rel_rms(y, dense_formula(*wide) * is_token) < 1e-5
    check_gradients(lambda g: np.sum(dense_formula(*g) * is_token * weights), given, gradient)
    with pytest.raises(InputError, match="normalize: got True, expected False with slots = 0"):
        SoftAdaptersConfig(E, 0, F, normalize=True)


def test_at_first_the_feed_forward_is_what_it_was():
    """To the bit, with random numbers of its own."""
    base = GatedMLP(GatedMLPConfig(hidden=8), 0.3)
    y, _ = jax.jit(layer().init_with_output)(jax.random.key(0), X)
    np.testing.assert_array_equal(y, jax.jit(base.init_with_output)(jax.random.key(0), X)[0])


def layer():
    return GatedMLP(GatedMLPConfig(hidden=8, adapters=SoftAdaptersConfig(E, S, F)), 0.3)


@pytest.mark.slow
def test_documents_have_slots_of_their_own():
    with_adapters = layer()
    variables = with_adapters.init(jax.random.key(0), X)
    variables = jax.tree.map(lambda p: p + 0.3, variables)
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]])
    y = with_adapters.apply(variables, X, TokenInfo(positions, ids, jnp.zeros_like(ids)))
    for row, begin, end in ((0, 0, 4), (0, 4, 6), (1, 0, 3)):
        alone = with_adapters.apply(variables, X[row : row + 1, begin:end])
        assert rel_rms(y[row, begin:end], alone[0]) < 1e-5
    assert not np.any(y[1, 3:])


def test_a_causal_model_refuses_them():
    for mlp in (GatedMLPConfig, MLPConfig):
        ffn = mlp(hidden=8, adapters=SoftAdaptersConfig(number=2))
        with pytest.raises(InputError, match=r"ffns.mlp: got 'adapters: every slot is a mean over"):
            plain(model__ffns=FrozenDict(mlp=ffn))
