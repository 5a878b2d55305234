"""Softmax in two passes against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow

from kernels_pallas import two_pass_softmax as module
from kernels_pallas.ops import two_pass_softmax

RNG = np.random.default_rng(0)
# Traced by this file alone, with few sums.
softmax = jax.jit(two_pass_softmax)


def formula(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradient(x, dy):
    y = formula(x)
    return y * (dy - (y * dy).sum(-1, keepdims=True))


@pytest.fixture(autouse=True)
def few_sums(monkeypatch):
    """So that rows of a hundred numbers have several steps and a rest."""
    monkeypatch.setattr(module, "SUMS", 24)


def test_values_and_gradients():
    """Beyond float32's exp, which overflows at 88, too."""
    x = np.float32(RNG.normal(size=(3, 107)) * 10 + np.array([[0.0], [1e3], [-1e4]]))
    dy = RNG.normal(size=x.shape)

    def number(x):
        y = two_pass_softmax(x)
        return jnp.sum(y * jnp.asarray(dy, jnp.float32)), y

    dx, y = jax.jit(jax.grad(number, has_aux=True))(x)
    expected = formula(x)
    # 0 is below 2^-126 of the largest.
    is_large = expected > 1e-37
    np.testing.assert_allclose(np.asarray(y)[is_large], expected[is_large], rtol=2e-6)
    np.testing.assert_allclose(y, expected, atol=1e-37, rtol=2e-6)
    np.testing.assert_allclose(dx, gradient(x, dy), atol=1e-6)


def test_a_spread_beyond_floats():
    """Logits of +-1e4 in a row; equal ones share; huge ones neither overflow nor underflow."""
    x = np.zeros((4, 40), np.float32)
    x[0] = np.linspace(-1e4, 1e4, 40)
    x[1, [3, 9]] = 9999.0
    x[2] = -3e38
    x[3, 7] = 3e38
    y = softmax(x)
    np.testing.assert_allclose(y, formula(x), rtol=1e-6, atol=1e-37)


def test_infinities_are_those_of_softmax():
    inf = np.inf
    x = np.float32([[0, -inf, 1], [-inf, -inf, -inf], [0, inf, 1], [0, np.nan, 1]])
    y = softmax(x)
    np.testing.assert_allclose(y, jax.nn.softmax(jnp.asarray(x)), rtol=1e-6)
    assert np.isnan(y[1:]).all() and y[0, 1] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_short_floats_are_computed_in_float32(dtype):
    x = jnp.asarray(RNG.normal(size=(2, 2, 9)) * 4, dtype)
    y = softmax(x)
    assert y.dtype == dtype and y.shape == x.shape
    np.testing.assert_allclose(
        np.asarray(y, np.float64), formula(x), rtol=jnp.finfo(dtype).eps, atol=6e-8
    )


def test_bad_arrays_are_named():
    with pytest.raises(ValueError, match="x: got dtype int32, expected float16, bfloat16 or"):
        two_pass_softmax(jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 0\), expected a last axis"):
        two_pass_softmax(jnp.zeros((2, 0)))
