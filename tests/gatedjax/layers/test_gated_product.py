"""The product of a gated feed-forward and its gradient, against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_rms

from gatedjax.layers.activations import gated_product


def silu(x):
    """silu(x) and its derivative."""
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


def gelu(x):
    """The tanh form of gelu(x), and its derivative."""
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = c * (1 + 3 * 0.044715 * x**2) * (1 - t**2)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * slope


def relu(x):
    """relu(x) and its derivative."""
    return np.maximum(x, 0), (x > 0).astype(float)


def sigmoid(x):
    """sigmoid(x) and its derivative."""
    s = 1 / (1 + np.exp(-x))
    return s, s * (1 - s)


def identity(x):
    """x and its derivative."""
    return x, np.ones_like(x)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("activation", [silu, gelu, relu, sigmoid, identity])
def test_product_and_gradients(activation, dtype, bound):
    rng = np.random.default_rng(0)
    gate_logits, up, dproduct = jnp.asarray(3 * rng.normal(size=(3, 7, 5)), dtype)
    x, u, d = np.asarray([gate_logits, up, dproduct], np.float64)
    gates, slopes = activation(x)
    product, gradient = jax.vjp(
        lambda x, u: gated_product(x, u, activation.__name__), gate_logits, up
    )
    assert rel_rms(product, gates * u) < bound
    for actual, expected in zip(gradient(dproduct), (d * u * slopes, d * gates)):
        assert actual.dtype == dtype
        assert rel_rms(actual, expected) < bound


def test_it_keeps_what_it_is_given():
    """Two arrays of 16-bit numbers for the backward pass, and no float32 one."""
    x = jnp.ones((4, 8), jnp.bfloat16)
    _, pullback = jax.vjp(lambda x, u: gated_product(x, u, "silu"), x, x)
    kept = [y for y in jax.tree.leaves(pullback) if getattr(y, "shape", None) == x.shape]
    assert [y.dtype for y in kept] == ["bfloat16", "bfloat16"]
