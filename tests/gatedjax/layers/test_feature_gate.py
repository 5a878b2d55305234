"""The zero-started gate of ImageBind-LLM and its bind network, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import check_gradients, rel_rms

from gatedjax.layers.feature_gate import NORM_EPS, BindNetwork, FeatureGate

RNG = np.random.default_rng(3)
B, T, H, HK, V, M, F = 2, 3, 4, 2, 5, 6, 7


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_feature_gate():
    o, feature, kernel = normal(B, T, H, V), normal(B, M), normal(M, HK, V)
    layer = FeatureGate()
    y, variables = layer.init_with_output(jax.random.key(0), o, feature, kernel)
    np.testing.assert_array_equal(y, o)
    assert not np.any(variables["params"]["gate"])
    params = {"query": normal(M), "gate": normal(H)}
    weights = normal(B, T, H, V)

    def formula(given):
        params, o, feature, kernel = given
        values = np.einsum("bm,mhv->bhv", feature + params["query"], kernel)
        values = np.repeat(values, H // HK, axis=1)
        return o + (np.tanh(params["gate"])[:, None] * values)[:, None]

    def total(given):
        params, *rest = given
        y = layer.apply({"params": params}, *rest)
        return jnp.vdot(y, weights), y

    given = (params, o, feature, kernel)
    (_, y), gradient = jax.value_and_grad(total, has_aux=True)(given)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    assert rel_rms(y, formula(wide)) < 1e-6
    check_gradients(lambda given: np.sum(formula(given) * weights), given, gradient)


def test_bind_network():
    layer = BindNetwork(width=M, hidden=9, blocks=2)
    feature = normal(B, F)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), feature)["params"]
    params = jax.tree.map(lambda s: normal(*s.shape), shapes)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = feature @ p["in"]["kernel"]
    for i in range(2):
        y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + NORM_EPS) * p[f"norm_{i}"]["scale"]
        gate = y @ p[f"gate_{i}"]["kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (y @ p[f"up_{i}"]["kernel"])
        x = x + hidden @ p[f"down_{i}"]["kernel"]
    assert rel_rms(layer.apply({"params": params}, feature), x) < 1e-5
